"""Packed scores and their gradients equal the plain ones for every family, and wrong layouts are noticed."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import IMAGE, SHARING, Batch, make_batch, make_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from trl.trainer.utils import add_fused_lm_head

from cppo.perception import ResponseScores
from cppo.policy import add_shared_prompt_forward, pack, plain_scores, slice_rows, unwrapped
from cppo.policy import packed as attention_module
from cppo.policy import shared_prompt_scores as packed_scores
from cppo.policy.packing import SharedPromptLayout
from cppo.policy.vision_inputs import model_images

MROPE_FAMILIES = [name for name in SHARING if name.startswith("qwen")]


def oracle(model: Any, batch: Batch) -> ResponseScores:
    """Plain scores of each row alone and without padding in front, which shifts RoPE's float32 tables."""
    end = batch.input_ids.shape[1] - batch.num_response_tokens
    scores = []
    for row in range(len(batch.input_ids)):
        start = int(end - batch.attention_mask[row, :end].sum())
        ids, mask = batch.input_ids[row : row + 1, start:], batch.attention_mask[row : row + 1, start:]
        vision = slice_rows(batch.vision, row, row + 1)
        if not (ids == IMAGE).any():
            vision = {}
        if "mm_token_type_ids" in vision:
            vision["mm_token_type_ids"] = vision["mm_token_type_ids"][:, start:]
        scores.append(plain_scores(model, ids, mask, batch.num_response_tokens, 0.7, vision))
    return ResponseScores(torch.cat([s.logps for s in scores]), torch.cat([s.entropies for s in scores]))


def loss_of(scores: ResponseScores, mask: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64).to(scores.logps.dtype) * mask
    return (scores.logps * weights[0]).sum() + (scores.entropies * weights[1]).sum()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    # Some gradients are zero up to rounding (a key's bias adds one number to all scores of a softmax).
    floor = 1e-3 * max(gradient.norm() for gradient in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).norm() <= tolerance * expected[name].norm().clamp(min=floor), name


def check_parity(model: Any, batch: Batch, value: float = 1e-9, gradient: float = 1e-6, **options: Any) -> None:
    """Scores, loss and gradients equal the oracle's."""
    mask = batch.response_mask
    expected = oracle(model, batch)
    expected_loss = loss_of(expected, mask)
    expected_loss.backward()
    expected_gradients = gradients(model)
    found = packed_scores(model, **batch.rows, groups=batch.groups(unwrapped(model).config), **options)
    torch.testing.assert_close(found.logps[mask], expected.logps[mask], rtol=value, atol=value)
    torch.testing.assert_close(found.entropies[mask], expected.entropies[mask], rtol=value, atol=value)
    assert not found.logps[~mask].any()
    assert not found.entropies[~mask].any()
    loss = loss_of(found, mask)
    torch.testing.assert_close(loss, expected_loss, rtol=value, atol=value)
    loss.backward()
    assert_same_gradients(gradients(model), expected_gradients, gradient)


def packed_model(family: str, **options: Any) -> Any:
    model = make_model(family, **options)
    add_shared_prompt_forward(model)
    return model


def test_every_family_scores_ragged_groups_as_the_oracle(family):
    check_parity(packed_model(family), make_batch(family))


@pytest.mark.parametrize("prompts", [(0, 3), (1,), (3,), (2,)], ids=["text-only", "pair", "one-token-prompt", "images"])
def test_batches_of_one_kind(family, prompts):
    check_parity(packed_model(family), make_batch(family, seed=1, prompts=prompts))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_float32(family):
    model = packed_model(family, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    batch = make_batch(family)
    batch.vision = {key: to_float32(value) for key, value in batch.vision.items()}
    check_parity(model, batch, value=3e-6, gradient=1e-5)


def to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def test_eager_attention(family):
    # Its softmax runs in float32 for any dtype of the model.
    check_parity(packed_model(family, attention="eager"), make_batch(family), value=5e-6, gradient=1e-5)


def test_gradient_checkpointing(family):
    model = packed_model(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    check_parity(model, make_batch(family))


@pytest.mark.parametrize("target", ["language_layers", "head"])
def test_lora(family, target):
    model = packed_model(family)
    pattern = "lm_head" if target == "head" else r".*(language_model|text_model)\..*(q_proj|v_proj|down_proj)"
    config = LoraConfig(r=2, target_modules=[pattern] if target == "head" else pattern, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    wrapped.double()
    check_parity(wrapped, make_batch(family))


def test_over_trl_fused_head():
    """TRL's head is patched in first and still works beside the packed forward."""
    model = make_model("qwen2_5_vl")
    add_fused_lm_head(model, 0.7, outputs=("log_probs", "entropy"))
    batch = make_batch("qwen2_5_vl")
    inputs = {key: value for key, value in batch.vision.items() if key != "num_images"}
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)

    def fused() -> Tensor:
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=labels,
            fused_lm_head=True,
            **inputs,
        ).log_probs

    before = fused()
    add_shared_prompt_forward(model)
    assert torch.equal(fused(), before)
    check_parity(model, batch)


def test_without_a_packed_batch_nothing_changes(family):
    """Forward and sampling give the same bits as before the patch."""
    model, patched = make_model(family), packed_model(family)
    batch = make_batch(family)
    for attribute in ("logps", "entropies"):
        scores = [plain_scores(each, **batch.rows, vision=batch.vision) for each in (model, patched)]
        assert torch.equal(*(getattr(each, attribute) for each in scores))
    end = batch.input_ids.shape[1] - batch.num_response_tokens
    inputs = model_images(model.config, batch.vision)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, :end]
    sampled = []
    for candidate in (model, patched):
        torch.manual_seed(3)
        sampled.append(
            candidate.generate(
                input_ids=batch.input_ids[:, :end],
                attention_mask=batch.attention_mask[:, :end],
                max_new_tokens=5,
                do_sample=True,
                suppress_tokens=[IMAGE, 91, 92, 93],
                **inputs,
            )
        )
    assert torch.equal(*sampled)


def test_a_saved_model_knows_nothing_of_the_patch(tmp_path):
    packed_model("llava").save_pretrained(tmp_path)
    assert "shared_prompt" not in (tmp_path / "config.json").read_text()


def test_the_packed_pass_really_runs_and_costs_what_it_should(family, monkeypatch):
    """Each prompt and image goes through the model once; attention grows as R x (P + R)."""
    model, batch = packed_model(family), make_batch(family)
    tokens, scores, images = [], [], []
    text = model.base_model.get_submodule("text_model" if hasattr(model.base_model, "text_model") else "language_model")
    text.layers[0].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[:2]))
    get_image_features = model.base_model.get_image_features

    def count_images(*args: Any, **kwargs: Any) -> Any:
        features = get_image_features(*args, **kwargs)
        images.append(sum(feature.reshape(-1, 32).shape[0] for feature in features.pooler_output))
        return features

    def count_scores(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scores.append(query.shape[0] * query.shape[2] * key.shape[2])
        return scaled_dot_product_attention(query, key, *args, **kwargs)

    monkeypatch.setattr(model.base_model, "get_image_features", count_images)
    monkeypatch.setattr(attention_module, "scaled_dot_product_attention", count_scores)
    groups = batch.groups(model.config)
    packed_scores(model, **batch.rows, groups=groups)

    end = batch.input_ids.shape[1] - batch.num_response_tokens
    prompts = [int(batch.attention_mask[group.rollouts[0], :end].sum()) - 1 for group in groups]
    lengths = batch.response_mask.sum(dim=1).clamp(min=1)
    assert len(groups) == 5
    assert len(batch.input_ids) == 10
    assert tokens == [(1, sum(prompts) + int(lengths.sum()))]
    assert images == [sum(int((batch.input_ids[group.rollouts[0]] == IMAGE).sum()) for group in groups)]
    longest, rollouts = max(prompts), len(batch.input_ids)
    expected = 5 * longest**2 + rollouts * int(lengths.max()) * (longest + int(lengths.max()))
    assert scores == [5 * longest**2, expected - 5 * longest**2] * 2


def test_controls_a_mask_off_by_one_is_noticed(family, monkeypatch):
    model, batch = packed_model(family), make_batch(family)
    right = SharedPromptLayout.bias

    def shifted(layout: SharedPromptLayout, dtype: torch.dtype) -> Tensor:
        bias = right(layout, dtype).clone()
        own = layout.segments.shape[1]
        bias[..., -own:] = torch.full((own, own), float("-inf"), dtype=dtype).triu(2)
        return bias

    monkeypatch.setattr(SharedPromptLayout, "bias", shifted)
    with pytest.raises(AssertionError):
        check_parity(model, batch, value=1e-3)


def test_controls_a_rollout_that_sees_another_prompt_is_noticed(family, monkeypatch):
    model, batch = packed_model(family), make_batch(family)
    make = SharedPromptLayout.of

    def crossed(prompts: Any, segments: Any, owners: Any, device: Any) -> SharedPromptLayout:
        layout = make(prompts, segments, owners, device)
        return dataclasses.replace(layout, prompt_of_segment=layout.prompt_of_segment.roll(1))

    monkeypatch.setattr(SharedPromptLayout, "of", crossed)
    with pytest.raises(AssertionError):
        check_parity(model, batch, value=1e-3)


def test_controls_segments_numbered_on_from_the_rows_end_are_noticed(family):
    model, packed = packed_anchor(family)
    row = packed.passes[0]
    check_positions_matter(model, packed, torch.arange(row.layout.num_tokens).expand_as(row.position_ids))


@pytest.mark.parametrize("family", MROPE_FAMILIES)
def test_controls_positions_counted_by_tokens_are_noticed(family):
    """An image takes fewer positions than it has tokens."""
    model, packed = packed_anchor(family)
    row = packed.passes[0]
    counted = [torch.arange(int(b - a)) for a, b in itertools.pairwise(row.layout.cu_seqlens_q)]
    owners = row.layout.prompt_of_segment.tolist()
    for segment, owner in enumerate(owners, start=len(counted) - len(owners)):
        counted[segment] += len(counted[owner])
    check_positions_matter(model, packed, torch.cat(counted).expand_as(row.position_ids))


def packed_anchor(family: str) -> tuple[Any, Any]:
    model, batch = packed_model(family), make_batch(family)
    groups = batch.groups(model.config)
    ids, mask = batch.input_ids, batch.attention_mask
    return model, pack(model, ids, mask, batch.num_response_tokens, {"anchor": groups})


def check_positions_matter(model: Any, packed: Any, positions: Tensor) -> None:
    """Other positions than the packed row's give other log-probabilities."""
    changed = dataclasses.replace(packed, passes=(dataclasses.replace(packed.passes[0], position_ids=positions),))
    right, wrong = (packed.unpack(packed.tokens["anchor"], run(model, batch)) for batch in (packed, changed))
    assert (right - wrong).abs().max() > 1e-3


def run(model: Any, packed: Any) -> Tensor:
    def readout(hidden, head):
        return {"logps": head.scores(hidden, packed.targets)[0]}

    return model(shared_prompt=packed, readout=readout)["logps"]
