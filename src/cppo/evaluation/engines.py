"""What answers prompts in an evaluation: the interface, and a transformers model behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from cppo.errors import UserError, first_line
from cppo.evaluation.generate import generate_responses


@runtime_checkable
class Engine(Protocol):
    """Answers a batch of prompts. `generate_responses` describes the arguments and the result."""

    def answer(
        self,
        prompts: Sequence[list[dict[str, Any]]],
        images: Sequence[Sequence[Any]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        streams: Sequence[np.random.Generator],
    ) -> list[str]: ...


@dataclass(frozen=True)
class TransformersEngine:
    """A model of transformers and its processor, on the device where the model is."""

    model: Any
    processor: Any

    def answer(
        self, prompts: Sequence[list[dict[str, Any]]], images: Sequence[Sequence[Any]], **options: Any
    ) -> list[str]:
        """One response to each prompt. Raises UserError for more prompts than the memory holds."""
        try:
            return generate_responses(self.model, self.processor, prompts, images, **options)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"a batch of {len(prompts)} responses does not fit into the memory ({first_line(error)}); "
                "give a smaller --batch_size"
            ) from error
