"""Command line options from a configuration's fields, `--any_config_field VALUE`, without importing torch."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cppo.cli.console import option_text
from cppo.cli.parser import Parser
from cppo.fields import NO_DEFAULT, OptionField
from cppo.options import Schema, schema
from cppo.recipes import Recipe, load_recipe
from cppo.values import value_from_words

MOST_CHOICES_SHOWN = 10
"""With more choices than this the help shows NAME."""


def parse_recipe(command: str, argv: Sequence[str], *, default_recipe: str, description: str) -> Recipe:
    """The recipe from the arguments of `cppo train` or `cppo sft`.

    Args:
        default_recipe: the recipe without `--config`.

    Raises:
        UserError: unknown option, wrong value, missing recipe file.
    """
    parser = recipe_parser(command, argv, default_recipe=default_recipe, description=description)
    return parsed_recipe(command, parser, argv)[0]


def recipe_parser(
    command: str, argv: Sequence[str], *, default_recipe: str, description: str, program: str | None = None
) -> Parser:
    """The parser of a recipe's options; a `program` other than `cppo COMMAND` may add its own options."""
    show_all = "--help-all" in argv
    return _parser(schema(command), default_recipe, description, show_inherited=show_all, program=program)


def parsed_recipe(command: str, parser: Parser, argv: Sequence[str]) -> tuple[Recipe, argparse.Namespace]:
    """The recipe from the arguments, and all arguments. Raises UserError as `parse_recipe` does."""
    if "--help-all" in argv:
        parser.print_help()
        parser.exit()
    options, arguments = schema(command), parser.parse_all(argv)
    given = {name: words for name, words in vars(arguments).items() if name in options.fields}
    return load_recipe(command, arguments.config, given_values(options, given)), arguments


def given_values(options: Schema, given: Mapping[str, list[str] | None]) -> dict[str, Any]:
    """The values of options that were given as words. Raises UserError for a wrong value."""
    return {
        name: value_from_words(options.fields[name], words, where=f"--{name}")
        for name, words in given.items()
        if words is not None
    }


def _parser(
    options: Schema, default_recipe: str, description: str, *, show_inherited: bool, program: str | None
) -> Parser:
    program = program or f"cppo {options.command}"
    parser = Parser(
        prog=program,
        description=description,
        usage=f"{program} [--config NAME|FILE.yaml] [--any_field VALUE ...]",
        named_otherwise=options.named_otherwise,
    )
    parser.add_argument("--help-all", action="help", help="show the fields inherited from TRL and transformers too")
    parser.add_argument(
        "--config",
        default=default_recipe,
        metavar="NAME|FILE",
        help="a packaged recipe (see `cppo recipes list`) or a YAML file, which may set every option below "
        f"(default: {default_recipe})",
    )
    output_dir = replace(
        options.inherited["output_dir"],
        default="runs/<recipe>",
        help="The run directory: metrics, checkpoints, model, report.",
    )
    add_group(parser, "run", [*options.run.values(), output_dir])
    if options.own:
        add_group(parser, "CPPO", options.own.values())
    inherited = [field for field in options.inherited.values() if field.name != "output_dir"]
    if show_inherited:
        add_group(parser, "inherited from TRL and transformers", inherited)
        return parser
    group = parser.add_argument_group(
        "inherited from TRL and transformers",
        f"{len(inherited)} more fields, such as --learning_rate, --max_steps, --num_generations, "
        f"--per_device_train_batch_size, --beta: `{program} --help-all` lists them."
        if options.command == "train"
        else f"{len(inherited)} more fields, such as --learning_rate, --max_steps, --per_device_train_batch_size: "
        "`cppo sft --help-all` lists them.",
    )
    for field in inherited:
        _add_option(group, field, argparse.SUPPRESS)
    return parser


def add_group(parser: Parser, title: str, fields: Iterable[OptionField]) -> None:
    """Add an option for each field, under a title in the help."""
    group = parser.add_argument_group(title)
    for field in fields:
        _add_option(group, field, _help_text(field))


def _add_option(group: Any, field: OptionField, help_text: str) -> None:
    arity: dict[str, Any] = {"nargs": 1}
    if "list" in field.kinds:
        arity = {"nargs": "+"}
    elif "bool" in field.kinds:
        arity = {"nargs": "?", "const": "true"}
    group.add_argument(
        f"--{field.name}",
        dest=field.name,
        action=_Words,
        metavar=_metavar(field),
        help=help_text,
        default=None,
        **arity,
    )


class _Words(argparse.Action):
    """Keeps the option's text as a list of words, for any number of arguments."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values if isinstance(values, list) else [values])


def _metavar(field: OptionField) -> str:
    if len(field.choices) > MOST_CHOICES_SHOWN:
        return "NAME"
    if field.choices:
        return "|".join([*map(str, field.choices), *(["FILE.py:FUNCTION"] if field.functions else [])])
    for kind, word in (("list", "VALUE"), ("dict", "{..}"), ("str", "TEXT"), ("float", "X"), ("int", "N")):
        if kind in field.kinds:
            return word
    return "true|false"


def _help_text(field: OptionField) -> str:
    default = "" if field.default in (NO_DEFAULT, None) else f" (default: {option_text(field.default)})"
    return (field.help + default).strip().replace("%", "%%")
