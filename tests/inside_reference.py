"""Views inside the model told in other ways than the package's: a 4-D mask, and an attention that keeps all weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface


def hidden_images(model: Any, input_ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """The mask [1, 1, N, N] under which no token of one row sees an image token but this itself, and its positions."""
    images, size = input_ids[0] == model.config.image_token_id, input_ids.shape[1]
    seen = torch.ones(size, size, dtype=torch.bool).tril() & (~images | torch.eye(size, dtype=torch.bool))
    hidden = {"attention_mask": torch.zeros(1, 1, size, size, dtype=model.dtype).masked_fill(~seen, -1e30)}
    rope = getattr(model.base_model, "get_rope_index", None)
    if rope is not None and "image_grid_thw" in inputs:
        types, grid = inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        hidden["position_ids"] = rope(input_ids=input_ids, mm_token_type_ids=types, image_grid_thw=grid)[0]
    return hidden


@contextmanager
def replaced_values(model: Any, images: Tensor, deviations: float = 2.0) -> Iterator[list[int]]:
    """Within this context the text part attends, in one row, with values replaced as CFPO does; a place at a time.

    Args:
        images: which tokens of the prompt stand for an image, bool [P].
        deviations: how far attention stands out.

    Yields:
        How many values were replaced in each layer so far.
    """
    config, counts = model.config.get_text_config(), list[int]()
    before = config._attn_implementation
    places = images.nonzero().flatten().tolist()
    texts = [place for place in range(len(images) - 1) if place not in places]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
        heads, size = query.shape[1], query.shape[2]
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        seen = torch.ones(size, size, dtype=torch.bool).tril()
        weights = (query @ key.mT * given["scaling"]).masked_fill(~seen, -torch.inf).softmax(-1)
        if places:
            attention = torch.stack([weights[0, :, texts, place].mean() for place in places])
            bound = attention.mean() + deviations * attention.var(correction=0).sqrt()
            chosen = {place for place, one in zip(places, attention, strict=True) if one > bound}
            middle = value[:, :, places].mean(dim=2)
            new = [middle if place in chosen else value[:, :, place] for place in range(size)]
            value = torch.stack(new, dim=2)
            counts.append(len(chosen))
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("reference", attend)
    config._attn_implementation = "reference"
    try:
        yield counts
    finally:
        config._attn_implementation = before
