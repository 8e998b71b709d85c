"""The data of a training run, read and checked. Imports no torch: bad data is found before a model is loaded."""

from dataclasses import dataclass

from cppo.data import PixelBounds, RecordSource, load_records
from cppo.errors import UserError
from cppo.recipes import Recipe, TrainOptions


@dataclass(frozen=True)
class RunSources:
    """Records to train on, and those of the final evaluation, of evaluations during training and of probes (None:
    none)."""

    train: RecordSource
    held_out: RecordSource | None
    evaluation: RecordSource | None
    probes: RecordSource | None


def load_sources(recipe: Recipe) -> RunSources:
    """Read what a recipe for `cppo train` asks for.

    Raises:
        UserError: data that cannot be used, naming file, row and reason; evaluation without held-out data.
    """
    options = recipe.options
    assert isinstance(options, TrainOptions)
    evaluates = recipe.config.get("eval_strategy", "no") != "no"
    probes = options.eval_data is not None if options.probe_steps is None else options.probe_steps > 0
    return RunSources(
        _load(options, options.data, "train"),
        _held_out(options, options.final_eval_samples) if options.final_eval_samples else None,
        _held_out(options, options.eval_limit) if evaluates else None,
        _held_out(options, options.probe_items) if probes else None,
    )


def _held_out(options: TrainOptions, limit: int | None) -> RecordSource:
    if options.eval_data is None:
        raise UserError("evaluation needs `eval_data`: give held-out data")
    return _load(options, options.eval_data, "test", limit)


def _load(options: TrainOptions, specs: str | list[str], split: str, limit: int | None = None) -> RecordSource:
    return load_records(
        specs,
        split=split,
        limit=limit,
        columns=options.columns,
        max_bad_fraction=options.max_bad_fraction,
        pixels=PixelBounds(options.min_pixels, options.max_pixels),
    )
