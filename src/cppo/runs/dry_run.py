"""`cppo train --dry_run`: set up the whole run, train three generation batches, print the plan, keep nothing.

Memory and time are measured: the longest prompts go through the real trainer on this machine. The plan also shows the
arithmetic of `cppo plan`, and only this if the recipe asks for a GPU and there is none.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from cppo.errors import UserError
from cppo.perception import SHAPINGS, TERMS, VIEWS, views_of
from cppo.policy import unwrapped
from cppo.recipes import Recipe
from cppo.runs.generation_slice import choose_slice
from cppo.runs.loggers import check_loggers
from cppo.runs.memory_plan import need
from cppo.runs.memory_work import Way, Work
from cppo.runs.model_shapes import read_shapes
from cppo.runs.precision import lacks_gpu
from cppo.runs.prepare import PreparedRun, build_config, may_probe, prepare_run
from cppo.runs.rated_rows import order_lines
from cppo.runs.recipe_plan import arithmetic_text, launched_way, recipe_work
from cppo.runs.rehearsal import BatchNeeds, MemoryParts, train_briefly
from cppo.runs.row_limit import probe_rows
from cppo.runs.sources import RunSources
from cppo.training.config import CPPOConfig
from cppo.training.rollouts import rollouts_a_pass


def rehearse(recipe: Recipe, sources: RunSources) -> list[str] | None:
    """Check a recipe with its data and model by training three generation batches; None except in the main process.

    A recipe for bfloat16 on a GPU trains nothing on a machine without a GPU. Only a temporary folder is written, and
    removed. No logger is called.

    Returns:
        The run's plan and needs, as text lines; "as now" is with the model's present answers, "at worst" with every
        response of full length and every second one rewarded.

    Raises:
        UserError: as `cppo.runs.run.run_training`; or a batch does not fit into memory, naming the phase.
    """
    untried = lacks_gpu(recipe.config)
    here = {"use_cpu": True, "bf16": False} if untried else {}
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"output_dir": folder, "report_to": "none", "save_strategy": "no", "eval_strategy": "no"}
        check_loggers(build_config(replace(recipe, config={**recipe.config, **here})))
        prepared = prepare_run(replace(recipe, config={**recipe.config, **here, **quiet}), sources)
        return _untried_lines(recipe, prepared) if untried else _plan_lines(recipe, prepared, sources)


def _untried_lines(recipe: Recipe, prepared: PreparedRun) -> list[str] | None:
    """The lines that need neither the model's weights nor a GPU."""
    if os.environ.get("RANK", "0") != "0":
        return None
    _, lengths = probe_rows(prepared.train, prepared.options)
    way, gpus = launched_way(prepared.options.use_peft)
    work = recipe_work(recipe, gpus, prompt_tokens=max(lengths))
    return [
        f"recipe     {recipe.name}",
        _rows_line(prepared),
        *order_lines(recipe),
        _tokens_line(lengths, prepared.args),
        f"method     {recipe.resolved['method']}: {method_text(recipe.resolved)}",
        f"arithmetic {_arithmetic(recipe, way, work)}",
        "untried    the recipe asks for a GPU and there is none: nothing was run, measured or written; "
        "--use_cpu true --bf16 false tries it on the CPU",
    ]


def _arithmetic(recipe: Recipe, way: Way, work: Work, measured: tuple[int, int] | None = None) -> str:
    try:
        return arithmetic_text(way, work, need(read_shapes(recipe.options.model), way, work), measured)
    except UserError as error:
        return f"none: {error}"


def _rows_line(prepared: PreparedRun) -> str:
    train = prepared.train
    return (
        f"rows       {len(train):,} to train on, {len(train.skipped):,} bad, "
        f"{len(train.other_images):,} with other images, {len(prepared.long):,} too long"
    )


def _tokens_line(lengths: list[int], args: CPPOConfig) -> str:
    return (
        f"tokens     prompts {sum(lengths) / len(lengths):.0f} on average, {max(lengths):,} at most in "
        f"{len(lengths):,} rows, images included; responses up to {args.max_completion_length:,}"
    )


def _plan_lines(recipe: Recipe, prepared: PreparedRun, sources: RunSources) -> list[str] | None:
    """Train on the longest of the probed prompts, and return the run's plan and needs."""
    args, train, config = prepared.args, prepared.train, recipe.resolved
    generations, batch_size, micro_batches = args.num_generations, args.generation_batch_size, args.steps_per_generation
    assert generations is not None
    assert batch_size is not None
    assert micro_batches is not None
    steps_per_batch = max(1, micro_batches * args.num_iterations // args.gradient_accumulation_steps)
    prompts = batch_size // generations
    probed, lengths = probe_rows(train, prepared.options)
    longest = sorted(range(len(probed)), key=lambda index: -lengths[index])
    # With fewer probed rows than prompts in a generation batch, the longest are repeated.
    batch = train.keep([probed[longest[index % len(longest)]] for index in range(prompts)])

    choose_slice(recipe, prepared)
    rehearsed = train_briefly(prepared, sources, batch, steps_per_batch)
    trainer, steps, memory = rehearsed.trainer, rehearsed.steps, rehearsed.memory
    if not trainer.is_world_process_zero():
        return None
    held_out = {
        "before and after training": sources.held_out,
        "in each evaluation": sources.evaluation,
        "in each probe": sources.probes if may_probe(trainer, prepared.options) else None,
    }
    answered = [f"{len(source):,} items {when}" for when, source in held_out.items() if source is not None]
    way, gpus = launched_way(prepared.options.use_peft)
    work = recipe_work(recipe, gpus, trainer.prompt_tokens, trainer.image_tokens)
    worst = rehearsed.at_worst
    measured = (memory.kept + worst.rollout, memory.kept + memory.gradients + worst.update)
    weights = list(unwrapped(trainer.model).parameters())
    trained = sum(one.numel() for one in weights if one.requires_grad)
    rewards = zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
    return [
        f"recipe     {recipe.name}",
        f"model      {recipe.options.model}: {trained:,} of {sum(one.numel() for one in weights):,} weights trained, "
        f"{str(weights[0].dtype).removeprefix('torch.')} on {args.device}, "
        f"{trainer.accelerator.num_processes} process(es)",
        _rows_line(prepared),
        *order_lines(recipe),
        f"held-out   {', '.join(answered) or 'nothing is answered'}",
        f"steps      {steps:,}, {steps / steps_per_batch * prompts / len(train):.2f} epochs; every {steps_per_batch} "
        f"share {prompts} prompts x {generations} responses",
        _tokens_line(lengths, args),
        f"method     {config['method']}: {method_text(config)}",
        f"sharing    {sharing_text(args, trainer.shares_prompts)}",
        f"loss       {args.loss_type}, learning rate {args.learning_rate:g}, scorer {config['scorer']}",
        f"rewards    {', '.join(f'{name} x {weight:g}' for name, weight in rewards)}",
        f"attention  {trainer.kernels}",
        *(f"fallback   {line}" for line in trainer.fallbacks),
        f"memory     {', '.join(f'{part} {_mib(size)}' for part, size in asdict(memory).items())}",
        _needs_line("as now", rehearsed.as_answered, memory, steps),
        _needs_line("at worst", worst, memory, steps),
        f"arithmetic {_arithmetic(recipe, way, work, measured if rehearsed.on_gpu else None)}",
        f"written    nothing; without --dry_run it goes to {recipe.output_dir}",
    ]


def method_text(config: Mapping[str, Any]) -> str:
    """How a method uses views, from the resolved options."""
    sink, weight = config["perception_sink"], config["perception_weight"]
    entropies = {
        "I-": config["perception_removing_entropy_weight"],
        "I+": config["perception_preserving_entropy_weight"],
    }
    used = []
    if sink == "mask_advantage":
        used.append(f"perception_sink mask_advantage, kept by the tokens of the best {config['perception_score']}")
    elif sink == "scale_advantage":
        used.append(f"perception_sink scale_advantage, of every token by its {config['perception_score']}")
    elif sink in SHAPINGS:
        used.append(f"perception_sink {sink}, which shapes advantages by {config['perception_score']}")
    elif sink != "none" and weight:
        once = config["perception_view_policy"] == "rollout"
        scored = "scored once a generation batch" if once else config["perception_memory"]
        views = f", views {scored}" if views_of(TERMS[sink], VIEWS) else ""
        used.append(f"perception_sink {sink}, perception_weight {weight:g}{views}")
    if sink in TERMS:
        used += [f"entropy under {view} x {weight:g}" for view, weight in entropies.items() if weight]
    if config["rollout_views"]:
        share = f"{config['rollout_view_mode']} {config['rollout_view_fraction']:g}"
        used.append(f"rollouts from {', '.join(config['rollout_views'])} ({share})")
    return "; ".join(used) or "no views"


def sharing_text(args: CPPOConfig, shares_prompts: bool) -> str:
    """How many rollouts of a micro-batch share each pass of a prompt and its images."""
    size, group = args.per_device_train_batch_size, args.num_generations or 1
    rows = size * (args.steps_per_generation or 1)
    if not shares_prompts:
        return f"none: each of the {size} rollouts of a micro-batch runs its own prompt and images"
    mean = float(rollouts_a_pass(rows, group, size))
    cut = f"of groups of {group}" if size % group == 0 else f"cut groups of {group}"
    return (
        f"micro-batches of {size} rollouts {cut}: each prompt and image runs once for at most "
        f"{min(size, group)} of them, {mean:.1f} on average"
    )


def _needs_line(label: str, needs: BatchNeeds, memory: MemoryParts, steps: int) -> str:
    return (
        f"{label:<10} rollout {_mib(needs.rollout)}, update {_mib(needs.update)}, {_mib(needs.peak(memory))} "
        f"at the peak; {needs.step_seconds:.2f} s a step, {steps * needs.step_seconds / 60:,.1f} minutes for all steps"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
