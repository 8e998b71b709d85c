"""A study's results as tables, for Markdown and for the page, and as lines for a terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PUBLISHED_SCORE = "entropy_shift"
NO_WIDTH = "An interval without width means that the seeds agree exactly: seeds or items are too few."
NAMED = 10
"""Number of unfinished cells that are named."""


@dataclass(frozen=True)
class Table:
    """A caption, the names of columns, and rows of text; the first cell of each row is a label."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown(results: Mapping[str, Any]) -> str:
    """`summary.md`: what was run, and every task's tables."""
    lines = [f"# {results['study']['name']}", "", f"`{results['command']}`. {notes(results)}"]
    if warnings := cell_warnings(results):
        lines += ["", *(f"- {line}" for line in warnings)]
    for task in results["comparison"]:
        lines += ["", f"## {task}"]
        for table in task_tables(results, task):
            lines += ["", table.caption, "", *_markdown_rows(table)]
    if pooled := pooled_table(results):
        lines += ["", "## All tasks", "", pooled.caption, "", *_markdown_rows(pooled)]
    return "\n".join(lines) + "\n"


def pooled_table(results: Mapping[str, Any]) -> Table | None:
    """Differences averaged over the tasks at equal steps; None for a single task."""
    pooled = results["over_tasks"]
    caption = "Difference in points at equal steps, averaged over the tasks seed by seed"
    return _difference_table(caption, pooled, results["study"]["conditions"]) if pooled else None


def cell_warnings(results: Mapping[str, Any]) -> list[str]:
    """The warnings of the cells' runs, `NAMED` at most, each with the name of its cell."""
    found = [
        f"{cell['task']}/{cell['method']}/seed-{cell['seed']}: {text}"
        for cell in results["cells"]
        for text in cell.get("warnings", ())
    ]
    return found[:NAMED] + ([f"... and {len(found) - NAMED} more"] if len(found) > NAMED else [])


def notes(results: Mapping[str, Any]) -> str:
    """How much has been run and how to read the intervals."""
    study, unfinished, codes = results["study"], results["unfinished"], results["code"]
    finished = len(results["cells"])
    others = ", ".join(results["other_prompts"])
    prompts = f"saw the same prompts in the same order{f', EXCEPT {others}' if others else ''}"
    mixed = ", ".join(part for part, numbers in results.get("definitions", {}).items() if len(numbers) > 1)
    doubt = f" CELLS OF SEVERAL DEFINITIONS ARE MIXED: {mixed}." if mixed else ""
    named = f": {'; '.join(unfinished[:NAMED])}{' ...' if len(unfinished) > NAMED else ''}" if unfinished else ""
    return (
        f"{finished} cell{'' if finished == 1 else 's'} finished, {len(unfinished)} not{named}. Accuracy in per cent "
        f"on {' or '.join(f'{number:,}' for number in results['items'])} held-out items, greedy decoding. [ ]: 95 % t "
        f"interval over seeds; differences are paired by seed against {study['control']}. {{ }}: 95 % interval over "
        f"other seeds and other items both. {NO_WIDTH} For each task and seed all methods {prompts}. The cells were "
        f"run by {len(codes)} version{'' if len(codes) == 1 else 's'} of the code.{doubt}"
    )


def task_tables(results: Mapping[str, Any], task: str) -> Iterator[Table]:
    """Accuracy, differences at equal steps and at equal time, detectors, and cost, if there are data for them."""
    found = results["comparison"][task]
    methods = found["methods"]
    if not methods:
        return
    curves = {label: method["curves"] for label, method in methods.items()}
    first = next(iter(curves.values()))
    conditions, start = list(first["accuracy"]), first["steps"][0] == 0
    rows = [["start", "", *(f"{100 * first['accuracy'][name][0]['mean']:.1f}" for name in conditions)]] if start else []
    rows += [
        [label, str(len(methods[label]["seeds"])), *(percent(curve["accuracy"][name][-1]) for name in conditions)]
        for label, curve in curves.items()
    ]
    yield Table(f"Accuracy after {first['steps'][-1]} steps", ["method", "seeds", *conditions], rows)
    compared = {label: method["difference"] for label, method in methods.items() if "difference" in method}
    if compared:
        yield _difference_table("Difference in points at equal steps", compared, conditions)
        rows = [
            [
                label,
                f"{methods[label]['steps_at_equal_time']:.0f}",
                *(points(difference[name]["equal_time"]) for name in conditions),
            ]
            for label, difference in compared.items()
        ]
        caption = f"Difference in points after equal training time, {found['equal_time_seconds']:,.0f} s"
        caption += _doubt(results["cost"][task])
        yield Table(caption, ["method", "steps", *conditions], rows)
    scores = list(first["auprc"])
    if scores:
        figures = [("auprc", score) for score in scores]
        yield _detector_table("AUPRC of the dependency scores after the last step", scores, figures, curves)
        figures = [("precision", PUBLISHED_SCORE), ("recall", PUBLISHED_SCORE)]
        caption = "The published rule (top half of the tokens with a positive entropy shift) after the last step"
        yield _detector_table(caption, ["precision", "recall"], figures, curves)
    yield _cost_table(results, task)


def _difference_table(caption: str, differences: Mapping[str, Any], conditions: Sequence[str]) -> Table:
    """The differences from the control at equal steps, with the number of pairs."""
    rows = []
    for label, difference in differences.items():
        found = [difference[name]["equal_steps"] for name in conditions]
        rows.append([label, str(found[0]["n"]), *map(_with_crossed, found)])
    return Table(caption, ["method", "pairs", *conditions], rows)


def _detector_table(
    caption: str, head: Sequence[str], figures: Sequence[tuple[str, str]], curves: Mapping[str, Any]
) -> Table:
    """Values (name, score) of each method's detectors at its last evaluation, and of the start."""
    first = next(iter(curves.values()))
    rows = []
    if first["steps"][0] == 0:
        starts = [first[figure][score][0] for figure, score in figures]
        rows.append(["start", *(f"{one['mean']:.3f}" if one else "" for one in starts)])
    for label, curve in curves.items():
        last = [curve[figure].get(score, [None])[-1] for figure, score in figures]
        rows.append([label, *(_with_interval(one, ".3f") if one else "" for one in last)])
    return Table(caption, ["method", *head], rows)


def difference_lines(results: Mapping[str, Any]) -> list[str]:
    """For a terminal: each method's accuracies, its differences from the control at equal steps, and a legend."""
    lines, compared = [], []
    for task, found in results["comparison"].items():
        for label, method in found["methods"].items():
            texts = []
            for name, curve in method["curves"]["accuracy"].items():
                difference = method.get("difference", {}).get(name)
                shown = f" ({points(difference['equal_steps'])})" if difference else ""
                compared += [difference["equal_steps"]] if difference else []
                texts.append(f"{name} {100 * curve[-1]['mean']:.1f}{shown}")
            seeds = f"{len(method['seeds'])} seed{'' if len(method['seeds']) == 1 else 's'}"
            lines.append(f"{task}  {label}  {seeds}:  {',  '.join(texts)}")
    if compared:
        how = f"(): points of difference from {results['study']['control']}, []: 95 % interval over seeds."
        no_width = any(one["low"] is not None and one["low"] == one["high"] for one in compared)
        lines.append(f"{how} {NO_WIDTH}" if no_width else how)
    return lines


def percent(interval: Mapping[str, Any]) -> str:
    """A mean with its interval in per cent: "52.1 [49.0, 55.2]"; a single seed has no interval."""
    return _with_interval(interval, ".1f", 100)


def points(interval: Mapping[str, Any]) -> str:
    """A difference with its interval in points: "+1.2 [-0.3, +2.7]"."""
    return _with_interval(interval, "+.1f", 100)


def _with_crossed(difference: Mapping[str, Any]) -> str:
    crossed = difference["crossed_ci95"]
    return points(difference) + (f" {{{100 * crossed[0]:+.1f}, {100 * crossed[1]:+.1f}}}" if crossed else "")


def _with_interval(interval: Mapping[str, Any], form: str, scale: int = 1) -> str:
    """`scale` times the mean and the ends, each in the format `form`."""
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    text = format(scale * mean, form)
    return text if low is None else f"{text} [{format(scale * low, form)}, {format(scale * high, form)}]"


def _cost_table(results: Mapping[str, Any], task: str) -> Table:
    costs = results["cost"][task]
    alone = all(cost["alone"] for cost in costs.values())
    how = "trained alone, in turn" if alone else "from cells that shared the machine: seconds include waiting"
    how += _doubt(costs)
    control = costs.get(results["study"]["control"])
    rows = [
        [
            label,
            f"{cost['step_seconds']:.2f}",
            f"{cost['step_cpu_seconds']:.2f}",
            f"{cost['compared_seconds'] / control['compared_seconds']:.2f}" if control else "",
            f"{cost['peak_mib']:,.0f}",
        ]
        for label, cost in costs.items()
    ]
    head = ["method", "seconds", "processor seconds", "time relative to the control", "peak memory, MiB"]
    return Table(f"A step, medians, the time relative to the control by means ({how})", head, rows)


def _doubt(costs: Mapping[str, Any]) -> str:
    """A remark if several versions of the code were timed: perhaps on other days or another machine."""
    codes = {code for cost in costs.values() for code in cost["code"]}
    return "" if len(codes) < 2 else f"; TIMED BY {len(codes)} VERSIONS OF THE CODE, which may not be comparable"


def _markdown_rows(table: Table) -> Iterable[str]:
    yield f"| {' | '.join(table.head)} |"
    yield "|" + "---|" * len(table.head)
    for row in table.rows:
        yield f"| {' | '.join(row)} |"
