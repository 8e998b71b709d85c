"""Parts D, E and F: random weights in the 3B shape, in bfloat16: updates, the rounding floor, and rollouts."""

import gc
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gpu.part import Part
from stand_in import build_model, build_published_shape, image_of
from step_cost import (
    FIRST_TEXT_ID,
    VARIANTS,
    Case,
    Variant,
    buffered_batches,
    make_rows,
    make_trainer,
    rollouts,
    update,
)
from transformers import GenerationConfig
from trl import GRPOTrainer

from cppo.evaluation import prompt_inputs
from cppo.perception import contrastive_perception_tokens, k3_divergence
from cppo.policy import (
    LanguageHead,
    PromptGroup,
    add_shared_prompt_forward,
    only_special_tokens,
    pack,
    shared_generation,
)
from cppo.policy.vision_inputs import PER_TOKEN_KEYS, packable
from cppo.policy.vision_tower import attend_at_once
from cppo.runs.activation_plan import activations
from cppo.runs.memory_work import Way, Work
from cppo.runs.model_shapes import read_shapes

GIB = 2**30
VOCABULARY = 151936
BFLOAT16 = Way("bfloat16 weights")
CASES = {
    "400/100/600-G8-half": (Case(400, 600), {}),
    "1000/100/600-G5-all": (Case(1000, 600, generations=5), {"perception_gate": "none"}),
    "400/100/2000-G5-all": (Case(400, 2000, generations=5), {"perception_gate": "none"}),
}
"""Image, text and response tokens, rollouts of a group, and how many of them CPPO scores under its views."""
UPDATES = ("trl_grpo", "shared_grpo", "cppo")
WARM_UPS, RUNS = 2, 3
FLOOR_BOUND = 1e-4
"""Nats: at smaller true divergences, k3's gradient is mostly rounding (docs/results/noise_floor.md)."""
NEW_TOKENS = 128


@dataclass(frozen=True)
class Sizes:
    """Model, processor and lengths: those of 3B, on the CPU a fiftieth."""

    model: Any
    processor: Any
    vocabulary: int
    scale: int

    @classmethod
    def of(cls, part: Part) -> "Sizes":
        if part.tiny:
            return cls(*build_model(512, seed=0), 512, 50)
        return cls(*build_published_shape(VOCABULARY, 0, part.device), VOCABULARY, 1)


def updates(part: Part) -> None:
    """Seconds of an update, as multiples of TRL's GRPO, and peaks above weights, beside the arithmetic of `cppo plan`.

    Gradients are freed as they come, as with FSDP2's shards.
    """
    sizes = Sizes.of(part)
    with tempfile.TemporaryDirectory() as folder:
        sizes.model.config.save_pretrained(folder)
        shapes = read_shapes(folder)
    for name, (case, gate) in CASES.items():
        found = _measure(part, sizes, case, gate)
        for variant, (peak, seconds, work) in found.items():
            # The arithmetic covers no gate and not TRL's own way.
            known = variant == "shared_grpo" or (variant == "cppo" and bool(gate))
            planned = activations(shapes, BFLOAT16, work) / GIB if known else None
            ratios = [own / base for own, base in zip(seconds, found["trl_grpo"][1], strict=True)]
            part.found(
                f"{name}, {variant}",
                seconds=median(seconds),
                time_ratio=median(ratios),
                time_ratios=[round(ratio, 3) for ratio in ratios],
                peak_gib=None if peak is None else peak / GIB,
                planned_gib=planned,
                peak_to_plan=None if peak is None or planned is None else peak / GIB / planned,
            )
        del found
        gc.collect()
    _vision_tower(part, sizes)


def _vision_tower(part: Part, sizes: Sizes) -> None:
    """Forward and backward of one image; an update of CPPO runs them for the anchor and for each view.

    By SDPA one call per window, as in TRL's updates above; and one call per layer, as in ours.
    """
    inputs, tower = _prompts(sizes, 1), sizes.model.base_model.visual
    grid = inputs["image_grid_thw"].to(part.device)
    pixels = inputs["pixel_values"].to(part.device, tower.dtype)

    def run() -> None:
        tower(pixels, grid_thw=grid).pooler_output.sum().backward()
        tower.zero_grad(set_to_none=True)

    for calls in ("window", "layer"):
        if calls == "layer":
            attend_at_once(sizes.model)
        run()
        part.found(f"vision tower: a call a {calls}", patches=len(pixels), seconds=part.median_seconds(run, RUNS))


def _measure(
    part: Part, sizes: Sizes, case: Case, gate: dict[str, Any]
) -> dict[str, tuple[int | None, list[float], Work]]:
    """Per variant its peak in bytes, its seconds run by run, and its work by the arithmetic."""
    trainers = {name: _trainer(part, sizes, case, name, gate if name == "cppo" else {}) for name in UPDATES}
    rows = make_rows(case, sizes.scale)
    batches = {name: buffered_batches(trainer, rows) for name, trainer in trainers.items()}
    assert all(rollouts(parts) == rollouts(batches["trl_grpo"]) for parts in batches.values())

    def run(name: str) -> None:
        with torch.autocast(part.device.type, torch.bfloat16, enabled=not part.tiny, cache_enabled=False):
            loss = update(trainers[name], batches[name])
        if not math.isfinite(loss):
            raise ArithmeticError(f"{name} has a loss of {loss}")

    runs = {name: partial(run, name) for name in UPDATES}
    peaks = {name: part.peak_bytes(runs[name]) for name in UPDATES}
    seconds: dict[str, list[float]] = {name: [] for name in UPDATES}
    for _ in range(WARM_UPS - 1 + RUNS):
        for name in UPDATES:
            seconds[name].append(part.seconds(runs[name]))
    first, size = batches["trl_grpo"][0], case.generations
    image = int((first["prompt_ids"][0] == sizes.model.config.image_token_id).sum())
    lengths = (first["prompt_ids"].shape[1], image, first["completion_ids"].shape[1])
    return {
        name: (
            peaks[name],
            seconds[name][-RUNS:],
            Work(1, *lengths, size, size, size, size, size, views=2 if name == "cppo" else 0),
        )
        for name in UPDATES
    }


def _trainer(part: Part, sizes: Sizes, case: Case, name: str, options: dict[str, Any]) -> GRPOTrainer:
    variant = Variant(VARIANTS[name].trainer, {**VARIANTS[name].options, **options})
    args = SimpleNamespace(checkpointing=True, vocabulary=sizes.vocabulary)
    trainer = make_trainer(variant, case, sizes.scale, sizes.model, sizes.processor, args, part.device.type)
    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return trainer


def rounding_floor(part: Part) -> None:
    """Log-probabilities of a group's tokens alone, and packed with the same image as both views: all should agree."""
    sizes = Sizes.of(part)
    model = sizes.model.to(torch.bfloat16).eval()
    add_shared_prompt_forward(model)
    generations, response = 5, 600 // sizes.scale
    inputs = _prompts(sizes, 1)
    prompt = inputs.pop("input_ids")
    del inputs["attention_mask"]
    rng = np.random.default_rng(1)
    responses = torch.from_numpy(rng.integers(FIRST_TEXT_ID, sizes.vocabulary, (generations, response)))
    ids = torch.cat([prompt.expand(generations, -1), responses], dim=1).to(part.device)
    for key in inputs.keys() & set(PER_TOKEN_KEYS):
        inputs[key] = torch.nn.functional.pad(inputs[key], (0, response))
    rows, vision = list(range(generations)), packable(model.config, inputs)
    same = [PromptGroup(rows, vision)]
    other = [PromptGroup(rows, {**vision, "pixel_values": vision["pixel_values"].flip(0)})]

    def logps(*views: list[PromptGroup]) -> torch.Tensor:
        named = {str(number): groups for number, groups in enumerate(views)}
        batch = pack(model, ids, torch.ones_like(ids), response, named)

        def readout(hidden: torch.Tensor, head: LanguageHead) -> torch.Tensor:
            return head.scores(hidden, batch.targets)[0]

        with torch.no_grad():
            return model(shared_prompt=batch, readout=readout).double().unflatten(0, (len(views), -1))

    alone = logps(same)[0]
    part.found("another image", k3=k3_divergence(alone, logps(other)[0]).mean().item())
    anchor, removing, preserving = logps(same, same, same)
    for name, one, others in (
        ("alone and together", alone, (anchor, removing, preserving)),
        ("views of one pass", anchor, (removing, preserving)),
    ):
        differences = torch.stack([other - one for other in others])
        k3 = torch.stack([k3_divergence(one, other) for other in others])
        cpl = contrastive_perception_tokens(k3[-1], k3[-2], 0.1)
        part.found(
            name,
            logp_difference=differences.abs().mean().item(),
            largest_logp_difference=differences.abs().max().item(),
            largest_k3=k3.max().item(),
            cpl_less_ln2=(cpl - math.log(2)).abs().mean().item(),
        )
        part.check(f"{name}: mean k3 in nats", k3.mean().item(), FLOOR_BOUND)


def generation(part: Part) -> None:
    """Rollouts with and without shared prefill, and four times as many; in groups of 5."""
    sizes = Sizes.of(part)
    generations, new = 5, 4 if part.tiny else NEW_TOKENS
    model = sizes.model.eval()
    for rows, shared in ((2, True), (2, False)) if part.tiny else ((8, True), (8, False), (32, True)):
        inputs = _prompts(sizes, rows)
        patches = inputs["pixel_values"].unflatten(0, (rows, -1)).repeat_interleave(generations, dim=0)
        repeated = {key: value.repeat_interleave(generations, dim=0) for key, value in inputs.items()}
        repeated["pixel_values"] = patches.flatten(0, 1)
        repeated = {key: value.to(part.device) for key, value in repeated.items()}
        group_ids = [row // generations for row in range(rows * generations)] if shared else None
        name = f"{rows * generations} rows, {'shared' if shared else 'own'} prefill"
        with _rollouts(model, group_ids, repeated) as run:
            run(2)
            peak = part.peak_bytes(partial(run, new))
            prefill, seconds = part.seconds(partial(run, 1)), part.seconds(partial(run, new))
        part.found(
            name,
            prefill_seconds=prefill,
            seconds=seconds,
            tokens_per_second=rows * generations * new / seconds,
            peak_gib=None if peak is None else peak / GIB,
        )


@contextmanager
def _rollouts(
    model: Any, group_ids: list[int] | None, inputs: dict[str, torch.Tensor]
) -> Iterator[Callable[[int], None]]:
    """A function that samples this many tokens per row, ignoring the end of sequence."""

    def run(tokens: int) -> None:
        config = GenerationConfig(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=True, top_k=0)
        answers = model.generate(**inputs, generation_config=config)
        assert answers.shape[1] == inputs["input_ids"].shape[1] + tokens

    with only_special_tokens(model), shared_generation(model, group_ids), torch.no_grad():
        yield run


def _prompts(sizes: Sizes, count: int) -> dict[str, torch.Tensor]:
    """The processor's inputs for prompts of about 1,100 tokens, 992 of them of an image."""
    rng = np.random.default_rng(0)
    prompts = [[{"role": "user", "content": f"{row:03}{'7' * (100 // sizes.scale)}"}] for row in range(count)]
    images = [[image_of(1000 // sizes.scale, rng)] for _ in prompts]
    return dict(prompt_inputs(sizes.processor, prompts, images))
