"""The tables and figures of docs/results/evidence.md, from the cells of the evidence studies that lie beside it.

Each table stands between a line `<!-- table: STUDY -->` and a line `<!-- end -->`, and is written anew there. Several
studies, with blanks between, share one. `of METHOD,METHOD` keeps these rows alone, `against METHOD` takes the
differences from that method in place of the study's control, `at equal time` takes them at the time at which the
fastest method has ended, and `means` leaves the single tasks out; they stand in this order. Figures that the page shows
go into the folder `figures`. Differences are in points after the last step, with 95 % intervals over seeds and items
both, at equal time over seeds; one of at least five seeds whose interval excludes 0 is bold. A marker
`<!-- holm: STUDY STUDY -->` asks for the differences of each study that survive Holm's correction.

    python benchmarks/evidence.py docs/results
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from scipy.stats import ttest_1samp

from cppo.comparison.comparisons import compare
from cppo.comparison.jobs import study_jobs, timing_jobs
from cppo.comparison.study import load_study
from cppo.comparison.tables import points
from cppo.reports.charts import interval_chart

PAGE = "evidence.md"
OVER_TASKS = "mean of tasks"
LEAST_SEEDS = 5
FAMILY_ERROR = 0.05
TABLE = re.compile(
    r"(<!-- table: (?P<studies>\S+(?: evidence-\S+)*)(?: of (?P<methods>\S+))?(?: against (?P<control>\S+))?"
    r"(?P<equal_time> at equal time)?(?P<means> means)? -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
HOLM = re.compile(r"(<!-- holm: (?P<studies>[a-z -]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
FIGURE = re.compile(r"figures/(?P<study>[a-z-]+)-(?P<condition>[a-z_]+)\.svg")
STYLE = """<style>
text { font: 14px system-ui, sans-serif; fill: #5d6b7c; } text.row { fill: #1b2430; } .grid { stroke: #e1e5ea; }
.bar { fill: none; stroke: #0072b2; stroke-width: 2; } .mark { fill: #0072b2; stroke: #0072b2; stroke-width: 1.6; }
</style><rect width="100%" height="100%" fill="#fff"/>"""

Rows = dict[tuple[str, str], dict[str, dict[str, Any]]]
"""(task, method) -> condition -> difference from the control, with `low` and `high` over seeds and items; fractions."""


@cache
def results_of(folder: Path, study: str, control: str | None = None) -> dict[str, Any]:
    """What a study's finished cells show against one of its methods; None: its control."""
    loaded = load_study(study, {"output_dir": str(folder / study)})
    return compare(replace(loaded, control=control or loaded.control), study_jobs(loaded), timing_jobs(loaded), [])


def differences(results: Mapping[str, Any], budget: str = "equal_steps") -> Rows:
    """Every method's difference from the control, on each task and, with several, averaged over them."""
    found = {
        (task, label): method["difference"]
        for task, compared in results["comparison"].items()
        for label, method in compared["methods"].items()
        if "difference" in method
    }
    found |= {(OVER_TASKS, label): difference for label, difference in results["over_tasks"].items()}
    return {key: {name: _over_items_too(one[budget]) for name, one in row.items()} for key, row in found.items()}


def _over_items_too(difference: Mapping[str, Any]) -> dict[str, Any]:
    """The difference with the interval over seeds and items both, in the place of that over seeds, where it has one."""
    if "crossed_ci95" not in difference:
        return dict(difference)
    low, high = difference["crossed_ci95"] or (None, None)
    return {**difference, "low": low, "high": high}


def table(folder: Path, found: Mapping[str, str | None]) -> Iterator[str]:
    """The lines of Markdown that a marker, the groups of `TABLE`, asks for."""
    studies = (found["studies"] or "").split()
    methods = found["methods"] and found["methods"].split(",")
    several = len(studies) > 1
    for number, study in enumerate(studies):
        results = results_of(folder, study, found["control"])
        conditions = results["study"]["conditions"]
        if number == 0:
            head = f"against `{results['study']['control']}`" + (found["equal_time"] or "")
            yield f"{'| study ' * several}| task | {head} | seeds | {' | '.join(conditions)} |"
            yield "|" + "---|" * (several + 3 + len(conditions))
        rows = differences(results, "equal_time" if found["equal_time"] else "equal_steps")
        for (task, label), row in rows.items():
            if (task == OVER_TASKS or not found["means"]) and (not methods or label in methods):
                values = " | ".join(marked(row[name]) for name in conditions)
                name = f"| {study.removeprefix('evidence-')} " * several
                yield f"{name}| {task} | {label} | {row[conditions[0]]['n']} | {values} |"


def marked(difference: Mapping[str, Any]) -> str:
    """In points with its interval, bold where enough seeds exclude 0; a single seed has none."""
    text = points(difference)
    decides = difference["n"] >= LEAST_SEEDS and (difference["low"] > 0 or difference["high"] < 0)
    return f"**{text}**" if decides else text


def holm(p_values: Mapping[Any, float]) -> list[Any]:
    """The keys whose p values survive Holm's correction at 5 % over all of them, smallest first."""
    survivors: list[Any] = []
    for key in sorted(p_values, key=p_values.__getitem__):
        if p_values[key] * (len(p_values) - len(survivors)) > FAMILY_ERROR:
            break
        survivors.append(key)
    return survivors


def holm_table(folder: Path, studies: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown: of each study's mean differences those that survive, by seeds, and by seeds and items."""
    yield "| study | differences | survive by seeds | survive by seeds and items |"
    yield "|---|---|---|---|"
    for study in studies:
        rows = differences(results_of(folder, study))
        pooled = {key: row for key, row in rows.items() if key[0] == OVER_TASKS} or rows
        found = {(label, name): one for (_, label), row in pooled.items() for name, one in row.items()}
        of_seeds = {key: float(ttest_1samp(list(one["by_seed"].values()), 0).pvalue) for key, one in found.items()}
        cells = []
        for survivors in (holm(of_seeds), holm({key: one["crossed_p"] for key, one in found.items()})):
            by_label: dict[str, list[str]] = {}
            for label, name in survivors:
                by_label.setdefault(label, []).append(f"{name} {100 * found[label, name]['mean']:+.1f}")
            cells.append("; ".join(f"{label}: {', '.join(one)}" for label, one in by_label.items()) or "none")
        yield f"| {study.removeprefix('evidence-')} | {len(found)} | {' | '.join(cells)} |"


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

    def filled(found: re.Match) -> str:
        asked = found.groupdict()
        lines = table(folder, asked) if found.re is TABLE else holm_table(folder, asked["studies"].split())
        return "\n".join([found[1] + "\n".join(lines), found["end"]])

    page = folder / PAGE
    text = HOLM.sub(filled, TABLE.sub(filled, page.read_text(encoding="utf-8")))
    for found in FIGURE.finditer(text):
        (folder / "figures").mkdir(exist_ok=True)
        drawn = figure(results_of(folder, found["study"]), found["condition"])
        (folder / found[0]).write_text(drawn, encoding="utf-8")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
