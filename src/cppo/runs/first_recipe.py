"""A first recipe for given data, model and machine, each choice with its reason."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import yaml

from cppo.data import PixelBounds
from cppo.errors import UserError
from cppo.methods import get_method
from cppo.options import check_combinations
from cppo.recipes import Recipe, make_recipe, read_mapping, recipe_file
from cppo.runs.first_look import DataFacts, ModelFacts, longest_prompt
from cppo.runs.memory_plan import RESERVE, largest_micro_batch, largest_slice
from cppo.runs.memory_work import DDP, FSDP2, LORA, Way
from cppo.runs.recipe_plan import GIB, recipe_work

TINY, LARGE = 10**7, 10**8
"""Numbers of weights: below the first a model is like `micro`, from the second an adapter trains on a CPU."""
FEW_ROWS, SOME_ROWS = 100, 1000
ADAPTER_ROWS = 500
"""With fewer rows a large model trains an adapter, on a GPU too."""
SMALL_GPU = 40
"""GiB below which images are scaled down further."""
PIXELS = {True: 401_408, False: 1_003_520}
"""Pixels of an image, on a small machine and on another: 512 and 1,280 tokens of Qwen's families."""
LENGTHS = (1024, 512, 256)
"""Lengths of responses to try on GPUs, longest first."""
GROUP = 5
"""Rollouts of a prompt on GPUs: the published number."""
FORM_BUILT_IN = (
    "\nIts tokenizer was made for the form of the responses, so no prompt asks for it. By itself `micro` knows only the"
    "\ngenerated tasks; docs/start/micro.md teaches it your pictures."
)
MICRO_GROUPS = 4
"""Limit of groups in a micro-batch."""


@dataclass(frozen=True)
class Machine:
    """The machine: GPUs with `memory` GiB each, or a CPU without any."""

    gpus: int
    memory: float = 0.0

    def __str__(self) -> str:
        return f"{self.gpus} GPU{'s' * (self.gpus > 1)} of {self.memory:g} GiB" if self.gpus else "a CPU"


@dataclass(frozen=True)
class Choice:
    """Options that belong together, and the reason for their values."""

    why: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run that fit the machine. `length` is the longest response's, in tokens."""

    adapter: bool
    length: int
    group: int
    micro: int
    why: str


def first_recipe(
    data: DataFacts, model: ModelFacts, machine: Machine, method: str | None, output_dir: str
) -> tuple[list[Choice], Recipe]:
    """The choices in the order of the file, and the resulting recipe.

    method: None for `cppo`, or for `grpo` if no row has an image.

    Raises:
        UserError: the model does not fit the machine, there are fewer rows than GPUs, or the method does not go with
            the other options.
    """
    if data.rows < max(machine.gpus, 1):
        raise UserError(f"{data.rows} rows are fewer than {machine.gpus} GPUs: use fewer GPUs, such as 1")
    choices = [*_inputs(data, model, machine), _method(data, method)]
    given = {name: value for choice in choices for name, value in choice.options.items()}
    given["output_dir"] = output_dir
    pixels = PixelBounds.of({"min_pixels": None, "max_pixels": None, "min_side": None, **given})
    prompt = longest_prompt(model.name, data, pixels, given.get("prompt_suffix"))
    sizes = _fitting(model, machine, data, given, prompt)
    choices += _training(sizes, data, model, machine, prompt)
    choices.append(Choice("Where the run writes: checkpoints, report, model.", {"output_dir": output_dir}))
    values = {name: value for choice in choices for name, value in choice.options.items()}
    recipe = make_recipe("train", "the new recipe", values)
    check_combinations(recipe.resolved)
    return choices, recipe


def as_yaml(heading: str, choices: list[Choice]) -> str:
    """The recipe as a file with comments; `heading`: first lines, as comments."""
    parts = [heading]
    for choice in choices:
        values = yaml.safe_dump(dict(choice.options), sort_keys=False, allow_unicode=True, width=1000)
        parts.append(f"{choice.why}\n\n{values}")
    lines = []
    for part in parts:
        comment, _, values = part.partition("\n\n")
        lines += [f"# {line}" for line in comment.splitlines()] + values.splitlines() + [""]
    return "\n".join(lines).rstrip() + "\n"


def _inputs(data: DataFacts, model: ModelFacts, machine: Machine) -> Iterator[Choice]:
    asks = not (data.generated or model.form_built_in)
    yield Choice(
        f"The model: {_weights(model)}.{'' if asks or data.generated else FORM_BUILT_IN}", {"model": model.name}
    )
    specs = data.specs[0] if len(data.specs) == 1 else data.specs
    low, high = data.images
    images = f"{low} to {high} images" if low < high else f"{low} image{'s' * (low != 1)}"
    size = f" of up to {data.largest[0]} x {data.largest[1]} pixels" if data.largest else ""
    options: dict[str, Any] = {"data": specs}
    if data.columns is not None:
        options["columns"] = data.columns
    yield Choice(
        f"{data.rows:,} usable rows, {data.bad:,} bad, each with {images}{size}. Held-out rows as `eval_data` and a\n"
        "number as `final_eval_samples` would measure what training gains.",
        options,
    )
    small = machine.memory < SMALL_GPU
    if data.largest is not None and not _is_tiny(model) and data.largest[0] * data.largest[1] > PIXELS[small]:
        yield Choice(
            "Larger images are scaled down: an image of this many pixels has about "
            f"{PIXELS[small] // 784:,} tokens in Qwen's families.",
            {"max_pixels": PIXELS[small]},
        )
    if asks:
        suffix = read_mapping(recipe_file("few-rows"), "few-rows")["prompt_suffix"]
        yield Choice("The rewards look for this form, so every prompt asks for it.", {"prompt_suffix": suffix})


def _method(data: DataFacts, method: str | None) -> Choice:
    without_images = data.images[1] == 0
    why = "`cppo methods` lists others."
    if method is None and without_images:
        why = "No row has an image, so there is nothing for a perception loss to do."
    method = method or ("grpo" if without_images else "cppo")
    if get_method(method).rewards:
        return Choice(f"{why} The method has its own rewards.", {"method": method, "rewards": ["method"]})
    why += " A response earns 0.9 for the answer of its row and 0.1 for the form."
    return Choice(why, {"method": method, "rewards": ["accuracy", "format"], "reward_weights": [0.9, 0.1]})


def _training(
    sizes: Sizes, data: DataFacts, model: ModelFacts, machine: Machine, prompt: int | None
) -> Iterator[Choice]:
    processes = max(machine.gpus, 1)
    prompts = _prompts(data, machine)
    passes = prompts * sizes.group // sizes.micro
    if machine.gpus:
        yield Choice("GPUs compute in bfloat16.", {"bf16": True})
    else:
        yield Choice("A CPU computes in float32.", {"use_cpu": True, "bf16": False})
    if sizes.adapter:
        options: dict[str, Any] = {"use_peft": True, "lora_r": 16, "lora_alpha": 32}
        if machine.gpus:
            options["model_init_kwargs"] = {"dtype": "bfloat16"}
        few = "few rows change it less" if data.rows < ADAPTER_ROWS else "beside the whole model no group fits"
        yield Choice(f"A LoRA adapter is trained: {few if machine.gpus else 'a CPU has little time'}.", options)
    yield Choice(
        f"{prompts * processes} prompts x {sizes.group} rollouts make a step: {processes} process"
        f"{'es' * (processes > 1)} x {passes} micro-batch{'es' * (passes > 1)} of {sizes.micro}.\n{sizes.why}",
        {
            "num_generations": sizes.group,
            "per_device_train_batch_size": sizes.micro,
            "gradient_accumulation_steps": passes,
            "steps_per_generation": passes,
        },
    )
    known = f"Prompts have up to {prompt:,} tokens, images included." if prompt else "The prompts were not counted."
    yield Choice(f"The longest response, in tokens. {known}", {"max_completion_length": sizes.length})
    rate = 1e-4 if _is_tiny(model) else 1e-5 if sizes.adapter else 1e-6
    kind = "a tiny model" if _is_tiny(model) else "an adapter" if sizes.adapter else "a whole model"
    yield Choice(
        f"A rate for {kind}; lower it if the reward falls.",
        {
            "learning_rate": rate,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 5,
            "max_grad_norm": 1.0,
        },
    )
    each = data.rows // (prompts * processes)
    wanted = 60 if data.rows < FEW_ROWS else 150 if data.rows < SOME_ROWS else 0
    epochs = max(2, ceil(wanted / each))
    yield Choice(
        f"{each:,} step{'s' * (each > 1)} an epoch, {epochs * each:,} in all. `--max_steps N` stops earlier.",
        {"num_train_epochs": epochs, "save_steps": max(1, epochs * each // 5), "save_total_limit": 2},
    )
    why = "Layers are computed again for the backward pass, which saves memory."
    if _is_tiny(model):
        why = "A tiny model keeps its activations."
    yield Choice(why, {"gradient_checkpointing": not _is_tiny(model), "report_to": "none"})


def _prompts(data: DataFacts, machine: Machine) -> int:
    """Prompts of a step on each process."""
    target = 8 if data.rows < FEW_ROWS else 16 if data.rows < SOME_ROWS or not machine.gpus else 64
    return max(1, min(target, data.rows) // max(machine.gpus, 1))


def _fitting(
    model: ModelFacts, machine: Machine, data: DataFacts, given: Mapping[str, Any], prompt: int | None
) -> Sizes:
    """Sizes that fit the machine: on GPUs by the arithmetic of `cppo plan`. Raises UserError if nothing fits."""
    prompts = _prompts(data, machine)
    weights = model.shapes.weights if model.shapes else LARGE
    if not machine.gpus:
        group, large = 8 if _is_tiny(model) else 4, weights >= LARGE
        micro = group if large else group * prompts
        why = "A micro-batch is one group." if large else "The micro-batch is the whole step: the model is small."
        return Sizes(large, 80 if _is_tiny(model) else 256, group, micro, why)
    if model.shapes is None:
        why = f"`cppo plan` does not count this model: {model.uncounted}.\nRaise the micro-batch if memory allows."
        return Sizes(True, LENGTHS[1], GROUP, 1, why)
    whole = [(False, length) for length in LENGTHS[:2]]
    if data.rows < ADAPTER_ROWS and weights >= LARGE:
        whole = []
    for adapter, length in [*whole, *((True, length) for length in LENGTHS)]:
        way = LORA if adapter else FSDP2 if machine.gpus > 1 else DDP
        limit = _most(model, machine, way, _draft(given, prompts, length), prompt)
        if limit >= (1 if adapter else GROUP):
            micro = _micro_batch(GROUP, prompts, limit)
            how = f"{way.name} on {machine}, 10 % left free" if machine.gpus > 1 or adapter else f"{machine}, 10 % free"
            why = f"By `cppo plan` up to {limit} rollouts fit ({how})."
            return Sizes(adapter, length, GROUP, micro, why)
    raise UserError(
        f"{model.name} does not fit {machine} by `cppo plan`, even as an adapter with responses of "
        f"{LENGTHS[-1]} tokens: use more memory or a smaller model"
    )


def _draft(given: Mapping[str, Any], prompts: int, length: int) -> Recipe:
    """The recipe's options that change memory, with micro-batches of a whole step."""
    size = {"num_generations": GROUP, "per_device_train_batch_size": GROUP * prompts, "steps_per_generation": 1}
    return make_recipe("train", "draft", {**given, **size, "max_completion_length": length, "bf16": True})


def _most(model: ModelFacts, machine: Machine, way: Way, draft: Recipe, prompt: int | None) -> int:
    """The most rollouts of a micro-batch that fit; 0 if none fits or none can be generated."""
    assert model.shapes is not None
    budget = machine.memory * GIB * (1 - RESERVE)
    work = recipe_work(draft, machine.gpus, prompt_tokens=prompt)
    most = largest_micro_batch(model.shapes, way, work, budget)
    generated = largest_slice(model.shapes, way, replace(work, micro_batch=max(most, 1)), budget)
    return most if generated else 0


def _micro_batch(group: int, prompts: int, limit: int) -> int:
    """The largest micro-batch of whole groups that divides a step, or else of a part of a group."""
    whole = [count for count in range(1, min(prompts, MICRO_GROUPS) + 1) if prompts % count == 0]
    sizes = [group * count for count in whole] + [size for size in range(1, group) if group % size == 0]
    return max(size for size in sizes if size <= limit)


def _is_tiny(model: ModelFacts) -> bool:
    return model.shapes is not None and model.shapes.weights < TINY


def _weights(model: ModelFacts) -> str:
    return f"{model.shapes.weights:,} weights" if model.shapes else model.uncounted
