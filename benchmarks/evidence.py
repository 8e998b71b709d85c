"""The tables and figures of docs/results/evidence.md, and each study's summary, from the cells of the studies.

The cells of a finished study are in `STUDY.jsonl.xz`; `STUDY.md` is its summary with all tables of `cppo compare`. The
cells of a study in progress are in the folder `STUDY`. The page has three kinds of tables, each written between its
marker and a line `<!-- end -->`:

- `<!-- table: STUDY -->`. Several studies, separated by spaces, share one. Options, in this order: `of METHOD,METHOD`
  keeps only these rows, `against METHOD` takes the differences from that method instead of the study's control, `at
  equal time` takes them at the time when the fastest method ends, and `means` leaves the single tasks out.
- `<!-- holm: STUDY STUDY -->`: the differences of each study that survive Holm's correction.
- `<!-- short:`, then lines `STUDY METHOD: TEXT`, then `-->`: one row each with the most important differences.

Differences are in points after the last step, with 95 % intervals over seeds and items both, at equal time over seeds.
A difference of at least five seeds with an interval that excludes 0 is bold. The page's figures go into the folder
`figures`.

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
from cppo.comparison.jobs import Job, sources_of, study_jobs, taken_over, timing_jobs
from cppo.comparison.study import Study, load_study
from cppo.comparison.tables import markdown, points
from cppo.reports.charts import interval_chart

PAGE = "evidence.md"
AUDIENCE = """For people who check one study.
After this page you can read each difference, at equal steps and at equal time."""
"""The first lines of each study's page."""
ARCHIVE = ".jsonl.xz"
OVER_TASKS = "mean of tasks"
LEAST_SEEDS = 5
FAMILY_ERROR = 0.05
TABLE = re.compile(
    r"(<!-- table: (?P<studies>\S+(?: evidence-\S+)*)(?: of (?P<methods>\S+))?(?: against (?P<control>\S+))?"
    r"(?P<equal_time> at equal time)?(?P<means> means)? -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
HOLM = re.compile(r"(<!-- holm: (?P<studies>[a-z -]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
SHORT = re.compile(r"(<!-- short:\n(?P<rows>.*?)-->\n).*?(?P<end><!-- end -->)", re.DOTALL)
HEADLINES = {"clean pictures": "clean", "unseen perturbations": "held_out_preserving"}
"""Titles of a short table's columns -> their conditions."""
FIGURE = re.compile(r"figures/(?P<study>[a-z-]+)-(?P<condition>[a-z_]+)\.svg")
STYLE = """<style>
text { font: 14px system-ui, sans-serif; fill: #5d6b7c; } text.row { fill: #1b2430; } .grid { stroke: #e1e5ea; }
.bar { fill: none; stroke: #0072b2; stroke-width: 2; } .mark { fill: #0072b2; stroke: #0072b2; stroke-width: 1.6; }
</style><rect width="100%" height="100%" fill="#fff"/>"""

Key = tuple[str, str]
"""(method, condition) of a mean difference."""
Rows = dict[tuple[str, str], dict[str, dict[str, Any]]]
"""(task, method) -> condition -> difference from the control, with `low` and `high` over seeds and items; fractions."""


@cache
def cells_of(folder: Path, name: str) -> tuple[Study, list[Job], list[Job]]:
    """A study with its cells and its runs for time, from its archive or, in progress, its folder."""
    archive = folder / f"{name}{ARCHIVE}"
    given = {"output_dir": str(folder / name), "cells_from": [str(archive)] if archive.exists() else []}
    study = load_study(name, given)
    cells, timing = (
        taken_over(jobs, sources_of(study), as_they_are=True) for jobs in (study_jobs(study), timing_jobs(study))
    )
    return study, cells, timing


@cache
def results_of(folder: Path, name: str, control: str | None = None) -> dict[str, Any]:
    """The results of a study's finished cells against one of its methods; None: its control."""
    study, cells, timing = cells_of(folder, name)
    command = f"cppo compare --config {name} --cells_from docs/results/{name}{ARCHIVE}"
    # No table shows the bootstrap over items alone.
    return compare(replace(study, control=control or study.control), cells, timing, command.split(), resamples=1)


def differences(results: Mapping[str, Any], budget: str = "equal_steps") -> Rows:
    """Every method's difference from the control, on each task and, with several, their mean."""
    found = {
        (task, label): method["difference"]
        for task, compared in results["comparison"].items()
        for label, method in compared["methods"].items()
        if "difference" in method
    }
    found |= {(OVER_TASKS, label): difference for label, difference in results["over_tasks"].items()}
    return {key: {name: _over_items_too(one[budget]) for name, one in row.items()} for key, row in found.items()}


def _over_items_too(difference: Mapping[str, Any]) -> dict[str, Any]:
    """The difference with the interval over seeds and items both, where it has one, instead of over seeds."""
    if "crossed_ci95" not in difference:
        return dict(difference)
    low, high = difference["crossed_ci95"] or (None, None)
    return {**difference, "low": low, "high": high}


def table(folder: Path, found: Mapping[str, str | None]) -> Iterator[str]:
    """The Markdown lines for a marker; `asked` holds the groups of `TABLE`."""
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
    """In points with its interval, bold if it decides."""
    text = points(difference)
    return f"**{text}**" if decides(difference) else text


def decides(difference: Mapping[str, Any]) -> bool:
    """Whether the interval of enough seeds excludes 0; a single seed has none."""
    return difference["n"] >= LEAST_SEEDS and (difference["low"] > 0 or difference["high"] < 0)


def holm(p_values: Mapping[Any, float]) -> list[Any]:
    """The keys with p values that survive Holm's correction at 5 % over all of them, smallest first."""
    survivors: list[Any] = []
    for key in sorted(p_values, key=p_values.__getitem__):
        if p_values[key] * (len(p_values) - len(survivors)) > FAMILY_ERROR:
            break
        survivors.append(key)
    return survivors


def survivors_of(folder: Path, study: str) -> tuple[dict[Key, dict[str, Any]], list[Key], list[Key]]:
    """A study's mean differences from its control, and those that survive, by seeds, and by seeds and items."""
    rows = differences(results_of(folder, study))
    pooled = {key: row for key, row in rows.items() if key[0] == OVER_TASKS} or rows
    found = {(label, name): one for (_, label), row in pooled.items() for name, one in row.items()}
    of_seeds = {key: float(ttest_1samp(list(one["by_seed"].values()), 0).pvalue) for key, one in found.items()}
    return found, holm(of_seeds), holm({key: one["crossed_p"] for key, one in found.items()})


def holm_table(folder: Path, studies: Sequence[str]) -> Iterator[str]:
    """Markdown lines: the surviving differences of each study."""
    yield "| study | differences | survive by seeds | survive by seeds and items |"
    yield "|---|---|---|---|"
    for study in studies:
        found, *survivors = survivors_of(folder, study)
        cells = []
        for one in survivors:
            by_label: dict[str, list[str]] = {}
            for label, name in one:
                by_label.setdefault(label, []).append(f"{name} {100 * found[label, name]['mean']:+.1f}")
            cells.append("; ".join(f"{label}: {', '.join(texts)}" for label, texts in by_label.items()) or "none")
        yield f"| {study.removeprefix('evidence-')} | {len(found)} | {' | '.join(cells)} |"


def short_table(folder: Path, rows: Sequence[str]) -> Iterator[str]:
    """Markdown lines: per row its differences under `HEADLINES`, and which survive."""
    yield f"| what, where | seeds | {' | '.join(HEADLINES)} | survives |"
    yield "|" + "---|" * (3 + len(HEADLINES))
    for row in rows:
        place, text = row.split(": ", 1)
        study, label = place.split()
        found, *survivors = survivors_of(folder, study)
        asked = {(label, condition): heading.split()[0] for heading, condition in HEADLINES.items()}
        shown = [found[key] for key in asked]
        verdict = surviving(asked, *survivors) if any(map(decides, shown)) else ""
        yield " | ".join([f"| {text}", str(shown[0]["n"]), *map(points, shown), verdict]).rstrip() + " |"


def surviving(asked: Mapping[Key, str], by_seeds: Sequence[Key], by_both: Sequence[Key]) -> str:
    """Which of the named differences survive over seeds and items; if none does, whether all do by seeds."""
    kept = [name for key, name in asked.items() if key in by_both]
    if kept:
        return "both" if len(kept) == len(asked) else kept[0]
    return "by seeds alone" if all(key in by_seeds for key in asked) else "neither"


def figure(results: Mapping[str, Any], condition: str) -> str:
    """The differences under one condition as an SVG file."""
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
    """Write the page, its figures and the summaries."""
    parser = argparse.ArgumentParser(description="Writes the tables and figures of evidence.md and the summaries.")
    parser.add_argument("folder", type=Path, help="folder of the page and the studies' archives")
    folder = parser.parse_args(argv).folder
    tables = {
        TABLE: lambda found: table(folder, found.groupdict()),
        HOLM: lambda found: holm_table(folder, found["studies"].split()),
        SHORT: lambda found: short_table(folder, found["rows"].splitlines()),
    }
    page = folder / PAGE
    text = page.read_text(encoding="utf-8")
    for marker, lines in tables.items():
        text = marker.sub(
            lambda found, lines=lines: "\n".join([found[1] + "\n".join(lines(found)), found["end"]]), text
        )
    page.write_text(text, encoding="utf-8")
    for found in FIGURE.finditer(text):
        (folder / "figures").mkdir(exist_ok=True)
        drawn = figure(results_of(folder, found["study"]), found["condition"])
        (folder / found[0]).write_text(drawn, encoding="utf-8")
    for archive in folder.glob(f"*{ARCHIVE}"):
        study = archive.name.removesuffix(ARCHIVE)
        title, rest = markdown(results_of(folder, study)).split("\n", 1)
        (folder / f"{study}.md").write_text(f"{title}\n\n{AUDIENCE}\n{rest}", encoding="utf-8")


if __name__ == "__main__":
    main()
