"""A study's results as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def summary(results: Mapping[str, Any]) -> str:
    """`summary.md`: what was run, and for each task accuracy, differences from the control, detectors and cost."""
    study = results["study"]
    lines = [
        f"# {study['name']}",
        "",
        f"`{results['command']}`, {len(results['cells'])} cells finished, {len(results['unfinished'])} not. Held-out "
        f"accuracy in per cent on {study['eval_items']:,} items, greedy decoding. Intervals are 95 % t intervals over "
        f"seeds; differences are paired by seed, against `{study['control']}`. "
        + (
            "All methods saw the same prompts in the same order."
            if results["same_prompts"]
            else "**Methods did not see the same prompts in the same order.**"
        ),
    ]
    for task, found in results["comparison"].items():
        if found["methods"]:
            lines += ["", f"## {task}", "", *_task(results, task, found)]
    return "\n".join(lines) + "\n"


def difference_lines(results: Mapping[str, Any]) -> list[str]:
    """The differences from the control at equal steps as lines for a terminal; means where there is none."""
    lines = []
    for task, found in results["comparison"].items():
        for label, method in found["methods"].items():
            ends = {name: curve[-1] for name, curve in method["curves"]["accuracy"].items()}
            texts = []
            for name, end in ends.items():
                difference = method.get("difference", {}).get(name)
                text = f"{name} {100 * end['mean']:.1f}"
                texts.append(text + (f" ({points(difference['equal_steps'])})" if difference else ""))
            lines.append(f"{task}  {label}  {len(method['seeds'])} seeds:  {',  '.join(texts)}")
    return lines


def percent(interval: Mapping[str, Any] | None) -> str:
    """A mean with its interval in per cent: "52.1 [49.0, 55.2]"."""
    if interval is None:
        return ""
    text = f"{100 * interval['mean']:.1f}"
    return text if interval["low"] is None else f"{text} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def points(interval: Mapping[str, Any]) -> str:
    """A difference with its interval in points: "+1.2 [-0.3, +2.7]"."""
    text = f"{100 * interval['mean']:+.1f}"
    return text if interval["low"] is None else f"{text} [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"


def _task(results: Mapping[str, Any], task: str, found: Mapping[str, Any]) -> Iterable[str]:
    methods = found["methods"]
    first = next(iter(methods.values()))["curves"]
    conditions = list(first["accuracy"])
    start = {name: first["accuracy"][name][0] for name in conditions} if first["steps"][0] == 0 else None
    rows = [["start", "", *(f"{100 * start[name]['mean']:.1f}" for name in conditions)]] if start else []
    for label, method in methods.items():
        ends = [percent(method["curves"]["accuracy"][name][-1]) for name in conditions]
        rows.append([f"`{label}`", str(len(method["seeds"])), *ends])
    yield from _table(["method", "seeds", *conditions], rows)
    compared = {label: method["difference"] for label, method in methods.items() if "difference" in method}
    if compared:
        yield "\nDifference in points at equal steps (in brackets over seeds; in braces the bootstrap over items, for"
        yield "these seeds alone):\n"
        rows = []
        for label, difference in compared.items():
            cells = []
            for name in conditions:
                low, high = difference[name]["equal_steps"]["items_ci95"]
                text = points(difference[name]["equal_steps"])
                cells.append(f"{text} {{{100 * low:+.1f}, {100 * high:+.1f}}}")
            rows.append([f"`{label}`", str(difference[conditions[0]]["equal_steps"]["n"]), *cells])
        yield from _table(["method", "pairs", *conditions], rows)
        yield f"\nDifference in points at equal training time ({found['equal_time_seconds']:.0f} s, at each method's"
        yield "median step; accuracy interpolated between evaluations):\n"
        rows = [
            [f"`{label}`", f"{methods[label]['steps_at_equal_time']:.0f}"]
            + [points(difference[name]["equal_time"]) for name in conditions]
            for label, difference in compared.items()
        ]
        yield from _table(["method", "steps", *conditions], rows)
    scores = list(first["auprc"])
    if scores:
        yield "\nAUPRC of the dependency scores against the true perception tokens, after the last step:\n"
        rows = [["start", *(f"{first['auprc'][score][0]['mean']:.3f}" for score in scores)]] if start else []
        rows += [
            [f"`{label}`", *(_fraction(method["curves"]["auprc"].get(score, [None])[-1]) for score in scores)]
            for label, method in methods.items()
        ]
        yield from _table(["method", *scores], rows)
    yield from _costs(results, task)


def _costs(results: Mapping[str, Any], task: str) -> Iterable[str]:
    costs = results["cost"][task]
    alone = all(cost["alone"] for cost in costs.values())
    how = "alone on the machine, in turn" if alone else "in cells that shared the machine: seconds include waiting"
    yield f"\nA step ({how}; medians):\n"
    control = costs.get(results["study"]["control"])
    rows = []
    for label, cost in costs.items():
        ratio = f"{cost['compared_seconds'] / control['compared_seconds']:.2f}" if control else ""
        cpu, memory = f"{cost['step_cpu_seconds']:.2f}", f"{cost['peak_mib']:,.0f}"
        rows.append([f"`{label}`", f"{cost['step_seconds']:.2f}", ratio, cpu, memory])
    yield from _table(["method", "seconds", "relative to the control", "processor seconds", "peak memory, MiB"], rows)


def _fraction(interval: Mapping[str, Any] | None) -> str:
    if interval is None:
        return ""
    text = f"{interval['mean']:.3f}"
    return text if interval["low"] is None else f"{text} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"
