"""Batches that the data or their groups do not fit: the options that the error names are enough, when pasted."""

import itertools
import re

import pytest
from trl import GRPOConfig

from cppo.cli.fields import parse_recipe
from cppo.errors import UserError
from cppo.options import Batch
from cppo.options.batches import check_rows
from cppo.runs.checks import check_options
from cppo.runs.prepare import build_config
from cppo.training.config import check_enough


def start(argv, rows):
    """What a start checks of batches; the message of the first error, None without."""
    recipe = parse_recipe("train", argv, default_recipe="micro", description="")
    try:
        check_options(recipe)
        by_rollouts = bool(recipe.config.get("generation_batch_size"))
        check_enough("mine", rows, build_config(recipe), by_rollouts=by_rollouts)
    except UserError as error:
        return str(error)
    return None


def pasted(message):
    return re.search(r"give ((?:--\w+ \d+ ?)+)", message).group(1).split()


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize(
    "argv",
    [
        "--config cppo-3b",
        "--config cppo-3b --per_device_train_batch_size 3",
        "--config cppo-3b --num_generations 7",
        "--config cppo-3b --eval_data tasks:digits?n=4 --eval_strategy steps --eval_steps 5",
        "--per_device_train_batch_size 12 --eval_strategy steps --eval_steps 5 --per_device_eval_batch_size 6",
        "--generation_batch_size 320 --per_device_train_batch_size 64 --num_generations 6",
        "--generation_batch_size 384 --per_device_train_batch_size 64",
    ],
)
def test_one_error_names_the_whole_cure(argv, rows):
    """For few rows, cut groups, evaluation, and all of them at once."""
    argv = [*argv.split(), "--data", f"tasks:digits?n={rows}", "--use_cpu", "true", "--bf16", "false"]
    argv += [] if "--eval_data" in argv else ["--eval_data", "tasks:digits?n=4"]
    message = start(argv, rows)
    assert message is not None
    assert start([*argv, *pasted(message)], rows) is None


def test_a_cure_is_the_largest_batch_that_trl_takes(tmp_path):
    """Against every other choice of micro-batch and number of them, as TRL judges it, with the group as it is."""
    for group, device, steps, rows in [(5, 5, 64, 20), (4, 6, 3, 2), (3, 8, 2, 5), (8, 12, 2, 2)]:
        accepted = []
        for size, count in itertools.product(range(1, device + 1), range(1, steps + 1)):
            options = {"per_device_train_batch_size": size, "steps_per_generation": count, "num_generations": group}
            try:
                args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
            except ValueError:
                continue
            if args.generation_batch_size <= rows * group:
                accepted.append(args.generation_batch_size)
        found = Batch(group, device, steps, processes=1).mended(rows)
        assert found.rollouts in accepted
        same_size = [size for size in accepted if size % device == 0]
        assert found.rollouts == max(same_size or accepted)


def test_too_few_rows_for_any_batch_name_how_many_are_needed():
    with pytest.raises(UserError, match=r"give at least 8 rows$"):
        check_rows("mine", 1, Batch(group=5, device=5, steps=1, processes=8))
