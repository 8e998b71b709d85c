"""Warnings from the first steps of a run, printed once: rewards that teach nothing, and a contrast far out of range."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from cppo.errors import tell
from cppo.reports.signs import equal_rewards, far_out

FIRST_STEPS = 5
"""Optimizer steps before the check."""


class EarlySigns(TrainerCallback):
    """Prints once, after `FIRST_STEPS` steps, the warnings from the logged metrics.

    Args:
        temperature: of the contrast; None where the run has none.
        already: whether the run already reported why it earns no reward.
    """

    def __init__(self, temperature: float | None, already: Callable[[], bool]) -> None:
        self._temperature, self._already = temperature, already
        self._rows: list[Mapping[str, Any]] = []
        self._done = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._done or not state.is_world_process_zero or "reward" not in (logs or {}):
            return
        self._rows.append(dict(logs))
        if state.global_step < min(FIRST_STEPS, state.max_steps):
            return
        self._done = True
        signs = [] if self._already() else [equal_rewards(self._rows, state.global_step)]
        if self._temperature is not None:
            signs.append(far_out(self._rows, self._temperature))
        for sign in filter(None, signs):
            tell(f"warning: {sign}")
