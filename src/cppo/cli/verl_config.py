"""`cppo verl-config`: write a recipe as the command line, or the file of options, of a run inside verl."""

import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from cppo.cli.fields import parsed_recipe, recipe_parser
from cppo.cli.parser import COUNT, Parser, check_output_file
from cppo.errors import tell
from cppo.verl.batches import MODES

if TYPE_CHECKING:
    from cppo.verl.translate import Translation

DEFAULT_RECIPE = "cppo-3b"
DESCRIPTION = (
    "Prints the commands that train a recipe of `cppo train` inside verl. For each option that verl lacks it "
    "says what verl does instead. It needs neither verl nor a GPU."
)


def run(argv: Sequence[str]) -> None:
    """Print the commands, or write the file. Raises UserError for a user's mistake."""
    arguments, found = _translated(argv)

    from cppo.verl.command import overrides, write_options

    remarks = [f"not in verl: {line}" for line in found.instead]
    for remark in remarks:
        tell(remark)
    print(shlex.join(["mkdir", "-p", found.options["trainer.default_local_dir"]]))
    for words in found.data:
        print(shlex.join(["cppo", "verl-data", *words]))
    if arguments.out is None:
        print(" \\\n  ".join(["python -m cppo.verl", *map(shlex.quote, overrides(found.options))]))
    else:
        write_options(found.options, Path(arguments.out), remarks)
        print(shlex.join(["python", "-m", "cppo.verl", "--config", arguments.out]))


def translation(argv: Sequence[str]) -> "Translation":
    """The arguments as a run inside verl. Raises UserError as `run` does."""
    return _translated(argv)[1]


def _translated(argv: Sequence[str]) -> tuple[Namespace, "Translation"]:
    parser = recipe_parser(
        "train", argv, default_recipe=DEFAULT_RECIPE, description=DESCRIPTION, program="cppo verl-config"
    )
    _add_options(parser)
    recipe, arguments = parsed_recipe("train", parser, argv)
    check_output_file("--out", arguments.out)

    from cppo.verl.batches import Cluster
    from cppo.verl.translate import translate

    names = [field.name for field in fields(Cluster)]
    return arguments, translate(recipe, Cluster(**{name: getattr(arguments, name) for name in names}))


def _add_options(parser: Parser) -> None:
    group = parser.add_argument_group("verl")
    group.add_argument("--out", metavar="FILE", help="write verl's options as YAML, for `python -m cppo.verl --config`")
    group.add_argument("--nodes", type=COUNT, default=1, metavar="N", help="nodes that train (default: 1)")
    group.add_argument("--gpus_per_node", type=COUNT, default=8, metavar="N", help="GPUs of each node (default: 8)")
    group.add_argument(
        "--mode", choices=MODES, default="sync", help="how rollouts and updates take turns (default: sync)"
    )
    group.add_argument(
        "--rollout_nodes", type=COUNT, default=1, metavar="N", help="separate_async: additional nodes that generate"
    )
    group.add_argument(
        "--recipe_gpus",
        type=COUNT,
        default=8,
        metavar="N",
        help="number of processes assumed by the recipe's batch sizes (default: 8); verl's batches count prompts",
    )
