"""The results of `cppo eval` as JSON values, and as the lines on the terminal."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cppo.cli.console import percent

if TYPE_CHECKING:
    from cppo.evaluation import CardRow, EvalResult

SHOWN_CATEGORIES = 30
SHOWN_CHARS = 40
NO_CATEGORY = "(none)"
MAX_CATEGORY_CHARS = 200


def category_text(value: Any) -> str:
    """A cell as a category's name: text unchanged, "(none)" for null and absent, other values as short JSON."""
    if value is None:
        return NO_CATEGORY
    return value if isinstance(value, str) else json.dumps(value, default=repr)[:MAX_CATEGORY_CHARS]


def category_rows(result: "EvalResult", categories: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy of each category, with numbers in numeric order; `categories` holds one name an item."""
    from cppo.evaluation import Rate

    scores: dict[str, list[float]] = {}
    for item, category in zip(result.items, categories, strict=True):
        scores.setdefault(category, []).append(item.accuracy)
    rates = {name: Rate.of(values) for name, values in sorted(scores.items(), key=lambda entry: _order(entry[0]))}
    return [
        {"value": name, "n": len(scores[name]), "accuracy": rate.mean, "accuracy_ci95": [rate.low, rate.high]}
        for name, rate in rates.items()
    ]


def report_lines(report: Mapping[str, Any], card: "Sequence[CardRow]") -> list[str]:
    """The lines on the terminal: headline numbers, then the card, then a table for each column."""
    samples, temperature = report["samples"], report["temperature"]
    how = "greedy" if not temperature else f"temperature {temperature:g}, top_p {report['top_p']:g}"
    how = how if samples == 1 else f"{samples} samples each, {how}"
    lines = [
        f"items      {report['n']:,} ({how}, 95 % intervals)",
        f"{'accuracy' if samples == 1 else f'avg@{samples}':<11}{percent(report['accuracy'], report['accuracy_ci95'])}",
    ]
    lines += [
        f"{f'pass@{k}':<11}{percent(rate['mean'], rate['ci95'])}" for k, rate in report.get("pass_at_k", {}).items()
    ]
    if "blank_accuracy" in report:
        lines.append(f"blank      {percent(report['blank_accuracy'], report['blank_accuracy_ci95'])}   (grey image)")
    lines.append(f"format     {percent(report['format_rate'])}")
    if report["skipped_rows"]:
        lines.append(f"skipped    {report['skipped_rows']} rows that cannot be used")
    if card:
        lines += ["", f"{'perception card':<22}{'accuracy':<23}{'against clean, points':<24}same answer as clean"]
        lines += [_card_line(row) for row in card]
        for name, kinds in report["card_families"].items():
            published = name.startswith("trained_") and report["trained_views"]["source"] == "published"
            remark = " (published; the model's own are not known)" if published else ""
            lines.append(f"{name}: one of {', '.join(kinds)}{remark}")
    for column, rows in report.get("by", {}).items():
        shown = [(_printable(row["value"]), row) for row in rows[:SHOWN_CATEGORIES]]
        title = _printable(f"by {column}")
        width = max(len(name) for name in (title, *(name for name, _ in shown)))
        lines += ["", f"{title:<{width}}{'n':>8}    accuracy"]
        for name, row in shown:
            lines.append(f"{name:<{width}}{row['n']:>8,}  {percent(row['accuracy'], row['accuracy_ci95'])}")
        if len(rows) > SHOWN_CATEGORIES:
            lines.append(f"... and {len(rows) - SHOWN_CATEGORIES:,} more (all of them with --json)")
    return lines


def _card_line(row: "CardRow") -> str:
    accuracy = percent(row.accuracy.mean, (row.accuracy.low, row.accuracy.high))
    if row.condition == "clean":
        return f"{row.condition:<20}{accuracy}"
    change = f"{100 * row.change.mean:+6.1f}  [{100 * row.change.low:+.1f}, {100 * row.change.high:+.1f}]"
    same = percent(row.consistency.mean, (row.consistency.low, row.consistency.high))
    return f"{row.condition:<20}{accuracy:<23}{change:<24}{same}"


def _order(name: str) -> tuple[bool, float, str]:
    try:
        return False, float(name), name
    except ValueError:
        return True, 0.0, name


def _printable(text: str) -> str:
    """Text for a terminal: without control characters, and of limited length, since data may be hostile."""
    shown = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return shown if len(shown) <= SHOWN_CHARS else shown[: SHOWN_CHARS - 1] + "\u2026"
