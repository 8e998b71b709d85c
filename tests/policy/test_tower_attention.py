"""A vision tower with one attention call per layer against transformers' own calls, one per window."""

import pytest
import torch
from test_packed_layout import VARLEN, varlen_reference
from tiny_models import SHARING, in_patches, make_model

from cppo.policy import vision_tower as tower_module
from cppo.policy.vision_tower import AT_ONCE, attend_at_once

GRID = torch.tensor([[1, 8, 12], [1, 4, 4], [1, 6, 4]])
"""With a window of 8 x 8 pixels, 2 x 2 patches of 4: 24 + 4 + 6 windows."""


def said_by(tower, pixels):
    """The tower's output for three images, and the gradients of a random sum of it."""
    outputs = tower(pixels, grid_thw=GRID)
    found = [outputs.last_hidden_state, outputs.pooler_output]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(values.shape, generator=generator, dtype=values.dtype) for values in found]
    total = sum((values * weight).sum() for values, weight in zip(found, weights, strict=True))
    return found, torch.autograd.grad(total, [*tower.parameters(), pixels], allow_unused=True)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("kernel", ["varlen", "sdpa"])
@pytest.mark.parametrize("family", [family for family in SHARING if in_patches(family)])
def test_one_call_per_layer_gives_the_same_output(family, kernel, checkpointing, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(int(GRID.prod(dim=1).sum()), 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64)
    pixels.requires_grad_()
    expected = said_by(make_model(family).model.visual, pixels)
    calls = []
    if kernel == "varlen":
        monkeypatch.setattr(
            VARLEN, lambda *tensors, **options: calls.append(0) or varlen_reference(*tensors, **options)
        )
        monkeypatch.setattr(tower_module, "no_varlen_reason", lambda *query: None)
    model = make_model(family)
    attend_at_once(model)
    attend_at_once(model)
    tower = model.model.visual
    assert tower.config._attn_implementation == AT_ONCE
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    found = said_by(tower, pixels)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    layers = len(tower.blocks) * (1 + checkpointing)
    assert len(calls) == (layers if kernel == "varlen" else 0)


@pytest.mark.parametrize("family", [family for family in SHARING if not in_patches(family)])
def test_towers_without_windows_stay_as_they_are(family):
    model = make_model(family)
    attend_at_once(model)
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_a_tower_whose_attention_was_chosen_stays_as_it_is():
    model = make_model("qwen2_5_vl", attention="eager")
    attend_at_once(model)
    assert model.model.visual.config._attn_implementation == "eager"
