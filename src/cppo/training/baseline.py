"""A value baseline per prompt, from its earlier rewards (MSSR, arXiv 2512.18215)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cppo.training.micro_batch import response_mask

UNSEEN = 0.5
"""Baseline of a prompt without any earlier reward."""
RIGHT = 0.5
"""A larger reward counts as a right answer."""
LEAST_VARIANCE = 1e-6


def normalized(raw: Tensor) -> Tensor:
    """Advantages, [B], scaled to mean 0 and population variance 1; a NaN is left out of both and becomes 0."""
    known = ~raw.isnan()
    if not known.any():
        return torch.zeros_like(raw)
    own = raw[known]
    scale = own.var(correction=0).clamp(min=LEAST_VARIANCE).sqrt()
    return ((raw - own.mean()) / scale).masked_fill(~known, 0.0)


def memory_factor(drift: float | None, target: float, memory: Sequence[float]) -> float:
    """The factor that shrinks counts.

    As in MSSR's code, it grows with the KL up to the target, and there drops to the smallest value.

    Args:
        drift: mean KL to the reference, nats per token; None where unknown.
        target: the KL above which the factor is the smallest.
        memory: the smallest and the largest factor.
    """
    least, most = memory
    if drift is None:
        return (least + most) / 2
    return least if drift > target else least + drift / target * (most - least)


@dataclass
class PromptBaseline:
    """Beta counts of right and wrong answers per prompt, and the KL that sets how fast they shrink.

    All processes hold the same counts. Each process sums the KL of its micro-batches until the next generation.

    Attributes:
        target, window, memory: the options `baseline_kl_target`, `baseline_kl_window` and `baseline_memory`.
        counts: by sample id.
        recent: the mean KL of the latest generation batches, at most `window`.
        sums: of the KL and of the tokens since the latest generation, on this process.
        begun: whether the initial pass is done.
    """

    target: float
    window: int
    memory: Sequence[float]
    counts: dict[str, tuple[float, float]] = field(default_factory=dict)
    recent: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    begun: bool = False
    _seen: list[Tensor] = field(default_factory=list)

    @property
    def weight(self) -> float:
        """The total count of a prompt after the initial pass: 8 for the published memory."""
        return 1 / (1 - self.memory[0])

    def begin(self, mean_rewards: Mapping[str, float]) -> None:
        """Set the counts from the mean reward of each prompt, in [0, 1]."""
        shares = {name: min(max(mean, 0.0), 1.0) for name, mean in mean_rewards.items()}
        self.counts = {name: (self.weight * share, self.weight * (1 - share)) for name, share in shares.items()}
        self.begun = True

    def value(self, name: str) -> float:
        """The expected share of right answers to a prompt."""
        right, wrong = self._counts(name)
        return right / (right + wrong)

    def _counts(self, name: str) -> tuple[float, float]:
        return self.counts.get(name, (UNSEEN * self.weight, (1 - UNSEEN) * self.weight))

    def advantages(self, names: Sequence[str], rewards: Tensor) -> Tensor:
        """The normalized advantages of a generation batch, [B]; its rewards are counted afterwards.

        Args:
            names: the sample id of each rollout of all processes.
            rewards: [B]; a NaN, for a missing reward, gets the advantage 0 and is not counted.
        """
        values = torch.tensor([self.value(name) for name in names], dtype=torch.float64, device=rewards.device)
        found = normalized(rewards.double() - values)
        drift = sum(self.recent) / len(self.recent) if self.recent else None
        factor = memory_factor(drift, self.target, self.memory)
        answers: dict[str, list[bool]] = {}
        for name, reward in zip(names, rewards.tolist(), strict=True):
            if reward == reward:
                answers.setdefault(name, []).append(reward > RIGHT)
        for name, right in answers.items():
            held = self._counts(name)
            self.counts[name] = (factor * held[0] + sum(right), factor * held[1] + len(right) - sum(right))
        return found.float()

    def see(self, inputs: Mapping[str, Any], logps: Tensor) -> None:
        """Add a micro-batch's KL, k3, from the policy that made its rollouts to the reference, if there is one.

        Args:
            inputs: the micro-batch, with `ref_per_token_logps`, and `old_per_token_logps` where it serves several
                updates, [B, T].
            logps: of the policy in this update, which made the rollouts where there are no old ones.
        """
        reference = inputs.get("ref_per_token_logps")
        if reference is None:
            return
        old = inputs.get("old_per_token_logps")
        shift = (reference - (logps.detach() if old is None else old)).double()
        k3, mask = shift.exp() - shift - 1, response_mask(inputs)
        self._seen.append(torch.stack([(k3 * mask).sum(), mask.sum().double()]))

    def sums_so_far(self) -> list[float]:
        """The summed KL and tokens of this process since the latest generation."""
        if self._seen:
            for total, tokens in torch.stack(self._seen).tolist():  # summed only when needed
                self.sums = [self.sums[0] + total, self.sums[1] + tokens]
            self._seen.clear()
        return self.sums

    def close(self, total: float, tokens: float) -> None:
        """End a generation batch, with the sums of all processes."""
        self.sums_so_far()
        self.sums = [0.0, 0.0]
        if tokens:
            self.recent = [*self.recent, total / tokens][-self.window :]

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"counts": self.counts, "recent": self.recent, "sums": self.sums_so_far(), "begun": self.begun}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.counts = {name: (right, wrong) for name, (right, wrong) in state["counts"].items()}
        self.recent, self.sums, self.begun = list(state["recent"]), list(state["sums"]), state["begun"]
