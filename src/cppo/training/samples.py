"""A few rollouts with their perception tokens, kept for the report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cppo.training.perception_term import Detection
from cppo.training.view_inputs import first_copies

MAX_SAMPLES = 4


class RolloutSamples:
    """Remembers the rows of the generation batch, and the latest few rollouts that were trained on."""

    def __init__(self) -> None:
        self.latest: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._prompts: list[int] = []

    @property
    def knows_rows(self) -> bool:
        """False until `begin`, also after a resume in the middle of a generation batch."""
        return bool(self._rows)

    def begin(self, rows: Sequence[dict[str, Any]]) -> None:
        """The rows of a generation batch, in order, as the rollouts see them."""
        # A row without a prompt gets it from an environment, which changes it as it goes.
        self._rows = list(rows) if all("prompt" in row for row in rows) else []
        self._prompts = first_copies(self._rows)

    def keep(
        self,
        tokenizer: Any,
        inputs: Mapping[str, Any],
        scored: Sequence[int],
        found: Detection | None,
        step: int,
    ) -> None:
        """Replace the latest samples by up to `MAX_SAMPLES` rollouts of a micro-batch.

        Different prompts come first. Rollouts scored under the views replace others of their step, of which no token is
        selected.

        Args:
            inputs: the micro-batch, with `rollout_place` in the generation batch and `rollout_reward`, [B]. One from a
                checkpoint of cppo 0.1.0 has no rewards, and nothing is kept.
            scored: places of the n rollouts that were scored under the views.
            found: their dependency scores and selected tokens, [n, T] each; None if there are none.
            step: the optimizer step, from 1.
        """
        if not self._rows or "rollout_reward" not in inputs:
            return
        if found is None and self.latest and self.latest[0]["step"] == step:
            return
        self.latest = []
        rewards = inputs["rollout_reward"].tolist()
        places = range(len(inputs["rollout_place"])) if found is None else scored
        for index in self._one_a_prompt([inputs["rollout_place"][place] for place in places])[:MAX_SAMPLES]:
            place = places[index]
            source = self._rows[inputs["rollout_place"][place]]
            length = int(inputs["completion_mask"][place].sum())
            ids = inputs["completion_ids"][place, :length].tolist()
            self.latest.append(
                {
                    "step": step,
                    "prompt": source["prompt"],
                    "images": source.get("images") or [],
                    "answer": source.get("answer"),
                    "reward": rewards[place],
                    "completion_tokens": [tokenizer.decode([token]) for token in ids],
                    "perception": [False] * length if found is None else found.token_mask[index, :length].tolist(),
                    "score": [0.0] * length if found is None else found.score[index, :length].tolist(),
                }
            )

    def _one_a_prompt(self, rollouts: Sequence[int]) -> list[int]:
        """Places of the rollouts, the first one of each prompt first, then the second ones, and so on."""
        seen: Counter[int] = Counter()
        turns = []
        for rollout in rollouts:
            prompt = self._prompts[rollout]
            turns.append(seen[prompt])
            seen[prompt] += 1
        return sorted(range(len(rollouts)), key=turns.__getitem__)
