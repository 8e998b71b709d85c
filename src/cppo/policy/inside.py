"""Views inside the model: the pixels stay the same or are not needed, and the model sees less of them.

Such a view is an entry of `VisionInputs`, named in `INSIDE_KEYS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cppo.errors import UserError

TEXT, MASKED, REPLACED = INSIDE_KEYS = ("inside_text", "inside_masked", "inside_replaced")
"""Entries of a prompt's image inputs, on the host, int64 [P'] or bool [P]: the prompt's tokens without images; the
tokens that no other token sees; the tokens with replaced values.
"""
DEVIATIONS = 2.0
"""Standard deviations above the mean from which an image token's attention is an outlier (CFPO, arXiv 2606.23206)."""


def inside_view(name: str, prompt: Sequence[int], images: Tensor, text: Sequence[int] = ()) -> dict[str, Tensor]:
    """A view of one prompt, as an entry of its image inputs.

    Args:
        name: "image_removed": the prompt is `text`, the chat without its images and the tokens around them.
            "attention_masked": no token sees an image token, in any layer; every token keeps its position, and the
            tokens around the images stay (PGPO, arXiv 2604.01840). "values_replaced": see `ReplacedValues`.
        prompt: its tokens.
        images: which of them belong to an image, bool [P].
        text: the tokens of the prompt without images.

    Raises:
        UserError: the prompt ends with an image, so the response would begin at a token that nothing sees.
    """
    if name == "image_removed":
        return {TEXT: torch.tensor(list(text))}
    if bool(images[-1]):
        raise UserError(f"removing_views = ['{name}']: a prompt ends with an image; add text after it")
    return {MASKED if name == "attention_masked" else REPLACED: images}


def seen_prompt(
    prompt: Tensor, positions: Tensor, vision: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """The part of a prompt that the model runs, under a view inside the model if there is one.

    Args:
        prompt: token ids, [P].
        positions: of its tokens, [P], or [3, P] for M-RoPE.
        vision: its image inputs.

    Returns:
        Ids and positions of the tokens to run, the position after the prompt, and the image inputs.
    """
    following = positions.max() + 1
    if TEXT in vision:
        text = vision[TEXT].to(prompt.device)
        places = torch.arange(len(text))
        return text, places.expand(*positions.shape[:-1], -1), torch.tensor(len(text)), {}
    if MASKED in vision:
        kept = (~vision[MASKED]).nonzero().squeeze(1)
        return prompt[kept.to(prompt.device)], positions[..., kept], following, {}
    return prompt, positions, following, {key: value for key, value in vision.items() if key != REPLACED}


@dataclass(frozen=True)
class ReplacedValues:
    """The values that attention replaces in a pass: those of the image tokens that the prompt attends to most.

    In each layer, an image token's attention is the mean that it gets from the prompt's text, over heads and text
    tokens. An outlier is more than two (population) standard deviations above the mean of the prompt's image tokens. In
    each head it gets the mean of their values (CFPO, arXiv 2606.23206). Ours, because no code was found: the text is
    the prompt's without its last token. So no token depends on a later one, and a group's rollouts share the replaced
    values. No gradient flows through the choice.

    Attributes:
        prompts: per prompt: its row, its start, and which of its tokens, except the last, belong to an image, bool [P -
            1].
    """

    prompts: tuple[tuple[int, int, Tensor], ...]

    def of(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """The values of a layer, [B, key heads, N, D], with outliers replaced.

        query: [B, heads, N, D]; key: as the values. scaling: of the attention scores; None for 1 / sqrt(D).
        """
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        replaced = value.clone()
        for row, start, images in self.prompts:
            end = start + len(images)
            images = images.to(value.device)
            seen = _attention_to_images(query[row, :, start:end], key[row, :, start:end], images, scaling)
            own = value[row, :, start:end][:, images]
            stands_out = seen > seen.mean() + DEVIATIONS * seen.std(correction=0)
            mean = own.mean(dim=1, keepdim=True).expand_as(own)
            replaced[row, :, start + images.nonzero().squeeze(1)] = torch.where(stands_out[:, None], mean, own)
        return replaced


@torch.no_grad()
def _attention_to_images(query: Tensor, key: Tensor, images: Tensor, scaling: float) -> Tensor:
    """The mean attention that each image token of a prompt gets from its text tokens, over text tokens and heads, [n].

    query: [heads, P, D]; key: [key heads, P, D]; images: bool [P]. Without text the result is 0.
    """
    texts = (~images).nonzero().squeeze(1)
    if not len(texts):
        return query.new_zeros(int(images.sum()))
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    scores = query[:, texts] @ key.transpose(1, 2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    later = torch.arange(len(images), device=images.device) > texts[:, None]
    return scores.masked_fill(later, float("-inf")).softmax(dim=-1)[:, :, images].mean(dim=(0, 1))
