"""A training run's checked rewards and data. Mistakes are found before a model is loaded, most before torch."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cppo.data import RECORD_COLUMNS, MissingColumns, PixelBounds, RecordSource, load_records, to_dataset
from cppo.errors import UserError
from cppo.options import RunOptions, TrainOptions, check_gate_reward
from cppo.recipes import Recipe
from cppo.rewards import RewardFunction, RewardSpec, check_rewards, load_reward, reward_columns
from cppo.rewards.asking import ASK_POLICY, asks_policy
from cppo.runs.rated_rows import choose_rated


@dataclass(frozen=True)
class RunSources:
    """Rewards (names and functions), and records: for training, for the final evaluation, for evaluations during
    training and for probes (None: none). `outside_bands`: the number of rows that their ratings leave out."""

    reward_specs: list[RewardSpec]
    rewards: list[RewardFunction]
    train: RecordSource
    held_out: RecordSource | None
    evaluation: RecordSource | None
    probes: RecordSource | None
    outside_bands: int = 0


def load_sources(recipe: Recipe) -> RunSources:
    """Read the rewards and the data of a recipe for `cppo train`; a user's own reward is imported and tried.

    Raises UserError for an unusable reward, or one that names a missing column; a gate by another reward; unusable
    data, naming file, row and reason; evaluation without held-out data.
    """
    options = recipe.options
    assert isinstance(options, TrainOptions)
    specs = check_rewards(recipe.rewards, recipe.config.get("reward_weights"))
    rewards = {spec.text: load_reward(spec) for spec in specs}
    check_gate_reward(recipe.resolved, [reward.__name__ for reward in rewards.values()])
    evaluates = recipe.config.get("eval_strategy", "no") != "no"
    probes = options.eval_data is not None if options.probe_steps is None else options.probe_steps > 0
    train = load_rows(options, options.data, "train", rewards=rewards, with_facts=options.data_ratings is not None)
    train, outside_bands = choose_rated(train, options, recipe.resolved["data_stages"])
    own = [rewards[spec.text] for spec in specs if not spec.is_built_in]
    if own:
        _try_rewards(own, train.keep([0]), options.system_prompt)
    return RunSources(
        specs,
        list(rewards.values()),
        train,
        held_out(options, options.final_eval_samples) if options.final_eval_samples else None,
        held_out(options, options.eval_limit, rewards) if evaluates else None,
        held_out(options, options.probe_items) if probes else None,
        outside_bands,
    )


def held_out(
    options: RunOptions, limit: int | None, rewards: Mapping[str, RewardFunction] | None = None
) -> RecordSource:
    """The first `limit` records of `eval_data`, with the columns that rewards name.

    Raises UserError as `load_sources` does.
    """
    if options.eval_data is None:
        raise UserError("evaluation needs `eval_data`: give held-out data")
    return load_rows(options, options.eval_data, "test", limit, rewards)


def load_rows(
    options: RunOptions,
    specs: str | list[str],
    split: str,
    limit: int | None = None,
    rewards: Mapping[str, RewardFunction] | None = None,
    *,
    with_facts: bool = False,
) -> RecordSource:
    """The records of SPECs with the columns that the rewards, given by name, take as parameters.

    with_facts: as in `load_records`. Raises UserError as `load_sources` does.
    """
    named = {text: reward_columns(function) for text, function in (rewards or {}).items()}
    needed = {column: text for text, columns in named.items() for column, needs in columns.items() if needs}
    wanted = dict.fromkeys(column for columns in named.values() for column in columns)
    try:
        source = load_records(
            specs,
            split=split,
            limit=limit,
            columns=options.columns,
            max_bad_fraction=options.max_bad_fraction,
            pixels=PixelBounds.of(vars(options)),
            prompt_suffix=options.prompt_suffix,
            images_per_row=options.images_per_row if split == "train" else None,
            extras=[name for name in needed if name not in RECORD_COLUMNS],
            optional=[name for name in wanted if name not in {*needed, *RECORD_COLUMNS}],
            with_facts=with_facts,
        )
    except MissingColumns as error:
        raise UserError(f"{error}; {_takers(needed, error.columns)}") from error
    partly = [name for name in needed if name not in source.columns]
    if partly:
        names = ", ".join(map(repr, partly))
        raise UserError(f"{source.name}: not every row has {names}; {_takers(needed, partly)}")
    return source


def check_responses(source: RecordSource) -> None:
    """Whether every row has the reference response that supervised fine-tuning learns from. Raises UserError."""
    if "response" in source.columns:
        return
    lacking = [index for index in range(len(source)) if source.response(index) is None]
    which = "no row has" if len(lacking) == len(source) else f"{source.place(lacking[0])} lacks"
    raise UserError(
        f"data {source.name!r}: {which} the column `response`, the text that supervised fine-tuning teaches, such as "
        r'"<think>I count 3 birds.</think> \boxed{3}": add it to every row, or name yours with '
        '--columns "{response: THEIR_NAME}"; `cppo train` needs none'
    )


def _takers(needed: Mapping[str, str], columns: Sequence[str]) -> str:
    """Words for the rewards that need the columns; `needed`: the reward of each."""
    rewards = dict.fromkeys(needed[column] for column in columns)
    return f"needed by the parameters of reward {', '.join(map(repr, rewards))}"


def _try_rewards(rewards: list[RewardFunction], source: RecordSource, system_prompt: str | None) -> None:
    """Call the user's own rewards as the trainer will: with two made-up completions of the one row of `source`.

    An `async` one is skipped: its open resources, such as connections, would belong to another event loop than the
    trainer's. Raises UserError if one fails or returns no rewards.
    """
    from transformers import TrainerState  # imports torch
    from trl import prepare_multimodal_messages

    row = to_dataset(source, system_prompt=system_prompt)[0]
    prompt = row.pop("prompt")
    if row["images"]:
        prompt = prepare_multimodal_messages(prompt, images=row["images"])
    texts = (rf"<think> It is seen. </think> \boxed{{{row['answer']}}}", "I cannot tell.")
    arguments = {
        **{name: [value] * len(texts) for name, value in row.items()},
        "prompts": [prompt] * len(texts),
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [[0]] * len(texts),
        "trainer_state": TrainerState(epoch=0, max_steps=1, num_train_epochs=1),
        **dict.fromkeys(("log_extra", "log_metric"), lambda *_, **__: None),
        ASK_POLICY: lambda questions, _: [None if one is None else texts[0] for one in questions],
    }
    for reward in rewards:
        try:
            if not inspect.iscoroutinefunction(reward):
                taken = {name: value for name, value in arguments.items() if name != ASK_POLICY or asks_policy(reward)}
                reward(**taken)
        except UserError as error:
            raise UserError(f"{error} (tried on the first row with two made-up completions)") from error
