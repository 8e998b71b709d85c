"""A few rollouts with their perception tokens, kept for the report."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cppo.training.perception_term import Detection, PerceptionTerm

MAX_SAMPLES = 4


class RolloutSamples:
    """Remembers the rows and rewards of the generation batch, and the latest few scored rollouts."""

    def __init__(self) -> None:
        self.latest: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._rewards: list[float] = []

    def begin(self, rows: Sequence[dict[str, Any]], rewards: Tensor) -> None:
        """A new generation batch of rows with their weighted rewards, [B]."""
        self._rows, self._rewards = list(rows), rewards.tolist()

    def keep(
        self,
        tokenizer: Any,
        rollouts: Sequence[int],
        completion_ids: Tensor,
        mask: Tensor,
        found: PerceptionTerm | Detection,
        step: int,
    ) -> None:
        """Replace the latest samples by up to `MAX_SAMPLES` gated-in rollouts of this micro-batch.

        Args:
            rollouts: their places in the generation batch. After a resume its rows are unknown, and nothing is kept.
            completion_ids, mask: [n, T].
            found: their scores and selected tokens.
            step: the optimizer step, from 1.
        """
        if not self._rows:
            return
        self.latest = []
        for row in range(min(MAX_SAMPLES, len(rollouts))):
            source = self._rows[rollouts[row]]
            length = int(mask[row].sum())
            ids = completion_ids[row, :length].tolist()
            self.latest.append(
                {
                    "step": step,
                    "prompt": source["prompt"],
                    "images": source["images"],
                    "answer": source.get("answer"),
                    "reward": self._rewards[rollouts[row]],
                    "completion_tokens": [tokenizer.decode([token]) for token in ids],
                    "perception": found.token_mask[row, :length].tolist(),
                    "score": found.score[row, :length].tolist(),
                }
            )
