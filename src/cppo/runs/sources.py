"""What a training run reads, checked: its rewards and its data. Imports no torch: mistakes are found before a model is
loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from cppo.data import RECORD_COLUMNS, PixelBounds, RecordSource, load_records
from cppo.errors import UserError
from cppo.recipes import Recipe, TrainOptions
from cppo.rewards import DEFAULT_REWARDS, RewardFunction, RewardSpec, check_rewards, load_reward, reward_columns


@dataclass(frozen=True)
class RunSources:
    """Rewards (names and functions) and records: to train on, and those of the final evaluation, of evaluations during
    training and of probes (None: none)."""

    reward_specs: list[RewardSpec]
    rewards: list[RewardFunction]
    train: RecordSource
    held_out: RecordSource | None
    evaluation: RecordSource | None
    probes: RecordSource | None


def load_sources(recipe: Recipe) -> RunSources:
    """Read what a recipe for `cppo train` asks for; a reward of the user's own is imported.

    Raises:
        UserError: a reward that cannot be used, or names a column that is not there; data that cannot be used, naming
            file, row and reason; evaluation without held-out data.
    """
    options = recipe.options
    assert isinstance(options, TrainOptions)
    specs = check_rewards(options.rewards or DEFAULT_REWARDS, recipe.config.get("reward_weights"))
    rewards = [load_reward(spec) for spec in specs]
    needed = reward_columns(rewards)
    evaluates = recipe.config.get("eval_strategy", "no") != "no"
    probes = options.eval_data is not None if options.probe_steps is None else options.probe_steps > 0
    return RunSources(
        specs,
        rewards,
        _load(options, options.data, "train", columns=needed),
        _held_out(options, options.final_eval_samples) if options.final_eval_samples else None,
        _held_out(options, options.eval_limit, needed) if evaluates else None,
        _held_out(options, options.probe_items) if probes else None,
    )


def _held_out(options: TrainOptions, limit: int | None, columns: Sequence[str] = ()) -> RecordSource:
    if options.eval_data is None:
        raise UserError("evaluation needs `eval_data`: give held-out data")
    return _load(options, options.eval_data, "test", limit, columns)


def _load(
    options: TrainOptions, specs: str | list[str], split: str, limit: int | None = None, columns: Sequence[str] = ()
) -> RecordSource:
    """The records of SPECs with the `columns` that rewards name."""
    source = load_records(
        specs,
        split=split,
        limit=limit,
        columns=options.columns,
        max_bad_fraction=options.max_bad_fraction,
        pixels=PixelBounds(options.min_pixels, options.max_pixels),
        extras=[name for name in columns if name not in RECORD_COLUMNS],
    )
    for name in columns:
        if name not in source.columns:
            raise UserError(f"rewards: one has a parameter {name}, a column that not every row of {source.name} fills")
    return source
