"""From the rows of a generation batch to rollouts with groups, views and a gate.

Every rollout gets its group id here; rollouts of a group answer one prompt about the same images. The id stays with the
rollout through generation, shuffle, buffer, checkpoint and packing; all code that shares work in a group uses it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cppo.messages import prompt_text
from cppo.perception import draw_rollouts, equal_rewards, gate_rollouts
from cppo.policy.prompts import Row, canonical_row
from cppo.policy.row_tokens import rows_on_host
from cppo.policy.vision_inputs import split_rows
from cppo.trl_surface import split_tensor_dict, unsplit_pixel_values_by_grid


@dataclass
class GenerationBatch:
    """A process's part of a generation batch, for TRL's calls back into the trainer.

    Attributes:
        first: the index of the first rollout among those of all processes.
        rows: canonical rows, one per rollout, in order.
        numbers: of each rollout in its group, from 0.
        group_ids: per rollout; other processes' parts of a group have the same id.
        prompts, responses: token ids of each rollout, after generation.
        rewards: of every rollout of all processes and every function, [B, R], once known.
    """

    first: int
    rows: list[Row]
    numbers: list[int]
    group_ids: list[int]
    prompts: Sequence[list[int]] = ()
    responses: Sequence[list[int]] = ()
    rewards: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], first: int, group_size: int, alone: bool) -> "GenerationBatch":
        """From rows of the dataset, converted by `canonical_row` once per group; its rollouts share prompt and images.

        Args:
            first: as above. The G rollouts of a group are adjacent over all processes, as TRL's sampler orders them and
                its advantages expect.
            group_size: G.
            alone: whether each rollout has its own prompt, as with environments.
        """
        places = [divmod(place, group_size) for place in range(first, first + len(rows))]
        canonical: list[Row] = []
        first_of: dict[int, int] = {}
        group_ids = []
        for index, (row, (group, _)) in enumerate(zip(rows, places, strict=True)):
            brings_prompt = "prompt" in row  # else an environment adds it
            same = first_of.setdefault(group, index)
            shares = not alone and brings_prompt and prompt_text(row["prompt"]) == prompt_text(rows[same]["prompt"])
            group_ids.append(group if shares else _own_group(first + index))
            if shares and same != index:
                canonical.append({**row, "prompt": canonical[same]["prompt"], "images": canonical[same]["images"]})
            else:
                canonical.append(canonical_row(row) if brings_prompt else {**row})
        return cls(first, canonical, [number for _, number in places], group_ids)

    @property
    def firsts(self) -> list[int]:
        """For each rollout, the index of the first rollout of its group."""
        first_of: dict[int, int] = {}
        return [first_of.setdefault(group, index) for index, group in enumerate(self.group_ids)]

    @property
    def mine(self) -> slice:
        """The slice of these rollouts among all processes' rollouts."""
        return slice(self.first, self.first + len(self.rows))

    def leave(self, index: int) -> None:
        """Remove a rollout from its group's sharing."""
        self.group_ids[index] = _own_group(self.first + index)

    def generated(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> None:
        """Take the generated tokens; a rollout with other prompt tokens than its group leaves the group."""
        self.prompts, self.responses = prompts, responses
        for index, same in enumerate(self.firsts):
            if prompts[index] != prompts[same]:
                self.leave(index)

    def rewarded(self, responses: Sequence[list[int]], rewards: Tensor) -> None:
        """Take the rewards, [B, R]. Raises RuntimeError where they are of other responses than the generated ones."""
        if list(responses) != list(self.responses):
            raise RuntimeError("TRL asks for rewards of other responses than it generated")
        self.rewards = rewards

    def groups_of(self, input_ids: Tensor, attention_mask: Tensor, num_response_tokens: int) -> list[int]:
        """The groups of rows [B, P + T], in order; rows that are not this batch's rollouts get a group each."""
        prompts, _ = rows_on_host(input_ids, attention_mask, num_response_tokens)
        responses = input_ids[:, -num_response_tokens:].tolist()
        same = len(prompts) == len(self.prompts) and all(
            prompt == own_prompt and response[: len(own)] == own
            for prompt, own_prompt, response, own in zip(prompts, self.prompts, responses, self.responses, strict=True)
        )
        return self.group_ids if same else list(range(len(prompts)))


def _own_group(place: int) -> int:
    return -1 - place


# Gate

ROLLOUT_DRAWS = 1 << 31
"""Replaces a rank in the key of a random stream; no rank has this number."""


def gated_rollouts(
    gate: str, advantages: Tensor, compared: Tensor, group_size: int, mine: slice, correctness: Tensor | None
) -> Tensor:
    """The gated-in rollouts of this process, bool [B]; a group with equal rewards has advantages of 0.

    Args:
        gate: the option `perception_gate`.
        advantages: [B].
        compared: the rewards that TRL normalizes separately, of the rollouts of all processes, [all, F].
        group_size: G.
        mine: the slice of this process's rollouts among all.
        correctness: [B], for the gate "correct".
    """
    equal = equal_rewards(compared, group_size)[mine]
    return gate_rollouts(gate, advantages.masked_fill(equal, 0.0), correctness)


def rollout_weights(gates: Tensor, group_size: int, limit: int | None, seed: int, batch_number: int) -> Tensor:
    """Weight of every rollout in the perception loss, [B]; 0 for those not scored under the views.

    Args:
        gates: the gated-in rollouts, bool [B], of all processes.
        group_size: G.
        limit: the option `perception_rollouts_per_group`.
        seed: the run's.
        batch_number: generation batches before this one; each has its own random stream, which all processes and a
            resumed run share.
    """
    if limit is None:
        return gates.float()
    return draw_rollouts(gates, group_size, limit, _generator(seed, batch_number, ROLLOUT_DRAWS))


def token_draws(shape: torch.Size, seed: int, batch_number: int, rank: int) -> Tensor:
    """Uniform random numbers for this process's response tokens, [B, T], for random selection.

    Args:
        seed, batch_number: as in `rollout_weights`.
        rank: of the process; each draws its own numbers.
    """
    return torch.rand(shape, generator=_generator(seed, batch_number, rank))


def _generator(*key: int) -> torch.Generator:
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64).item()
    return torch.Generator().manual_seed(seed)


# Micro-batches


def shuffled_micro_batches(batch: dict[str, Any], groups: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Shuffle the groups of a generation batch and split it into `count` micro-batches.

    The rollouts of a group stay adjacent, also where a split goes through the group. TRL shuffles single rollouts,
    which scatters a group over the micro-batches of a step.

    Args:
        batch: this process's part of a generation batch.
        groups: of each rollout; where each has its own, the order is TRL's.
        count: micro-batches of equal size.
    """
    number = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    rank = torch.randperm(len(number)).argsort()
    order = rank[torch.tensor([number[group] for group in groups])].argsort(stable=True)
    shuffled = {key: _reordered(value, order) for key, value in split_rows(batch).items()}
    parts = cast("list[dict[str, Any]]", split_tensor_dict(shuffled, count))
    return [unsplit_pixel_values_by_grid(part) for part in parts]


def rollouts_a_pass(rows: int, group_size: int, micro_batch: int) -> Fraction:
    """Average number of rollouts that share a pass over a prompt and its images, over `rows` rollouts of whole groups.

    Args:
        rows: of a process's part of a generation batch.
        group_size: G.
        micro_batch: rollouts of a micro-batch; where it is not a multiple of G, splits go through groups.
    """
    return Fraction(rows, len({(row // group_size, row // micro_batch) for row in range(rows)}))


def _reordered(value: Any, order: Tensor) -> Any:
    """One entry per row, or a scalar of the whole batch, or None."""
    if isinstance(value, Tensor):
        return value if value.ndim == 0 else value[order]
    return None if value is None else [value[row] for row in order.tolist()]
