"""Prompts for vLLM on the training GPUs, which expands an image's placeholder itself.

TRL 1.16 passes it prompts that the processor already expanded, with the images, so it would expand them once more. A
vLLM server gets expanded prompts correctly: TRL passes the positions of the images.
"""

from collections.abc import Callable, Sequence
from typing import Any

from cppo.errors import UserError
from cppo.messages import Messages, embedded_images
from cppo.trl_surface import vllm_takes


class ColocatedPrompts:
    """Passes each prompt to colocated vLLM with one placeholder per image.

    vLLM must expand the prompt as the processor does; otherwise the rollout is refused, because it would answer another
    prompt than the trained one.

    Args:
        generation: TRL's link to vLLM.
        render: the token ids of a prompt with one placeholder per image.
    """

    def __init__(self, generation: Any, render: Callable[[Messages | str], list[int]]) -> None:
        self._render = render
        self._unexpanded: dict[tuple[int, ...], list[int]] = {}
        vllm_takes(generation, self.unexpanded, check_expanded)

    def begin(self, expanded: Sequence[list[int]], prompts: Sequence[Messages | str]) -> None:
        """Take the prompts of a generation batch, and their token ids as the processor expanded them."""
        self._unexpanded = {}
        for ids, prompt in zip(expanded, prompts, strict=True):
            if (key := tuple(ids)) not in self._unexpanded:
                self._unexpanded[key] = self._render(prompt) if embedded_images(prompt) else ids

    def unexpanded(self, ids: list[int]) -> list[int]:
        """A prompt of the batch with one placeholder per image; after a tool's answer, with the response so far."""
        whole = self._unexpanded.get(tuple(ids))
        if whole is not None:
            return whole
        for expanded, short in self._unexpanded.items():
            if tuple(ids[: len(expanded)]) == expanded:
                return [*short, *ids[len(expanded) :]]
        return ids


def check_expanded(expected: list[int], made: Sequence[int]) -> None:
    """Raise UserError where vLLM expanded a prompt to other tokens than the processor."""
    if list(made) != expected:
        raise UserError(
            f"use_vllm with vllm_mode = 'colocate': vLLM expands a prompt with images to {len(made)} tokens, but the "
            f"processor to {len(expected)} others (its image processor has other settings, or a tool returned an "
            "image): save the processor into the model's folder, or set vllm_mode = 'server' or use_vllm = false"
        )
