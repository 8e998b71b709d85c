"""`cppo methods`: list the methods of `cppo train --method` in groups, compare them, or show one's options."""

import json
from collections.abc import Sequence

from cppo.cli.console import option_text
from cppo.cli.parser import Parser
from cppo.errors import UserError
from cppo.methods import GROUPS, METHODS, Method, get_method, grouped_methods

FORMATS = ("text", "markdown", "json")


def run(argv: Sequence[str]) -> None:
    """Print the methods by group, their table, or one method. Raises UserError for an unknown name."""
    parser = Parser(prog="cppo methods", description="Methods for `cppo train --method NAME`.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="show what it is, and every option that it sets")
    parser.add_argument("--table", action="store_true", help="blocks, extra passes and models of each, side by side")
    parser.add_argument("--format", choices=FORMATS, help="format of the list or the table (default: text)")
    arguments = parser.parse_all(argv)
    if arguments.name is None:
        print(table_text(arguments.format) if arguments.table else list_text(arguments.format))
    elif arguments.table or arguments.format:
        raise UserError("--table and --format are for all methods: leave NAME out")
    else:
        print(method_text(get_method(arguments.name)))


def list_text(form: str | None) -> str:
    """All methods by group, each with its first sentence."""
    grouped = grouped_methods()
    if form == "json":
        entries = [{"group": group, "method": m.name, "what": m.summary} for group in grouped for m in grouped[group]]
        return json.dumps(entries, indent=1)
    width = max(map(len, METHODS))
    parts = []
    for group, methods in grouped.items():
        if form == "markdown":
            lines = [f"**{GROUPS[group]}**", "", "| method | what it is |", "|---|---|"]
            lines += [f"| `{method.name}` | {method.summary} |" for method in methods]
        else:
            lines = [GROUPS[group], *(f"  {method.name:<{width}}  {method.summary}" for method in methods)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def table_text(form: str | None) -> str:
    """All methods side by side, in the order of the groups."""
    from cppo.reports.method_table import COLUMNS, as_markdown, as_text, method_row  # which imports torch

    rows = [method_row(method) for methods in grouped_methods().values() for method in methods]
    if form == "json":
        return json.dumps(rows, indent=1)
    return as_markdown(COLUMNS, rows) if form == "markdown" else as_text(rows)


def method_text(method: Method) -> str:
    """Summary of one method, with every option and reward that it sets."""
    lines = [method.text, "", *(f"{option}: {option_text(value)}" for option, value in method.options.items())]
    if method.rewards:
        lines.append(f"rewards: {', '.join(f'{name} x {weight:g}' for name, weight in method.rewards.items())}")
    return "\n".join(lines)
