"""Answers of a model with sharded weights: each pass gathers them, so all processes run it together."""

from dataclasses import dataclass
from typing import Any, Unpack

from PIL import Image

from cppo.evaluation.generate import Engine, Images, Prompts, Sampling
from cppo.evaluation.processes import Processes

IDLE_PROMPT = [{"role": "user", "content": "-"}]
IDLE_SIDE = 64
"""Side in pixels of the grey square for an idle prompt, when the others' prompts have images."""


@dataclass(frozen=True)
class ShardedEngine:
    """Lets another engine answer in all processes at once.

    Prompts with and without images go in separate rounds, since the vision tower is sharded too. A process without
    prompts for a round answers an idle prompt. `generate` runs in each process until the last one has finished.

    Attributes:
        engine: answers one batch with a transformers model.
        processes: the processes that call `answer` together.
    """

    engine: Engine
    processes: Processes

    def answer(self, prompts: Prompts, images: Images, **sampling: Unpack[Sampling]) -> list[str]:
        """As `Engine.answer`; no prompts get no responses."""
        own = any(images) if prompts else None
        responses: list[str] = []
        for has_images in sorted({kind for kind in self.processes.gather(lambda: own) if kind is not None}):
            if has_images == own:
                responses = self.engine.answer(prompts, images, **sampling)
            else:
                self._idle(has_images)
        return responses

    def _idle(self, has_images: bool) -> None:
        picture: list[Any] = [Image.new("RGB", (IDLE_SIDE, IDLE_SIDE), "grey")] if has_images else []
        self.engine.answer([IDLE_PROMPT], [picture], max_new_tokens=1)
