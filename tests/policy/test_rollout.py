"""Generation that prefills each prompt and image once per group equals plain generation, and really shares."""

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from tiny_models import PAD, make_batch, make_config, make_model
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from cppo.policy import add_shared_prompt_forward, shared_generation, unwrapped
from cppo.policy import rollout as rollout_module
from cppo.policy.vision_inputs import model_images

GROUPS, ROWS = 5, 10
"""Of the batch from `make_batch`: groups of 1, 2 and 3 rows, in mixed order; prompts with 0, 1 and 2 images."""


def generate_inputs(family: str, **options: Any) -> dict[str, Tensor]:
    """The left-padded prompts of a batch as the trainer passes them to `generate`."""
    batch = make_batch(family, **options)
    end = batch.input_ids.shape[1] - batch.num_response_tokens
    vision = model_images(make_config(family), batch.vision)
    if "mm_token_type_ids" in vision:
        vision["mm_token_type_ids"] = vision["mm_token_type_ids"][:, :end]
    return {"input_ids": batch.input_ids[:, :end], "attention_mask": batch.attention_mask[:, :end], **vision}


def group_ids(inputs: dict[str, Tensor]) -> list[int]:
    """For each row the first one with the same tokens, which has the same images."""
    rows = inputs["input_ids"].tolist()
    return [rows.index(row) for row in rows]


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Six tokens per row with their logits, from one seed."""
    given = {"do_sample": True, "temperature": 0.9, "max_new_tokens": 6, "pad_token_id": PAD, **options}
    config = GenerationConfig(output_logits=True, return_dict_in_generate=True, **given)
    torch.manual_seed(7)
    with torch.no_grad():
        return model.generate(**inputs, generation_config=config)


def check_equal(
    model: Any, inputs: dict[str, Tensor], tolerance: float = 1e-9, groups: list[int] | None = None, **options: Any
) -> Tensor:
    """Tokens and logits with shared prefill equal the plain ones; the tokens, [B, T]."""
    expected = generate(model, inputs, **options)
    groups = group_ids(inputs) if groups is None else groups
    with shared_generation(unwrapped(model), groups, GenerationConfig(**options)):
        found = generate(model, inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    return found.sequences[:, inputs["input_ids"].shape[1] :]


def sizes_seen(module: torch.nn.Module) -> list[int]:
    """First dimension of the input of each call of a module, in order."""
    seen: list[int] = []
    module.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    return seen


def text_rows_seen(model: Any) -> list[int]:
    """Number of rows in each call of the text model."""
    return sizes_seen(unwrapped(model).get_decoder().layers[0])


def images_seen(model: Any) -> list[int]:
    """Patches (Qwen) or images in each call of the vision tower's first convolution."""
    return sizes_seen(next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)))


def test_greedy_tokens_of_every_family_are_the_plain_ones(family):
    completions = check_equal(make_model(family), generate_inputs(family), do_sample=False)
    assert len({tuple(row) for row in completions.tolist()}) == GROUPS


def test_one_seed_draws_the_plain_samples(family):
    completions = check_equal(make_model(family), generate_inputs(family))
    assert len({tuple(row) for row in completions.tolist()}) == ROWS


@pytest.mark.parametrize(
    "prompts",
    [(0, 3), (1, 4), (2,), (1, 2, 0)],
    ids=["text-only", "ragged images", "unpadded pair", "as many images as rows"],
)
def test_batches_of_one_kind(family, prompts):
    check_equal(make_model(family), generate_inputs(family, seed=1, prompts=prompts))


def test_each_prompt_and_image_once_a_group(family):
    model, inputs = make_model(family), generate_inputs(family)
    rows, images = text_rows_seen(model), images_seen(model)
    generate(model, inputs)
    plain_images = sum(images)
    assert rows == [ROWS] * 6
    rows.clear()
    images.clear()
    with shared_generation(model, group_ids(inputs)):
        generate(model, inputs)
    assert rows == [GROUPS] + [ROWS] * 5
    # The prompts with 1, 2 and 1 images have 3, 2 and 2 rows; an image has 16 patches, a second one 32. A single image
    # of LLaVA-OneVision has a tile too.
    expected = (80, 176) if family.startswith("qwen") else (6, 14) if family == "llava_onevision" else (4, 9)
    assert (sum(images), plain_images) == expected


def test_equal_words_about_other_images_are_not_shared(family):
    model = make_model(family)
    one, other = (generate_inputs(family, prompts=(1,), view=view) for view in (0, 1))
    inputs = {key: torch.cat([one[key], other[key]]) for key in one}
    groups = [number // len(one["input_ids"]) for number in range(len(inputs["input_ids"]))]
    completions = check_equal(model, inputs, do_sample=False, groups=groups)
    assert len({tuple(row) for row in completions.tolist()}) == 2
    rows = text_rows_seen(model)
    with shared_generation(model, groups):
        generate(model, inputs)
    assert rows[0] == 2


def test_a_group_of_other_images_is_noticed(family):
    """The comparison above fails where rows of one group show other images."""
    one, other = (generate_inputs(family, prompts=(1,), view=view) for view in (0, 1))
    inputs = {key: torch.cat([one[key], other[key]]) for key in one}
    with pytest.raises(AssertionError):
        check_equal(make_model(family), inputs, groups=[0] * len(inputs["input_ids"]))


def test_rows_with_other_tokens_than_their_group_are_prefilled_alone(family):
    inputs = generate_inputs(family)
    check_equal(make_model(family), inputs, groups=[0] * ROWS)


def test_rows_of_an_unexpected_number_share_nothing(family):
    model, inputs = make_model(family), generate_inputs(family)
    expected, rows = generate(model, inputs), text_rows_seen(model)
    with shared_generation(model, [0] * (ROWS - 1)):
        found = generate(model, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert rows[0] == ROWS


def test_suppressed_tokens_are_never_said(family):
    model, inputs = make_model(family), generate_inputs(family)
    said = sorted(set(check_equal(model, inputs).flatten().tolist()))
    banned = said[::2]
    assert not set(check_equal(model, inputs, suppress_tokens=banned).flatten().tolist()) & set(banned) - {PAD}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_in_training(family, checkpointing):
    """Checkpointing stops transformers from caching; then rollouts are slow, but equal."""
    model = make_model(family).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    check_equal(model, generate_inputs(family))


def test_beside_the_packed_forward_and_inside_peft(family):
    model = make_model(family)
    add_shared_prompt_forward(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).double()
    rows = text_rows_seen(adapted)
    check_equal(adapted, generate_inputs(family))
    assert rows == [ROWS] * 6 + [GROUPS] + [ROWS] * 5


def test_eager_attention_in_float32(family):
    inputs = {
        key: value.float() if value.is_floating_point() else value for key, value in generate_inputs(family).items()
    }
    model = make_model(family, attention="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    check_equal(model, inputs, tolerance=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True},
        pytest.param(
            {"prefill_chunk_size": 5},
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.20"),
                reason="transformers itself fails: it cuts the positions of M-RoPE by rows",
            ),
        ),
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
def test_other_ways_to_generate(options):
    check_equal(make_model("qwen2_5_vl"), generate_inputs("qwen2_5_vl"), **options)


def an_offloading_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.offloading = True
    return cache


def a_filled_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4), 0)
    return cache


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"pixel_values": torch.ones(2, 4), "use_cache": True, "output_attentions": False}, True),
        ({"past_key_values": None}, False),
        ({"past_key_values": a_filled_cache()}, False),
        ({"past_key_values": an_offloading_cache()}, False),
        ({"past_key_values": type("Other", (DynamicCache,), {})()}, False),
        ({"input_ids": None}, False),
        ({"input_ids": torch.ones(1, 3)}, False),
        ({"position_ids": None}, False),
        ({"output_hidden_states": True}, False),
        ({"output_attentions": True}, False),
        ({"inputs_embeds": torch.ones(2, 3, 4)}, False),
        ({"mm_encoder_outputs": {}}, False),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else str(value),
)
def test_which_calls_are_a_prefill_of_tokens_and_images_alone(changes, expected):
    """Other inputs of a call may differ from row to row, or request outputs for each row."""
    call = {"past_key_values": DynamicCache(), "input_ids": torch.ones(2, 3), "position_ids": torch.ones(3, 2, 3)}
    assert rollout_module._is_prefill(make_config("qwen2_vl"), {**call, **changes}) is expected


@pytest.mark.parametrize("prompts", [(0, 1, 2), (0, 3), (2,)], ids=["ragged images", "text-only", "pairs"])
def test_slices_answer_as_the_whole_batch(family, prompts):
    model, inputs = make_model(family), generate_inputs(family, prompts=prompts)
    total = len(inputs["input_ids"])
    config = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=PAD)
    said = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    config.eos_token_id = int(said[0, 2])  # rows and slices end at different times
    expected = model.generate(**inputs, generation_config=config)
    rows = text_rows_seen(model)
    for size, calls in ((None, {total}), (total, {total}), (2, {2, total % 2} - {0}), (1, {1})):
        rows.clear()
        with shared_generation(model, None, config, size):
            assert torch.equal(model.generate(**inputs, generation_config=config), expected)
        assert set(rows) == calls
        with shared_generation(model, group_ids(inputs), config, size):
            assert torch.equal(model.generate(**inputs, generation_config=config), expected)
    assert "generate" not in vars(model)


def test_slices_inside_peft():
    model, inputs = make_model("qwen2_5_vl"), generate_inputs("qwen2_5_vl")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).double()
    config = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=PAD)
    expected, rows = adapted.generate(**inputs, generation_config=config), text_rows_seen(adapted)
    with shared_generation(unwrapped(adapted), None, config, 4):
        assert torch.equal(adapted.generate(**inputs, generation_config=config), expected)
    assert set(rows) == {4, ROWS % 4}


def test_after_the_context_the_model_is_as_before(family):
    model = make_model(family)
    with pytest.raises(ZeroDivisionError), shared_generation(model, [0]):
        raise ZeroDivisionError
    assert not {"forward", "generate"} & set(vars(model))
    add_shared_prompt_forward(model)
    forward = model.forward
    with shared_generation(model, [0]):
        assert model.forward is not forward
    assert model.forward is forward


def test_distinct_prompts_run_as_they_are(family):
    model, inputs = make_model(family), generate_inputs(family, prompts=(0, 3))
    inputs = {key: value[:2] for key, value in inputs.items()}
    assert not torch.equal(*inputs["input_ids"])
    check_equal(model, inputs)
