"""Watches in a run's first steps whether any response earns what the standard rewards look for, and says why not."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from cppo.errors import tell
from cppo.rewards.extract import completion_text
from cppo.rewards.form import BOX, THINK, ChatForm

FIRST_STEPS = 3
"""Optimizer steps after which a reward that nothing ever earned is told."""
KEPT = 64
"""Responses that are looked through."""
LOOKS_FOR = {"format_reward": (THINK, BOX), "accuracy_reward": (BOX,)}
"""The standard rewards by their functions' names, and what a response needs to earn them."""


class FormWatch(TrainerCallback):
    """Tells once, after `FIRST_STEPS` steps, why no response had the form that the standard rewards look for.

    Attributes:
        form: of the model's chat template and tokenizer.
        warning: what was told; None before, and where there was nothing to tell.
    """

    def __init__(self, trainer: Any) -> None:
        self.form = ChatForm.of(trainer.processing_class, **trainer.chat_template_kwargs)
        self.warning: str | None = None
        self._reward = next((name for name in LOOKS_FOR if name in trainer.reward_func_names), None)
        self._earned = self._reward is None
        self._prompts: list[Any] = []
        self._responses: list[str] = []

    @property
    def marks(self) -> tuple[str, ...]:
        """What the run's rewards look for; nothing where none is a standard one."""
        return LOOKS_FOR[self._reward] if self._reward else ()

    def with_opening(self, rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """The rows with the column `prompt_opens` where the chat template opens the response: rewards may count it."""
        return [{**row, "prompt_opens": self.form.opened} for row in rows] if self.form.opened else rows

    def see(self, prompts: Sequence[Any], completions: Sequence[Any], rewards: Tensor, names: Sequence[str]) -> None:
        """Look at a batch. rewards: [B, R] of all processes, by the R names; prompts and completions are this one's."""
        if self._earned or self.warning is not None:
            return
        self._earned = bool((rewards[:, list(names).index(str(self._reward))] > 0).any())
        room = KEPT - len(self._responses)
        self._prompts += prompts[:room]
        self._responses += map(completion_text, completions[:room])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._earned or self.warning is not None or state.global_step < min(FIRST_STEPS, state.max_steps):
            return
        boxed = any("\\boxed{" in response for response in self._responses)
        if self._reward == "accuracy_reward" and boxed:
            self._earned = True  # wrong answers are no matter of form
            return
        causes = self.form.causes(self._prompts, self._responses, self.marks)
        what = str(self._reward).removesuffix("_reward")
        self.warning = f"{what} 0 % in the first {state.global_step} steps: {'; '.join(causes)}"
        tell(f"warning: {self.warning}")
