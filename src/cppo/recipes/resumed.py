"""How a resumed run differs from the original run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cppo.checkpoints import changed_code, checkpoint_step, has_other_rows
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
"""Prefixes of options that change neither the data, its order, nor the loss."""
_FIXED = ("optim", "use_peft", "lora_", "load_in_", "freeze_vision_tower", "cast_lm_head_to_fp32", "fp16")
"""Prefixes of options that choose which weights are trained and how: a resume cannot change them."""


def changed_options(recipe: Recipe, config: Mapping[str, Any], checkpoint: Path) -> dict[str, tuple[str, str]]:
    """The options of data, order and method that differ from the checkpoint's run: old and new value as text.

    Args:
        recipe, config: the resumed run's, as for `dump_recipe`. A missing option counts as its default.
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
    """Refuse a checkpoint from which the run cannot resume.

    Refused are checkpoints of another command's run, of another method, with other trained weights, or without steps
    left. Raises UserError.
    """
    run = RunDirectory(checkpoint.parent)
    header = run.config.read_text("utf-8", "replace").partition("\n")[0] if run.config.is_file() else ""
    if header.startswith(CONFIG_HEADER) and not header.startswith(config_header(recipe.command)):
        raise UserError(
            f"resume_from_checkpoint: `cppo {recipe.command}` did not write {checkpoint}; "
            f"start from its weights with --model {checkpoint}"
        )
    method = run.options().get("method", recipe.method)
    if method != recipe.method:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is of a run with method {method}; add --method {method}, "
            f"or use its recipe with --config {run.config}"
        )
    changed = changed_options(recipe, recipe.resolved if recipe.command == "train" else recipe.config, checkpoint)
    for name, (old, new) in changed.items():
        if name.startswith(_FIXED):
            raise UserError(
                f"resume_from_checkpoint: {name} was {old} in the run of {checkpoint} and cannot become {new}: give "
                f"it as it was, or start from the checkpoint's weights with --model {checkpoint}"
            )
    step, last = checkpoint_step(checkpoint), recipe.config.get("max_steps", -1)
    # A run that stopped between its last step and its summary still has to evaluate.
    done = step >= last if run.summary.is_file() else step > last
    if last > 0 and done:
        raise UserError(f"resume_from_checkpoint: {checkpoint} is at step {step} already; raise max_steps")


def warn_of_changes(
    recipe: Recipe, config: Mapping[str, Any], checkpoint: Path, rows: str, code: Mapping[str, str]
) -> None:
    """Print on one line what differs from the checkpoint's run: options, training rows, and the user's own code.

    rows: the digest of the training rows. code: the result of `code_fingerprints`. Raises UserError for other rows
    under the same options.
    """
    changed = changed_options(recipe, config, checkpoint)
    other_rows = has_other_rows(checkpoint, rows)
    if other_rows and not changed:
        raise UserError(
            f"resume_from_checkpoint: the run of {checkpoint} had other training rows, or these in another order: a "
            "file of `data` or `data_ratings` has changed since; restore it, or start from the checkpoint's weights "
            f"with --model {checkpoint}"
        )
    differences = [f"{name}: {old} -> {new}" for name, (old, new) in changed.items()]
    differences += ["other training rows"] * other_rows
    differences += [f"{file} has changed" for file in changed_code(checkpoint, code)]
    if differences:
        tell(
            f"warning: the resumed run has other inputs than the original ({'; '.join(differences)}): it will differ "
            "from the interrupted run"
        )


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1_000_000).removesuffix("\n...\n").strip()
