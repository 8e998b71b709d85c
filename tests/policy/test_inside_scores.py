"""Views inside the model: packed and plain scores and gradients equal those of a reference with other means.

The reference runs each row alone: with its images under a 4-D mask that hides their tokens, as the text-only prompt, or
with its images under an attention that keeps all weights and replaces values.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from inside_reference import hidden_images, replaced_values
from test_packed_parity import assert_same_gradients, gradients
from tiny_models import IMAGE, VISION_END, VISION_START, make_batch, make_model
from torch import Tensor

from cppo.errors import UserError
from cppo.policy import add_shared_prompt_forward, inside, plain_scores, shared_prompt_scores, slice_rows
from cppo.policy.inside import ReplacedValues, inside_view
from cppo.policy.inside_rows import rows_inside
from cppo.policy.packing import PromptGroup
from cppo.policy.similarity import is_image
from cppo.policy.vision_inputs import model_images

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "idefics3", "internvl")
BOUND = 1.0
"""Deviations: none of an image's four tokens can be two above their mean."""
REPLACED_COUNTS: list[int] = []
"""Number of values that the reference replaced, in each layer of each row."""
VIEWS = ("image_removed", "attention_masked", "values_replaced")


def prompt_of(batch: Any, row: int) -> list[int]:
    end = batch.input_ids.shape[1] - batch.num_response_tokens
    return batch.input_ids[row, :end][batch.attention_mask[row, :end].bool()].tolist()


def view_of(model: Any, batch: Any, row: int, name: str) -> dict[str, Any]:
    """The view of a row, as the trainer makes it; None for a row without images."""
    prompt = prompt_of(batch, row)
    if IMAGE not in prompt:
        return {}
    text = [token for token in prompt if token not in (IMAGE, VISION_START, VISION_END)]
    return inside_view(name, prompt, is_image(model, torch.tensor(prompt)), text)


def packed(model: Any, batch: Any, name: str) -> Any:
    groups = [
        PromptGroup(group.rollouts, {**group.vision, **view_of(model, batch, group.rollouts[0], name)})
        for group in batch.groups(model.config)
    ]
    return shared_prompt_scores(model, **batch.rows, groups=groups)


def plain(model: Any, batch: Any, name: str) -> Any:
    rows = range(len(batch.input_ids))
    parts = [{**slice_rows(batch.vision, row, row + 1), **view_of(model, batch, row, name)} for row in rows]
    ids, mask, vision, more = rows_inside(
        model, batch.input_ids, batch.attention_mask, batch.num_response_tokens, parts
    )
    return plain_scores(model, ids, mask, batch.num_response_tokens, 0.7, vision, more_inputs=more)


def reference(model: Any, batch: Any, name: str) -> Tensor:
    """Log-probabilities of each row, run alone without padding in front, [B, T]."""
    length, found = batch.num_response_tokens, []
    for row in range(len(batch.input_ids)):
        prompt, response = prompt_of(batch, row), batch.input_ids[row, -length:].tolist()
        vision = slice_rows(batch.vision, row, row + 1) if IMAGE in prompt else {}
        if name == "image_removed":
            prompt = [token for token in prompt if token not in (IMAGE, VISION_START, VISION_END)]
            vision = {}
        ids = torch.tensor([prompt + response])
        inputs = model_images(model.config, vision)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name == "attention_masked":
            inputs |= hidden_images(model, **inputs)
        images = ids[0, : len(prompt)] == IMAGE
        with replaced_values(model, images, BOUND) if name == "values_replaced" else nullcontext(()) as counts:
            logits = model(use_cache=False, **inputs).logits / 0.7
            REPLACED_COUNTS.extend(counts)
        logps = logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        found.append(logps.gather(-1, torch.tensor(response)[:, None]).squeeze(-1))
    return torch.stack(found)


def scores_and_gradients(model: Any, logps: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask
    (logps.masked_fill(~mask, 0.0) * weights).sum().backward()
    return logps.detach()[mask], gradients(model)


def reached(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that are not zero: where no image runs, a vision tower has zeros or none."""
    return {name: gradient for name, gradient in found.items() if gradient.any()}


def families_model(family: str) -> Any:
    model = make_model(family)
    add_shared_prompt_forward(model)
    return model


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_plain_and_reference_agree(family, name, monkeypatch):
    monkeypatch.setattr(inside, "DEVIATIONS", BOUND)
    REPLACED_COUNTS.clear()
    model, batch = families_model(family), make_batch(family, prompts=(1, 0, 2, 4))
    mask = batch.response_mask
    expected, expected_gradients = scores_and_gradients(model, reference(model, batch, name), mask)
    assert sum(REPLACED_COUNTS) > 10 or name != "values_replaced"
    # Padding in front, as in plain rows, shifts RoPE's float32 tables.
    for scorer, value, gradient in ((packed, 1e-9, 1e-6), (plain, 1e-5, 1e-4)):
        found, found_gradients = scores_and_gradients(model, scorer(model, batch, name).logps, mask)
        torch.testing.assert_close(found, expected, rtol=value, atol=value)
        assert_same_gradients(reached(found_gradients), reached(expected_gradients), gradient)


def test_outlier_values_become_the_mean():
    """Of six image tokens all text attends to one: it is sqrt(5) deviations above the mean of six."""
    images = torch.tensor([True] * 6 + [False])
    key, value = torch.zeros(1, 1, 9, 2), torch.arange(18.0).view(1, 1, 9, 2)
    query = torch.ones(1, 2, 9, 2)
    key[0, 0, 1 + 3] = 50.0
    replaced = ReplacedValues(((0, 1, images),)).of(query, key, value, None)
    expected = value.clone()
    expected[0, 0, 4] = value[0, 0, 1:7].mean(dim=0)
    assert torch.equal(replaced, expected)
    assert torch.equal(ReplacedValues(((0, 1, images[:6]),)).of(query, key, value, None), value)  # no text attends


def test_a_prompt_that_ends_with_an_image_is_refused():
    with pytest.raises(UserError, match="a prompt ends with an image; add text after it"):
        inside_view("attention_masked", [5, IMAGE], torch.tensor([False, True]))
