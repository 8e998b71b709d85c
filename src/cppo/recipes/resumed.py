"""What a resumed run changes of the run that it goes on with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cppo.checkpoints import checkpoint_step
from cppo.errors import UserError, tell
from cppo.options import schema
from cppo.recipes.recipe import Recipe, resolved_options
from cppo.recipes.run_dir import CONFIG_HEADER, RunDirectory, config_header
from cppo.values import present_value

_FREE = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "final_eval_samples",
    "max_bad_fraction",
    "eval_",
    "per_device_eval_",
    "save_",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "logging_",
    "log_",
    "report_to",
    "run_name",
    "project",
    "trackio_",
    "num_completions_to_print",
    "disable_tqdm",
    "hub_",
    "push_to_hub",
    "dataloader_",
    "view_threads",
    "scorer",
    "perception_memory",
    "gradient_checkpointing",
)
"""Options, by the start of their names, that neither choose what is trained on, in which order, nor the loss."""
_FIXED = ("optim", "use_peft", "lora_", "load_in_", "freeze_vision_tower", "cast_lm_head_to_fp32", "fp16")
"""Options, by the start of their names, that choose which weights are trained and how: a checkpoint holds to them."""


def changed_options(recipe: Recipe, config: Mapping[str, Any], checkpoint: Path) -> dict[str, tuple[str, str]]:
    """The options of data, order and method that differ from those of the checkpoint's run: old and new value as text.

    Args:
        recipe, config: the resumed run's, as for `dump_recipe`. What one of the two runs does not give counts as its
            default.
    """
    before = RunDirectory(checkpoint.parent).options()
    if not before:
        return {}
    now = resolved_options(recipe, config)
    values = {
        name: (present_value(field, before.get(name, field.default)), now.get(name, field.default))
        for name, field in schema(recipe.command).fields.items()
    }
    return {
        name: (_shown(old), _shown(new))
        for name, (old, new) in values.items()
        if not name.startswith(_FREE) and old != new
    }


def check_checkpoint(recipe: Recipe, checkpoint: Path) -> None:
    """Refuse a checkpoint that the run cannot go on from.

    That is one of another command's run, of another method, with other weights in training, or without steps left.
    Raises UserError.
    """
    run = RunDirectory(checkpoint.parent)
    header = run.config.read_text("utf-8", "replace").partition("\n")[0] if run.config.is_file() else ""
    if header.startswith(CONFIG_HEADER) and not header.startswith(config_header(recipe.command)):
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is of another command's run than `cppo {recipe.command}`; start "
            f"from its weights with --model {checkpoint}"
        )
    method = run.options().get("method", recipe.method)
    if method != recipe.method:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is of a run with method {method}; add --method {method}, or "
            f"take its recipe with --config {run.config}"
        )
    changed = changed_options(recipe, recipe.resolved if recipe.command == "train" else recipe.config, checkpoint)
    for name, (old, new) in changed.items():
        if name.startswith(_FIXED):
            raise UserError(
                f"resume_from_checkpoint: {name} was {old} in the run of {checkpoint} and cannot become {new}: give "
                f"it as it was, or start from the checkpoint's weights with --model {checkpoint}"
            )
    step, last = checkpoint_step(checkpoint), recipe.config.get("max_steps", -1)
    # A run that was stopped between its last step and its summary still has its evaluation to do.
    done = step >= last if run.summary.is_file() else step > last
    if last > 0 and done:
        raise UserError(f"resume_from_checkpoint: {checkpoint} is at step {step} already; raise max_steps")


def warn_of_changes(recipe: Recipe, config: Mapping[str, Any], checkpoint: Path) -> None:
    """Say on one line what `changed_options` finds."""
    changed = changed_options(recipe, config, checkpoint)
    if changed:
        listed = "; ".join(f"{name}: {old} -> {new}" for name, (old, new) in changed.items())
        tell(
            f"warning: resumed with other options than the run began with ({listed}): "
            "it will not go on as the interrupted run would have"
        )


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1_000_000).removesuffix("\n...\n").strip()
