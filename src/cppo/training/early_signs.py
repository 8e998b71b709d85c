"""Warnings from the first steps of a run, printed once: rewards that teach nothing, and a contrast far out of range."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from cppo.errors import tell
from cppo.reports.signs import equal_rewards, far_out
from cppo.rewards.extract import completion_text
from cppo.rewards.form import BOX, THINK, ChatForm

FORM_STEPS = 3
"""Optimizer steps before the report of a reward that nothing earned."""
FIRST_STEPS = 5
"""Optimizer steps before the other warnings."""
KEPT = 64
"""Number of responses that are searched."""
LOOKS_FOR = {"format_reward": (THINK, BOX), "accuracy_reward": (BOX,)}
"""The standard rewards by their functions' names, and the form that each needs in a response."""


class FormWatch(TrainerCallback):
    """Reports once, after `FORM_STEPS` steps, why no response had the form that the standard rewards need.

    Args:
        rewards: the names of the run's rewards.

    Attributes:
        form: of the model's chat template and tokenizer.
        warning: the report; None before, and without anything to report.
    """

    def __init__(self, form: ChatForm, rewards: Sequence[str]) -> None:
        self.form = form
        self.warning: str | None = None
        self._reward = next((name for name in LOOKS_FOR if name in rewards), None)
        self._earned = self._reward is None
        self._prompts: list[Any] = []
        self._responses: list[str] = []

    @property
    def marks(self) -> tuple[str, ...]:
        """The forms that the run's standard rewards need; empty without standard rewards."""
        return LOOKS_FOR[self._reward] if self._reward else ()

    def with_opening(self, rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """The rows with the column `prompt_opens` where the chat template opens the response; rewards may use it."""
        return [{**row, "prompt_opens": self.form.opened} for row in rows] if self.form.opened else rows

    def see(self, prompts: Sequence[Any], completions: Sequence[Any], rewards: Tensor, names: Sequence[str]) -> None:
        """Take a batch. rewards: [B, R] of all processes, by the R names; prompts and completions: of this process."""
        if self._earned or self.warning is not None:
            return
        self._earned = bool((rewards[:, list(names).index(str(self._reward))] > 0).any())
        room = KEPT - len(self._responses)
        self._prompts += prompts[:room]
        self._responses += map(completion_text, completions[:room])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._earned or self.warning is not None or state.global_step < min(FORM_STEPS, state.max_steps):
            return
        boxed = any("\\boxed{" in response for response in self._responses)
        if self._reward == "accuracy_reward" and boxed:
            self._earned = True  # wrong answers have another cause than form
            return
        causes = self.form.causes(self._prompts, self._responses, self.marks)
        what = str(self._reward).removesuffix("_reward")
        steps = f"{state.global_step} step{'s' * (state.global_step > 1)}"
        self.warning = f"{what} 0 % in the first {steps}: {'; '.join(causes)}"
        tell(f"warning: {self.warning}")


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
