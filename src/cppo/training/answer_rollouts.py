"""Train the policy's answers to a reward's questions as rollouts: Vision-SR1's later version.

Each rollout gets one more row: the question, as text alone, and its answer. These rows have their own rewards, group
statistics and advantages, by TRL's code, and the share `trained_answers_weight` of the loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from trl import GRPOTrainer

from cppo.errors import UserError, choose_one
from cppo.options.sink import TOKEN_MEANS
from cppo.policy.vision_inputs import PER_TOKEN_KEYS, pads_rows
from cppo.rewards.asking import asks_policy
from cppo.training.asking import Answers
from cppo.training.generation import RolloutTrainer
from cppo.trl_surface import rollouts_apart

QUESTIONS = {"prompt_ids": None, "prompt_mask": 0}
"""Tensors with a column per prompt token, padded on the left, and their padding; None is the padding token."""
RESPONSES = {
    "completion_ids": None,
    "completion_mask": 0,
    "old_per_token_logps": 0.0,
    "ref_per_token_logps": 0.0,
    "sampling_per_token_logps": 0.0,
    "importance_sampling_ratio": 1.0,
    "perception_draws": 0.0,
}
"""Tensors with a column per response token, padded on the right."""
OF_ANSWERS = {"perception_views": None, "rollout_place": None, "view_key": 0, "num_images": 0, "num_tiles": 0}
"""Values of the answers' rows in lists: no views, no index among the samples, no images."""


@dataclass(frozen=True)
class AnswerRows:
    """One row per rollout of this process; an end token fills rows without a question.

    Attributes:
        questions, answers: token ids.
        logps: of the answers' tokens, in nats, where vLLM sampled them.
        rewards: of every row of all processes and every function, [B, R]; NaN except in the column of the function that
            asked.
    """

    questions: list[list[int]]
    answers: list[list[int]]
    logps: list[list[float]] | None
    rewards: Tensor


class AnswerTrainer(RolloutTrainer):
    """The part of `CPPOTrainer` that trains the answers of a reward; the trainer sets its attributes."""

    _answering: AnswerRows | None
    _rewards: Tensor | None

    def _generate(self, prompts: list) -> Any:
        if self._answering is None:
            return super()._generate(prompts)
        rows = self._answering
        texts = self.processing_class.batch_decode(rows.answers, skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        return rows.questions, rows.answers, None, completions, rows.logps, {}, None, []

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        if self._answering is not None:
            return self._answering.rewards
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards

    def _with_answers(
        self, rollouts: dict[str, Any], units: Sequence[int], weight: float
    ) -> tuple[dict[str, Any], list[int]]:
        """A generation batch with the answers added to its rollouts, and the unit of each row for the shuffle.

        units: of each rollout. weight: share of the answers in the policy loss.
        """
        name, rewards = str(self.args.trained_answers), self._rewards
        assert rewards is not None
        column, found, size = self.reward_func_names.index(name), self.asked[name], len(units)
        answered = torch.tensor([place in found.answers for place in range(size)], device=rewards.device)
        earned = rewards[:, column].masked_fill(~self.accelerator.gather(answered), torch.nan)
        alone = torch.full_like(rewards, torch.nan)
        alone[:, column] = earned
        weights = self.reward_weights
        self._answering = self._rows_of(found, size, alone)
        self.reward_weights = torch.zeros_like(weights).index_fill(0, torch.tensor(column), 1.0)
        try:
            with rollouts_apart(self, "answers"):
                rows: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": ""}]}] * size
                answers = GRPOTrainer._generate_and_score_completions(self, rows)
        finally:
            self._answering, self.reward_weights = None, weights
        answers["completion_mask"] = answers["completion_mask"] * answered[:, None]
        lengths = torch.stack([one["completion_mask"].sum() for one in (rollouts, answers)])[None]
        tokens = self.accelerator.gather(lengths).sum(dim=0)
        shares = loss_factors(self.args.loss_type, weight, *tokens.tolist())
        for one, factor in zip((rollouts, answers), shares, strict=True):
            one["advantages"] = factor * one["advantages"]
        answers["rollout_reward"] = earned[self._mine(size)]
        # Below the ids of rollouts without a group, and unique to this process.
        first = -1 - len(rewards) - self._mine(size).start
        padding = getattr(self.processing_class, "tokenizer", self.processing_class).pad_token_id
        joined = joined_rows(rollouts, answers, [first - place for place in range(size)], padding)
        joined["num_items_in_batch"] = tokens.sum()
        return joined, [unit for unit in units for _ in range(2)]

    def _mine(self, size: int) -> slice:
        first = self.accelerator.process_index * size
        return slice(first, first + size)

    def _rows_of(self, found: Answers, size: int, rewards: Tensor) -> AnswerRows:
        nothing = [self.eos_token_ids[0]]
        return AnswerRows(
            [found.prompts.get(place, nothing) for place in range(size)],
            [found.answers.get(place, nothing) for place in range(size)],
            [found.logps.get(place, [0.0]) for place in range(size)] if self.use_vllm else None,
            rewards,
        )


def loss_factors(loss_type: str, weight: float, tokens: float, answer_tokens: float) -> tuple[float, float]:
    """Factors of the advantages of rollouts and of answers that give each set its share of the loss.

    The policy loss is proportional to positive factors of the advantages. A mean over all rows gives each set one half;
    a mean over all tokens gives it its share of the tokens. So the factors are 1 for a weight of one half and a mean
    over rows. Where each micro-batch takes its own mean over tokens (bnpo), shares hold on average. KL and entropy
    terms keep the shares of the mean.

    Args:
        loss_type: TRL's option.
        weight: share of the answers, in [0, 1].
        tokens, answer_tokens: of the generation batch, over all processes.
    """
    own = answer_tokens / (tokens + answer_tokens) if loss_type in TOKEN_MEANS and answer_tokens else 0.5
    return (1 - weight) / (1 - own), weight / own


def joined_rows(
    rollouts: Mapping[str, Any], answers: Mapping[str, Any], groups: list[int], padding: int
) -> dict[str, Any]:
    """The rows of a generation batch, each rollout followed by its answer; scalars come from `rollouts`.

    So a micro-batch has as many rollouts as answers, and images where its rollouts have some.

    groups: the group ids of the answers, which share nothing. padding: the token.
    """
    size = len(rollouts["prompt_ids"])
    left, right = (
        max(0, answers[name].shape[1] - rollouts[name].shape[1]) for name in ("prompt_ids", "completion_ids")
    )
    order = torch.arange(2 * size).view(2, size).T.flatten()

    def beside(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second.to(first)])[order.to(first.device)]

    def padded(name: str, value: float | None, before: bool) -> Tensor:
        filling = padding if value is None else value
        pair = rollouts[name], answers.get(name, torch.full_like(rollouts[name], filling))
        missing = [max(one.shape[1] for one in pair) - own.shape[1] for own in pair]
        return beside(
            *(
                pad(one, (width, 0) if before else (0, width), value=filling)
                for one, width in zip(pair, missing, strict=True)
            )
        )

    questions = zip(answers["prompt_ids"], answers["prompt_mask"], strict=True)
    of_answers = {
        **{name: [value] * size for name, value in OF_ANSWERS.items()},
        "group_id": groups,
        "prompt_tokens": [ids[mask.bool()].tolist() for ids, mask in questions],
        "response_length": answers["completion_mask"].sum(dim=1).tolist(),
    }
    joined: dict[str, Any] = {}
    whole = pads_rows(rollouts)
    for name, value in rollouts.items():
        if name in QUESTIONS:
            joined[name] = padded(name, QUESTIONS[name], before=True)
        elif name in RESPONSES:
            joined[name] = padded(name, RESPONSES[name], before=False)
        elif name in PER_TOKEN_KEYS:
            joined[name] = beside(pad(value, (left, right)), torch.zeros_like(pad(value, (left, right))))
        elif name == "prompt_images":
            joined[name] = _images_beside(value, left, right)
        elif isinstance(value, list):
            joined[name] = [row for pair in zip(value, of_answers[name], strict=True) for row in pair]
        elif isinstance(value, Tensor) and (value.ndim == 1 or (whole and value.ndim > 1)) and len(value) == size:
            joined[name] = beside(value, answers.get(name, torch.zeros_like(value)))
        else:  # scalars, and the concatenated images of all rows
            joined[name] = value
    return joined


def _images_beside(images: Sequence[dict[str, Any]], left: int, right: int) -> list[dict[str, Any]]:
    """The image inputs of the rollouts' prompts in the longer rows, shared as before; answers have none."""
    made = {id(own): own for own in images}
    longer = {
        key: {name: pad(value, (left, right)) if name in PER_TOKEN_KEYS else value for name, value in own.items()}
        for key, own in made.items()
    }
    none = {
        key: {name: torch.zeros_like(value) for name, value in own.items() if name in PER_TOKEN_KEYS}
        for key, own in longer.items()
    }
    return [part for own in images for part in (longer[id(own)], none[id(own)])]


def check_trained_answers(name: str | None, names: Sequence[str], functions: Sequence[Any], makes_own: bool) -> None:
    """Raise UserError unless `trained_answers` names a reward that asks the policy.

    Args:
        name: the option.
        names, functions: of the rewards.
        makes_own: whether tools, an environment or a `rollout_func` make rollouts.

    Raises:
        UserError: the reward does not ask, or something else makes the rollouts.
    """
    if name is None:
        return
    asking = [one for one, function in zip(names, functions, strict=True) if asks_policy(function)]
    if name not in asking:
        hint = choose_one(name, asking) if asking else "none of the rewards does so; description does, for instance"
        raise UserError(f"trained_answers = {name!r} is not a reward that asks the policy; {hint}")
    if makes_own:
        raise UserError(
            "trained_answers needs the trainer's own rollouts: leave out tools, environments and rollout_func"
        )
