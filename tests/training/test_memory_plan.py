"""The arithmetic of `cppo plan`, against counted bytes of real micro-batches and sizes of real tensors."""

import copy
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from pixel_moves import PixelMoves
from policy.tiny_models import IMAGE_TOKENS, SHARING, SIDES, make_config
from published_shapes import END, IMAGE, START, THREE_B, qwen, sizes, tower
from rollout_stubs import generation_batch, make_rows
from safetensors import safe_open
from transformers import AttentionInterface, AutoModelForImageTextToText, DynamicCache

from cppo.assets import MICRO_DIR
from cppo.errors import UserError
from cppo.policy import (
    PromptGroup,
    add_shared_prompt_forward,
    leave_out_frozen_tower,
    pack,
    packed,
    vision_tower_parameters,
)
from cppo.probing import failure
from cppo.runs.activation_plan import activations, lora_weights
from cppo.runs.adapters import language_model_layers
from cppo.runs.memory_plan import key_value_bytes, largest, largest_micro_batch, largest_slice, need
from cppo.runs.memory_work import DDP, FSDP2, LORA, WAYS, ZERO3, Way, Work
from cppo.runs.model_shapes import read_shapes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT, RESPONSE = 9, 7
WORK = Work(1, 80, 64, 64, 4, 8, 8, 8, 8, views=2, lora_r=4)
HALF_WEIGHTS = Way("bfloat16")


SHALLOW = qwen(sizes(256, 704, 6, 4, 2, 2048), tower(64, 160, 3, 4, 8), tied=True)
DEEP = qwen(sizes(192, 512, 8, 6, 2, 1000), tower(96, 256, 4, 4, 8), tied=False)


@pytest.fixture(scope="module")
def shapes_of(tmp_path_factory):
    def read(config: Any) -> Any:
        folder = tmp_path_factory.mktemp("model")
        config.save_pretrained(folder)
        return read_shapes(str(folder))

    return read


class KeptLikeFlash(torch.autograd.Function):
    """Keeps what flash attention keeps (queries, keys, values, outputs, one number per head), computes nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        outputs, sums = torch.zeros_like(query), torch.zeros(query.shape[:2])
        ctx.save_for_backward(query, key, value, outputs, sums)
        return outputs

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors[:3])


def tower_attention(module, query, key, value, attention_mask, **kwargs):
    """One call for all windows, as flash attention takes them."""
    return KeptLikeFlash.apply(*(tensor[0].transpose(0, 1) for tensor in (query, key, value)))[None], None


FLASH = "keeps_like_flash"
AttentionInterface.register(FLASH, tower_attention)


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """The peak of live bytes of a packed micro-batch, with kernels that keep as much as on a GPU."""
    assert failure(packed.probe_chunked_head, "cpu") is None  # tried once, before its parts are replaced
    kernel = importlib.import_module("trl.kernels.chunked_logprob")
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):  # each would make float32 copies of its tile
        monkeypatch.setattr(kernel, name, lambda *_, **__: None)

    def attention(query, key, value, layout, scaling, dropout=0.0):
        query, key, value = (tensor.to(torch.bfloat16)[0].transpose(0, 1) for tensor in (query, key, value))
        gathered = (tensor.index_select(0, layout.keys) for tensor in (key, value))
        return KeptLikeFlash.apply(query.contiguous(), *gathered)[None]

    monkeypatch.setattr(packed, "packed_attention", attention)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    counter = importlib.import_module("counting").PeakBytes()

    def count(config: Any, way: Way, work: Work) -> int:
        config.save_pretrained(tmp_path)
        dtype = torch.float32 if way is DDP else torch.bfloat16
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config)).to(dtype)
        if way.adapter:
            targets = language_model_layers(str(tmp_path))
            adapted = peft.get_peft_model(model, peft.LoraConfig(r=work.lora_r, target_modules=targets))
            adapted.enable_input_require_grads()  # as TRL does
            leave_out_frozen_tower(model)
        vision_part = model.get_encoder(modality="image").config
        vision_part._attn_implementation = FLASH
        if work.frozen_tower:
            for weight in vision_tower_parameters(model):
                weight.requires_grad_(False)
            leave_out_frozen_tower(model)
        model.train()
        if work.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        add_shared_prompt_forward(model)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        text = [TEXT] * (work.prompt_tokens - work.image_tokens - 2)
        row = [START, *[IMAGE] * work.image_tokens, END, *text, *[RESPONSE] * work.response_tokens]
        ids, side = torch.tensor([row] * work.micro_batch), 2 * round(work.image_tokens**0.5)
        pixels = torch.zeros(side**2, 3 * 2 * config.vision_config.patch_size**2)
        vision = {"image_grid_thw": torch.tensor([[1, side, side]]), "mm_token_type_ids": (ids[:1] == IMAGE).int()}
        views = {  # on the host, until they are joined and copied
            kind: [
                PromptGroup(list(range(start, start + work.num_generations)), {**vision, "pixel_values": pixels})
                for start in range(0, work.micro_batch, work.num_generations)
            ]
            for kind in ("anchor", "removing", "preserving")[: 1 + work.views]
        }

        def score() -> torch.Tensor:
            batch = pack(
                model,
                ids,
                torch.ones_like(ids),
                work.response_tokens,
                views,
                sequential=work.sequential,
                detached=() if work.view_gradients else list(views)[1:],
            )

            def readout(hidden, head):
                found = {}
                for view, places in batch.tokens.items():
                    with torch.set_grad_enabled(view == "anchor" or work.view_gradients):
                        found[view] = head.scores(hidden[places], batch.targets[places])[0].sum()
                return found

            return sum(model(shared_prompt=batch, readout=readout).values())

        with counter, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = score()
        with counter:
            loss.backward()
        return counter.peak

    return count


@pytest.mark.parametrize("config", [SHALLOW, DEEP], ids=["shallow", "deep"])
@pytest.mark.parametrize(
    ("way", "changes"),
    [
        (HALF_WEIGHTS, {}),
        (HALF_WEIGHTS, {"views": 0}),
        (HALF_WEIGHTS, {"view_gradients": False}),
        (HALF_WEIGHTS, {"response_tokens": 160, "micro_batch": 4}),
        (HALF_WEIGHTS, {"response_tokens": 4, "prompt_tokens": 272, "image_tokens": 256}),
        (HALF_WEIGHTS, {"frozen_tower": True}),
        (HALF_WEIGHTS, {"checkpointing": False}),
        (DDP, {}),
        (DDP, {"views": 0}),
        (LORA, {}),
        (LORA, {"views": 0}),
        (LORA, {"sequential": True}),
    ],
    ids=[
        "views",
        "no views",
        "views without gradients",
        "one long group",
        "large images",
        "frozen tower",
        "kept",
        "float32 weights",
        "float32 weights, no views",
        "adapter",
        "adapter, no views",
        "adapter, one pass at a time",
    ],
)
def test_activations_are_the_counted_bytes(counted, shapes_of, config, way, changes):
    work = replace(WORK, **changes)
    assert activations(shapes_of(config), way, work) == pytest.approx(counted(config, way, work), rel=5e-4)


@pytest.mark.parametrize(
    ("rollouts", "response", "views", "counted_bytes"),
    [
        (5, 600, 2, 5_921_739_264),
        (5, 600, 0, 3_036_026_368),
        (5, 2000, 2, 12_772_800_000),
        (5, 2000, 0, 4_672_492_544),
        (5, 4096, 2, 23_029_817_344),
        (10, 2000, 2, 24_923_260_928),
        (40, 600, 2, 43_017_548_800),
    ],
)
def test_the_3b_shape_takes_what_was_counted_for_it(shapes_of, rollouts, response, views, counted_bytes):
    """Live bytes above bfloat16 weights, counted once on tensors without values, which pretend to be on a GPU."""
    work = Work(1, 1158, 1008, response, 5, rollouts, rollouts, rollouts, rollouts, views)
    assert activations(shapes_of(THREE_B), HALF_WEIGHTS, work) == pytest.approx(counted_bytes, rel=1e-4)


def test_sizes_of_the_micro_model_are_those_of_its_files():
    shapes = read_shapes("micro")
    with safe_open(MICRO_DIR / "model.safetensors", "pt") as file:
        stored = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert shapes.weights == sum(tensor.numel() for tensor in stored)
    processor = transformers.AutoProcessor.from_pretrained(MICRO_DIR)
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    patches = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assert shapes.patch_values == patches.shape[1]
    model = AutoModelForImageTextToText.from_pretrained(MICRO_DIR, dtype=torch.bfloat16)
    cache = model(torch.full((2, 5), TEXT), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert 2 * 5 * key_value_bytes(shapes) == held
    adapter = peft.LoraConfig(r=3, target_modules=language_model_layers("micro"))
    trained = peft.get_peft_model(model, adapter).get_nb_trainable_parameters()[0]
    assert lora_weights(shapes, 3) == trained


@pytest.mark.parametrize("family", SHARING)
def test_sizes_of_every_family_are_read(shapes_of, family):
    config = make_config(family)
    shapes = shapes_of(config)
    model = AutoModelForImageTextToText.from_config(config)
    assert shapes.weights == sum(weight.numel() for weight in model.parameters())
    assert shapes.patches_per_token * IMAGE_TOKENS == (SIDES.get(family, 16) // 4) ** 2
    assert (shapes.layers, shapes.hidden, shapes.intermediate) == (2, 32, 48)
    assert (shapes.vision_layers, shapes.vision_hidden) == (2, 16)


@pytest.mark.parametrize("adapted", [False, True])
def test_lasting_bytes_are_those_of_a_trained_model(adapted):
    """Weights, gradients and the moments of AdamW after a step, counted on the tensors; each to the byte."""
    model: Any = AutoModelForImageTextToText.from_pretrained(MICRO_DIR, dtype=torch.float32)
    if adapted:
        targets = language_model_layers("micro")
        model = peft.get_peft_model(model.bfloat16(), peft.LoraConfig(r=WORK.lora_r, target_modules=targets))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    found = need(read_shapes("micro"), LORA if adapted else DDP, replace(WORK, gpus=1))
    assert found.weights == sum(weight.nbytes for weight in model.parameters())
    assert found.gradients == sum(weight.grad.nbytes for weight in trained)
    assert found.optimizer == sum(moment.nbytes for moment in moments)
    assert (found.reference, found.buffers) == (0, 0)


def test_lasting_bytes_of_each_way():
    """16 bytes per weight for AdamW in mixed precision, for any sharding; DDP's buckets are as large as gradients."""
    shapes = read_shapes("micro")
    work = replace(WORK, gpus=4, reference=True)
    each = {way.name: need(shapes, way, work) for way in WAYS}
    lasting = {name: one.weights + one.gradients + one.optimizer for name, one in each.items()}
    assert lasting["DDP"] == 16 * shapes.weights
    assert lasting["FSDP2"] == lasting["ZeRO-3"] == 4 * shapes.weights
    assert lasting["LoRA"] == 2 * shapes.weights + 16 * lora_weights(shapes, 4)
    assert [one.reference / shapes.weights for one in each.values()] == [4, 1, 0.5, 0]
    assert each["DDP"].buffers == 4 * shapes.weights


def test_images_come_to_the_gpu_with_their_groups(make_trainer, tmp_path):
    """A slice of rollouts, and a micro-batch that a reference scores, bring their own; unshared rollouts bring all."""
    rows = make_rows([1, 1])
    sizes = {"per_device_generation_batch_size": 4, "per_device_train_batch_size": 8}
    trainer = make_trainer(rows, method="grpo", beta=0.1, **sizes)
    trainer.model.config.save_pretrained(tmp_path)
    shapes = read_shapes(str(tmp_path))
    with PixelMoves(shapes.patch_values) as moves:
        batch = generation_batch(trainer, rows)
    image = int((batch["prompt_ids"][0] == trainer.model.config.image_token_id).sum())
    prompt, response = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
    work = Work(1, prompt, image, response, trainer.num_generations, 8, 8, 8, 4, 2, reference=True)
    found, bare = (need(shapes, FSDP2, replace(work, image_tokens=tokens)) for tokens in (image, 0))
    *slices, scored = (4 * patches * shapes.patch_values for patches in moves.patches)
    assert slices == [found.generation - bare.generation] * 2
    assert scored == found.scoring - bare.scoring == 2 * slices[0]
    assert found.pixels == 0
    unpacked = need(shapes, ZERO3, work)
    assert (unpacked.pixels, unpacked.scoring) == (8 * slices[0], 16 * slices[0])  # the shuffle copies them


def test_less_is_kept_where_less_is_asked():
    shapes = read_shapes("micro")

    def kept(**changes):
        return activations(shapes, FSDP2, replace(WORK, micro_batch=40, response_tokens=400, **changes))

    assert kept(views=0) < kept(views=2, sequential=True) < kept(views=2)
    assert kept(views=0) <= kept(views=2, view_gradients=False) < kept(views=2)
    assert kept(frozen_tower=True) < kept() < kept(shared=False)


@pytest.mark.parametrize("answer", range(6))
def test_the_largest_that_fits_is_found(answer):
    assert largest(5, lambda size: size <= answer) == answer


def test_what_fits_fits_and_one_more_does_not():
    shapes = read_shapes("micro")
    work = replace(WORK, step_rollouts=4000, batch_rollouts=4000, image_tokens=2)
    for way in WAYS:
        budget = 1.5 * need(shapes, way, work).update
        size = largest_micro_batch(shapes, way, work, budget)
        updates = [need(shapes, way, replace(work, micro_batch=one)).update for one in (size, size + 1)]
        assert WORK.micro_batch <= size < 4000
        assert updates[0] <= budget < updates[1]
        budget = 1.5 * need(shapes, way, work).rollouts
        size = largest_slice(shapes, way, work, budget)
        rollouts = [need(shapes, way, replace(work, generation_slice=one)).rollouts for one in (size, size + 1)]
        assert rollouts[0] <= budget < rollouts[1]


def test_a_mixture_of_experts_is_named(shapes_of):
    with pytest.raises(UserError, match="is a mixture of experts"):
        shapes_of(transformers.Qwen3VLMoeConfig())
