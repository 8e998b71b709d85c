"""`cppo init`: write a commented recipe for your data, model and machine."""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from cppo.cli.console import quiet_libraries
from cppo.cli.parser import Parser, add_data_options
from cppo.errors import UserError
from cppo.methods import get_method
from cppo.recipes import Recipe

if TYPE_CHECKING:
    from cppo.runs.first_recipe import Machine

DEFAULT_FILE = "recipe.yaml"
QUESTIONS = {
    "data": "Your data: a .jsonl or .parquet file, a folder with a metadata.jsonl, tasks:NAME or hub:ORG/NAME",
    "model": "The model: micro, a folder or a Hugging Face name",
    "machine": "The machine: here, cpu, or GPUS x GiB such as 1x24 or 8x80",
}
MACHINE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3}(?:\.\d+)?)")


def run(argv: Sequence[str]) -> None:
    """Ask for what is missing, write the recipe, and print how to try it. Raises UserError for a user's mistake."""
    arguments = _parser().parse_all(argv)
    if arguments.method is not None:
        get_method(arguments.method)
    file = Path(arguments.out)
    if file.exists():
        raise UserError(f"--out: {file} exists already; give another file")
    if not file.absolute().parent.is_dir():
        raise UserError(f"--out: cannot write {file}: there is no such folder")
    _ask(arguments)
    quiet_libraries()

    from cppo.runs.first_look import look_at_data, look_at_model
    from cppo.runs.first_recipe import as_yaml, first_recipe

    machine = _machine(arguments.machine)
    data = look_at_data(arguments.data, arguments.columns, arguments.max_bad_fraction)
    print("".join(f"unread     {line}\n" for line in data.source.unread), end="")
    model = look_at_model(arguments.model)
    choices, recipe = first_recipe(data, model, machine, arguments.method, _free_folder(f"runs/{file.stem}"))
    launch = _launch(recipe, machine)
    heading = (
        f"CPPO on {', '.join(data.specs)} with {model.name} on {machine}, as chosen by `cppo init`. Every "
        f"value may be changed.\nTry it: cppo train --config {file} --dry_run\nTrain:  {launch} --config "
        f"{file}"
    )
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(as_yaml(heading, choices))
    except OSError as error:
        raise UserError(f"--out: cannot write {file}: {error.strerror}") from error
    print(f"recipe     {file}\ntry it     cppo train --config {file} --dry_run\ntrain      {launch} --config {file}")


def _free_folder(name: str) -> str:
    """The name, with the first number from 2 on that makes it new if it exists."""
    numbered = (f"{name}-{number}" for number in count(2))
    return next(folder for folder in chain([name], numbered) if not Path(folder).exists())


def _ask(arguments: Namespace) -> None:
    """Ask on the terminal for what is missing. Raises UserError without a terminal."""
    missing = [name for name in QUESTIONS if not getattr(arguments, name)]
    if missing and not sys.stdin.isatty():
        raise UserError(f"init needs {' and '.join(f'--{name}' for name in missing)}: there is no terminal to ask on")
    for name in missing:
        answer = ""
        while not answer:
            try:
                answer = input(f"{QUESTIONS[name]}: ").strip()
            except EOFError as error:
                raise UserError(f"init needs --{name}: the input has ended") from error
        setattr(arguments, name, [answer] if name == "data" else answer)


def _machine(text: str) -> "Machine":
    """The machine that `--machine` names. Raises UserError for another text."""
    from cppo.runs.first_recipe import GIB, Machine

    if text == "cpu":
        return Machine(0)
    if text == "here":
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        memory = min((torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus)), default=0)
        return Machine(gpus, round(memory / GIB, 1))
    found = MACHINE.fullmatch(text)
    if found is None:
        raise UserError(f"--machine: expected here, cpu, or GPUS x GiB such as 1x24 or 8x80, got {text!r}")
    return Machine(int(found[1]), float(found[2]))


def _launch(recipe: Recipe, machine: "Machine") -> str:
    """The command that starts training, without its options."""
    if machine.gpus <= 1:
        return "cppo train"
    if recipe.options.use_peft:
        return f"torchrun --standalone --nproc_per_node {machine.gpus} -m cppo train"
    launcher = f"accelerate launch --config_file 8gpu-fsdp2.yaml --num_processes {machine.gpus}"
    return f"cppo recipes copy 8gpu-fsdp2 && {launcher} -m cppo train"


def _parser() -> Parser:
    parser = Parser(
        prog="cppo init",
        description="Checks data, a model's configuration and a machine. Writes a recipe that trains, with the reason "
        "of each choice. On a terminal it asks for missing values.",
    )
    add_data_options(parser, required=False)
    parser.add_argument("--model", metavar="NAME", help="micro, a folder or a Hugging Face name")
    parser.add_argument(
        "--machine", metavar="here|cpu|NxGiB", help="the machine: here, cpu, or GPUS x GiB such as 1x24 or 8x80"
    )
    parser.add_argument("--method", metavar="NAME", help="a method (default: cppo, or grpo for data without images)")
    parser.add_argument("--out", default=DEFAULT_FILE, metavar="FILE", help=f"the recipe (default: {DEFAULT_FILE})")
    return parser
