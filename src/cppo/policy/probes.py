"""Probes of the parts of transformers that share prompts and images; each runs a tiny model of the family."""

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from cppo.policy.families import Sizes, text_part, tiny_config
from cppo.policy.packed import add_shared_prompt_forward
from cppo.policy.packing import prompt_groups
from cppo.policy.rollout import shared_generation
from cppo.policy.scorer import plain_scores, shared_prompt_scores
from cppo.policy.vision_tower import AT_ONCE, attend_at_once
from cppo.probing import expect

TOLERANCE = 1e-4
"""Largest float32 difference, in nats."""

PROMPTS = ((5, 6, 7), (8, 9, 10), (5, 6, 7))
"""Token ids of three rows; two are equal."""
GROUPS = (0, 1, 0)
PATCH = 4
PATCH_VALUES = 3 * 2 * PATCH**2
"""Numbers per patch in the tower for patches: colours, two moments, pixels."""


@torch.no_grad()
def probe_shared_prefill(model_type: str) -> None:
    """Raise unless `generate` runs equal prompts once and gives the same answers as without sharing."""
    model, rows = deepcopy(_tiny_model(model_type, "sdpa")), list[int]()
    ids = torch.tensor(PROMPTS)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=2, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    asked: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "generation_config": config,
    }
    plain = model.generate(**asked)
    model.get_output_embeddings().register_forward_hook(lambda head, inputs, output: rows.append(len(output)))
    with shared_generation(model, GROUPS, config):
        shared = model.generate(**asked)
    expect(rows[:2] == [2, 3], f"`generate` ran {rows[:2]} rows instead of 2 prompts and then 3 rollouts")
    far = [not torch.allclose(a, b, rtol=0, atol=TOLERANCE) for a, b in zip(plain.logits, shared.logits, strict=True)]
    expect(not any(far), "`generate` gives other answers when prompts are shared")


@torch.no_grad()
def probe_packed_attention(model_type: str, attention: str) -> None:
    """Raise unless packed rows get the same scores as plain rows.

    attention: "eager", or "sdpa", which covers everything that a registered function computes.
    """
    model = deepcopy(_tiny_model(model_type, attention))
    ids = torch.tensor(PROMPTS)
    asked: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "num_response_tokens": 2,
        "temperature": 1.0,
    }
    plain = plain_scores(model, **asked, vision={})
    add_shared_prompt_forward(model)
    packed = shared_prompt_scores(model, **asked, groups=prompt_groups(GROUPS, [{}, {}, {}]))
    difference = (plain.logps - packed.logps).abs().max().item()
    expect(difference <= TOLERANCE, f"packed rows and plain rows have scores that differ by {difference:.2g} nats")


@torch.no_grad()
def probe_tower_attention(model_type: str) -> None:
    """Raise unless a vision tower gives the same output with one attention call per layer."""
    model = deepcopy(_tiny_model(model_type, "sdpa"))
    grid = torch.tensor([[1, 8, 4], [1, 4, 4]])
    tower, patches = model.get_encoder(modality="image"), int(grid.prod(dim=1).sum())
    pixels = torch.linspace(-1, 1, patches * PATCH_VALUES).sin().reshape(patches, PATCH_VALUES)
    expected = tower(pixels, grid_thw=grid).last_hidden_state
    attend_at_once(model)
    expect(tower.config._attn_implementation == AT_ONCE, "the vision tower keeps the name of its attention elsewhere")
    found = tower(pixels, grid_thw=grid).last_hidden_state
    difference = (found - expected).abs().max().item()
    expect(difference <= TOLERANCE, f"a vision tower with one attention call per layer differs by {difference:.2g}")


@cache
def _tiny_model(model_type: str, attention: str) -> Any:
    """One layer of a family's text part and of its vision tower; the weights let tokens see one another."""
    text = text_part(1, vocab_size=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    tokens = {"image": 20, "video": 21, "start": 22, "end": 23}
    config = tiny_config(model_type, Sizes(text, tokens, layers=1, patch=PATCH, side=2 * PATCH))
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()
