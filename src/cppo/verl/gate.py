"""The gate inside verl, by the rules of the trainer's gate: which rollouts of an update the perception loss uses.

verl spreads the rollouts of a group over ranks and mini-batches. So the gate is decided for the whole update at once,
with the rewards of all ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from cppo.errors import UserError
from cppo.perception import equal_rewards, gate_rollouts
from cppo.verl.options import VerlOptions
from cppo.verl.rows import rows_of

REWARDS = ("token_level_rewards", "rm_scores")
"""Entries with a rollout's reward, spread over its tokens. verl compares the first one that a batch has."""


@dataclass(frozen=True)
class Candidates:
    """Rollouts of one rank before their groups are known. All are [B].

    Attributes:
        uids: of each prompt.
        rewards: as compared within the group.
        advantages: 0 where the gate does not need them.
        correctness: for the gate "correct".
        eligible: whether the rollout has only its prompt's images, and a token that it generated.
    """

    uids: list[str]
    rewards: list[float]
    advantages: Tensor
    correctness: Tensor | None
    eligible: Tensor

    @classmethod
    def of(cls, data: TensorDict, eligible: Sequence[bool], options: VerlOptions) -> "Candidates":
        """From a batch.

        Args:
            eligible: by its images, per rollout.

        Raises:
            UserError: tokens of a rollout have different advantages, or the gate's reward is unknown.
        """
        masks = [row.bool() for row in data["response_mask"].unbind()]
        answers = torch.tensor([ok and bool(mask.any()) for ok, mask in zip(eligible, masks, strict=True)])
        advantages, correctness = torch.zeros(len(masks)), None
        if options.perception_gate == "advantage":
            advantages = torch.stack(
                [_of_rollout(row, mask) for row, mask in zip(data["advantages"].unbind(), masks, strict=True)]
            )
        elif options.perception_gate == "correct":
            correctness = _correctness(data, str(options.perception_gate_reward), answers.tolist())
        name = next((name for name in REWARDS if name in data), None)
        rewards = [0.0] * len(masks) if name is None else [float(row.sum()) for row in data[name].unbind()]
        uids = [str(row["uid"]) for row in rows_of(data, ["uid"])]
        return cls(uids, rewards, advantages.float().cpu(), correctness, answers)


def equal_groups(rewards: Iterable[tuple[str, float]]) -> set[str]:
    """Prompts with several rollouts of equal reward up to rounding; their advantages are rounding errors.

    rewards: of the rollouts of all ranks, with the uid of each prompt.
    """
    groups: dict[str, list[float]] = {}
    for uid, reward in rewards:
        groups.setdefault(uid, []).append(reward)
    return {
        uid
        for uid, own in groups.items()
        if len(own) > 1 and bool(equal_rewards(torch.tensor(own, dtype=torch.float32)[:, None], len(own)).all())
    }


def rollout_weights(own: Candidates, equal: set[str], options: VerlOptions) -> Tensor:
    """The weight of each rollout of this rank in the perception loss, [B]; 0 for gated-out rollouts.

    equal: from `equal_groups` over all ranks.
    """
    in_equal = torch.tensor([uid in equal for uid in own.uids])
    advantages = own.advantages.masked_fill(in_equal, 0.0)
    weights = (gate_rollouts(options.perception_gate, advantages, own.correctness) & own.eligible).float()
    return weights * advantages if options.perception_weighting == "advantage" else weights


def _of_rollout(advantages: Tensor, mask: Tensor) -> Tensor:
    """The single advantage of a rollout's tokens; 0 without any."""
    own = advantages[mask]
    if not len(own):
        return torch.zeros((), device=advantages.device)
    if not torch.equal(own.amax(), own.amin()):
        raise UserError(
            "perception_gate = 'advantage' needs one advantage per rollout, but the tokens of one have different "
            "advantages: choose algorithm.adv_estimator=grpo, or perception_gate = 'correct' or 'none'"
        )
    return own[0]


def _correctness(data: TensorDict, name: str, answers: Sequence[bool]) -> Tensor:
    values = []
    for row, answers_itself in zip(rows_of(data, ["extra_fields"]), answers, strict=True):
        extra: dict[str, Any] = (row.get("extra_fields") or {}).get("reward_extra_info") or {}
        if answers_itself and name not in extra:
            known = ", ".join(sorted(extra)) or "none"
            raise UserError(
                f"perception_gate_reward = {name!r}: the reward function reports no such value (it reports: {known}); "
                "return a dict with that entry beside `score`"
            )
        values.append(float(extra.get(name) or 0.0))
    return torch.tensor(values)
