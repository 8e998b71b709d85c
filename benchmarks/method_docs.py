"""Write the tables of the pages about methods: the output of `cppo methods`, and the cost of each method's step.

    python benchmarks/method_docs.py

A table is between two comments, `<!-- table: NAME -->` and `<!-- end -->`. A test checks that the pages have
the present tables.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cppo.cli.methods import list_text, table_text
from cppo.methods import grouped_methods
from cppo.reports.method_table import NONE, as_markdown, extra_passes

DOCS = Path(__file__).parents[1] / "docs"
COSTS = DOCS / "results" / "method_cost.json"
PAGES = {DOCS / "choose" / "methods.md": ("methods", "costs"), DOCS / "reference" / "blocks.md": ("blocks",)}
"""The names of each page's tables."""


def cost_table(costs: Mapping[str, Any]) -> str:
    """Extra passes and measured time of a step, for the measured methods, in the order of the groups."""
    rows = []
    for method in (one for methods in grouped_methods().values() for one in methods if one.name in costs["methods"]):
        cost = costs["methods"][method.name]
        passes = {kind: what or NONE for kind, what in extra_passes(method).items()}
        time, spread = cost["time"], ""
        if cost["pairs"] > 1:
            spread = f" [{time['smallest']:.2f}, {time['largest']:.2f}]"
        rows.append({"method": method.name, **passes, "time": f"{time['ratio']:.2f}{spread}"})
    return as_markdown(list(rows[0]), rows)


def conditions(costs: Mapping[str, Any]) -> str:
    """One line with the conditions of the measurement."""
    pairs = {cost["pairs"] for cost in costs["methods"].values()}
    loads = [pair["load"] for pairs in costs["pairs"].values() for pair in pairs]
    versions = ", ".join(f"{name} {number}" for name, number in costs["versions"].items())
    return (
        f"{costs['machine']['processor']}, {costs['machine']['cores']} cores, one thread; {versions}. "
        f"Pairs a method: {' or '.join(map(str, sorted(pairs)))}. "
        f"Load of the machine: {min(loads):.0f} to {max(loads):.0f}, this measurement included. {costs['conditions']}"
    ).strip()


def rewritten(page: Path) -> str:
    """The text of one of `PAGES` with the present tables. Raises SystemExit if the page has no place for one."""
    text = page.read_text(encoding="utf-8")
    costs = json.loads(COSTS.read_text(encoding="utf-8"))
    tables: dict[str, Callable[[], str]] = {
        "methods": lambda: list_text("markdown"),
        "blocks": lambda: table_text("markdown"),
        "costs": lambda: f"{conditions(costs)}\n\n{cost_table(costs)}",
    }
    for name in PAGES[page]:
        opening, closing = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(opening)
        if not found or closing not in rest:
            raise SystemExit(f"{page} has no place for the table {name!r}")
        text = f"{before}{opening}\n{tables[name]()}\n\n{closing}{rest.partition(closing)[2]}"
    return text


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rewritten(path), encoding="utf-8")
