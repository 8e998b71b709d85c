"""The tables and figures of docs/results/evidence.md, from the results of the evidence studies that lie beside it.

Each table stands between a line `<!-- table: STUDY -->` and a line `<!-- end -->`, and is written anew there; after
`<!-- table: STUDY METHOD -->` it is that method's differences from the others. Figures that the page shows go into the
folder `figures`. Differences are paired by seed, with the study's control if nothing else is said, after the last step,
in points, with 95 % t intervals over seeds; one of at least five seeds whose interval excludes 0 is bold.

    python benchmarks/evidence.py docs/results
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cppo.comparison.tables import points
from cppo.evaluation.statistics import t_interval
from cppo.reports.charts import interval_chart

PAGE = "evidence.md"
OVER_TASKS = "mean of tasks"
LEAST_SEEDS = 5
TABLE = re.compile(r"(<!-- table: (?P<study>\S+)(?: (?P<method>\S+))? -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
FIGURE = re.compile(r"figures/(?P<study>[a-z-]+)-(?P<condition>[a-z_]+)\.svg")
STYLE = """<style>
text { font: 14px system-ui, sans-serif; fill: #5d6b7c; } text.row { fill: #1b2430; } .grid { stroke: #e1e5ea; }
.bar { fill: none; stroke: #0072b2; stroke-width: 2; } .mark { fill: #0072b2; stroke: #0072b2; stroke-width: 1.6; }
</style><rect width="100%" height="100%" fill="#fff"/>"""

Rows = dict[tuple[str, str], dict[str, dict[str, Any]]]
"""(task, method) -> condition -> difference from the control, an interval in fractions of 1."""


def differences(results: Mapping[str, Any]) -> Rows:
    """Every method's difference from the control, on each task and, with several, averaged over them."""
    found = {
        (task, label): method["difference"]
        for task, compared in results["comparison"].items()
        for label, method in compared["methods"].items()
        if "difference" in method
    }
    found |= {(OVER_TASKS, label): difference for label, difference in results["over_tasks"].items()}
    return {key: {name: one["equal_steps"] for name, one in row.items()} for key, row in found.items()}


def against_others(rows: Rows, method: str) -> Rows:
    """A method's differences from the others: what both differ from the control by, subtracted seed by seed."""
    found: Rows = {}
    for (task, other), row in rows.items():
        if other == method or (task, method) not in rows:
            continue
        found[task, other] = {}
        for condition, theirs in row.items():
            ours = rows[task, method][condition]["by_seed"]
            shared = [ours[seed] - value for seed, value in theirs["by_seed"].items() if seed in ours]
            found[task, other][condition] = asdict(t_interval(shared))
    return found


def table(results: Mapping[str, Any], method: str | None = None) -> Iterator[str]:
    """A study's differences as lines of Markdown: every method's from the control, or one method's from the others."""
    study, conditions = results["study"], results["study"]["conditions"]
    rows = differences(results)
    if method is None:
        ran, left = len(results["cells"]), len(results["unfinished"])
        yield f"{ran} cells have run, {left} have not. Against `{study['control']}`:"
    else:
        rows = against_others(rows, method)
        yield f"`{method}` against the others:"
    yield ""
    yield f"| task | {'method' if method is None else 'against'} | seeds | {' | '.join(conditions)} |"
    yield "|" + "---|" * (3 + len(conditions))
    for (task, label), row in rows.items():
        values = " | ".join(marked(row[name]) for name in conditions)
        yield f"| {task} | {label} | {row[conditions[0]]['n']} | {values} |"


def marked(difference: Mapping[str, Any]) -> str:
    """In points with its interval, bold where enough seeds exclude 0; a single seed has none."""
    text = points(difference)
    decides = difference["n"] >= LEAST_SEEDS and (difference["low"] > 0 or difference["high"] < 0)
    return f"**{text}**" if decides else text


def figure(results: Mapping[str, Any], condition: str) -> str:
    """The differences under one condition as an SVG file of its own."""
    rows = [
        (f"{task}: {label}", 100 * one["mean"], (100 * one["low"], 100 * one["high"]))
        for (task, label), row in differences(results).items()
        if (one := row[condition])["low"] is not None
    ]
    x_title = f"{condition}, points against {results['study']['control']}"
    chart = str(interval_chart(rows, title=f"{results['study']['name']}, {condition}", x_title=x_title, percent=False))
    head, body = chart.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{STYLE}{body}\n'


def main(argv: Sequence[str] | None = None) -> None:
    """Write page and figures."""
    parser = argparse.ArgumentParser(description="Writes the tables and figures of evidence.md anew.")
    parser.add_argument("folder", type=Path, help="where the page and the studies' folders are")
    folder = parser.parse_args(argv).folder

    def results_of(found: re.Match) -> dict[str, Any]:
        return json.loads((folder / found["study"] / "results.json").read_text(encoding="utf-8"))

    page = folder / PAGE
    text = TABLE.sub(
        lambda found: "\n".join([found[1] + "\n".join(table(results_of(found), found["method"])), found["end"]]),
        page.read_text(encoding="utf-8"),
    )
    for found in FIGURE.finditer(text):
        (folder / "figures").mkdir(exist_ok=True)
        (folder / found[0]).write_text(figure(results_of(found), found["condition"]), encoding="utf-8")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
