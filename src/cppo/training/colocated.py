"""Prompts for vLLM on the training GPUs, which expands an image's placeholder by itself.

TRL 1.16 gives it prompts that the processor has expanded, and the images too, so that it would expand them once more. A
vLLM server gets expanded prompts rightly: TRL tells it where the images lie.
"""

from collections.abc import Callable, Sequence
from typing import Any

from cppo.errors import UserError
from cppo.messages import Messages, embedded_images
from cppo.trl_surface import vllm_takes


class ColocatedPrompts:
    """Lets colocated vLLM take each prompt with one placeholder an image.

    It then expands the prompt as the processor has done, or the rollout is refused: it would answer another prompt than
    the one that is trained on.

    Args:
        generation: TRL's link to vLLM.
        render: the token ids of a prompt with one placeholder an image.
    """

    def __init__(self, generation: Any, render: Callable[[Messages | str], list[int]]) -> None:
        self._render = render
        self._unexpanded: dict[tuple[int, ...], list[int]] = {}
        vllm_takes(generation, self.unexpanded, check_expanded)

    def begin(self, expanded: Sequence[list[int]], prompts: Sequence[Messages | str]) -> None:
        """Take the prompts of a generation batch, and their token ids as the processor has expanded them."""
        self._unexpanded = {}
        for ids, prompt in zip(expanded, prompts, strict=True):
            if (key := tuple(ids)) not in self._unexpanded:
                self._unexpanded[key] = self._render(prompt) if embedded_images(prompt) else ids

    def unexpanded(self, ids: list[int]) -> list[int]:
        """A prompt of the batch with one placeholder an image; after a tool's answer the response so far follows it."""
        whole = self._unexpanded.get(tuple(ids))
        if whole is not None:
            return whole
        for expanded, short in self._unexpanded.items():
            if tuple(ids[: len(expanded)]) == expanded:
                return [*short, *ids[len(expanded) :]]
        return ids


def check_expanded(expected: list[int], made: Sequence[int]) -> None:
    """Raise UserError where vLLM has made other tokens of a prompt than the processor."""
    if list(made) != expected:
        raise UserError(
            f"use_vllm with vllm_mode = 'colocate': vLLM makes {len(made)} tokens of a prompt with images of which the "
            f"processor makes {len(expected)} others (its image processor has other settings, or a tool returned an "
            "image): save the processor into the model's folder, or set vllm_mode = 'server' or use_vllm = false"
        )
