"""Which rollouts of an update the perception loss learns from, by the rules of the trainer's gate.

verl spreads the rollouts of a group over ranks and mini-batches. So the gate is taken of the whole update at once, with
the rewards of all ranks.
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
"""Entries with the reward of a rollout, spread over its tokens; the first that a batch has is what verl compared."""


@dataclass(frozen=True)
class Candidates:
    """Rollouts of one rank before their groups are known. All are [B].

    Attributes:
        uids: of each one's prompt.
        rewards: of each, as its group compares them.
        advantages: of each; 0 where the gate does not ask for it.
        correctness: of each, for the gate "correct".
        eligible: whether each has images of its prompt alone, and a token that it generated itself.
    """

    uids: list[str]
    rewards: list[float]
    advantages: Tensor
    correctness: Tensor | None
    eligible: Tensor

    @classmethod
    def of(cls, data: TensorDict, eligible: Sequence[bool], options: VerlOptions) -> "Candidates":
        """Those of a batch.

        Args:
            eligible: by its images, each.

        Raises:
            UserError: tokens of a rollout have different advantages, or no reward of the gate's name is known.
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
    """Prompts of several rollouts, all of the same reward up to rounding; their advantages are rounding alone.

    rewards: of the rollouts of all ranks, each beside the uid of its prompt.
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
    """The weight of each rollout of this rank in the perception loss, [B]; 0 of those that do not pass the gate.

    equal: as `equal_groups` of all ranks finds it.
    """
    in_equal = torch.tensor([uid in equal for uid in own.uids])
    advantages = own.advantages.masked_fill(in_equal, 0.0)
    weights = (gate_rollouts(options.perception_gate, advantages, own.correctness) & own.eligible).float()
    return weights * advantages if options.perception_weighting == "advantage" else weights


def _of_rollout(advantages: Tensor, mask: Tensor) -> Tensor:
    """The one advantage of a rollout's tokens; 0 where it has none."""
    own = advantages[mask]
    if not len(own):
        return torch.zeros((), device=advantages.device)
    if not torch.equal(own.amax(), own.amin()):
        raise UserError(
            "perception_gate = 'advantage' asks whether a rollout did better than its group, but its tokens have "
            "different advantages: choose algorithm.adv_estimator=grpo, or perception_gate = 'correct' or 'none'"
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
                "let it return a dict with that entry beside `score`"
            )
        values.append(float(extra.get(name) or 0.0))
    return torch.tensor(values)
