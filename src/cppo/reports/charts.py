"""Charts as inline SVG: no script, no external file.

Colours are in the page's style sheet, dashes and markers also here. Each series differs from the others in all three,
so a chart is readable in black and white too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 28, 44
AXIS = 300
"""Length of the axis of intervals."""
MAX_POINTS, MAX_HITS = 400, 100
STYLES = 6
"""Number of line styles; a seventh series would look like the first."""
LEAST = 1e-300
"""Values nearer to 0 count as 0."""
MARKS = 5
"""Markers along a line."""
RAW_SERIES = 3
"""Up to this many series also show the logged values beneath their running mean; more would hide each other."""
MARKERS = (
    "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0Z",  # disc
    "M-3 -3H3V3H-3Z",  # square
    "M0 -4L4 3.2H-4Z",  # triangle
    "M0 -4.4L4.4 0L0 4.4L-4.4 0Z",  # diamond
    "M-3.2 -3.2L3.2 3.2M-3.2 3.2L3.2 -3.2",  # cross
    "M0 -4V4M-4 0H4",  # plus
)
Point = tuple[float, float]
Band = tuple[float, float, float]  # x, low, high
T = TypeVar("T")


@dataclass(frozen=True)
class Series:
    """A named line, with an optional band such as a 95 % interval; values that are not finite are left out."""

    label: str
    points: Sequence[Point]
    band: Sequence[Band] = ()


def figure(title: str, series: Sequence[Series], *, note: str = "", **axes: Any) -> Markup:
    """A titled card with the series' `line_chart`, which takes `axes`, and its legend.

    Args:
        note: small print under the title: what is shown.
    """
    svg = line_chart(series, title=title, **axes)
    return Markup('<figure class="card"><h3>{}</h3><div class="note">{}</div>{}{}</figure>').format(
        title, note, svg, legend([one.label if one.points else None for one in series])
    )


def line_chart(
    series: Sequence[Series],
    *,
    title: str = "",
    x_title: str = "optimizer step",
    y_title: str = "",
    percent: bool = False,
    smooth: bool = True,
) -> Markup:
    """An SVG of the series, each with its own colour, dash and marker.

    Args:
        series: at least one with a finite point.
        title: for screen readers.
        x_title, y_title: the axes' titles, with units.
        percent: label the vertical axis in per cent; values are fractions of 1.
        smooth: draw the running mean, with the pale values beneath it; else the values.
    """
    shown = [Series(one.label, thin(_finite(one.points), MAX_POINTS), _finite(one.band)) for one in series]
    xs = [x for one in shown for x, _ in one.points] + [row[0] for one in shown for row in one.band]
    ys = [y for one in shown for _, y in one.points] + [y for one in shown for row in one.band for y in row[1:]]
    x_axis = _Axis(nice_ticks(min(xs), max(xs), 5, least_step=1.0), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(nice_ticks(min(ys), max(ys), 4), HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_frame(x_axis, y_axis, percent, x_title, y_title),
    ]
    for number, one in enumerate(shown):
        if one.band:
            outline = [(x, high) for x, _, high in one.band] + [(x, low) for x, low, _ in reversed(one.band)]
            parts.append(f'<polygon class="band {_style(number)}" points="{_places(outline, x_axis, y_axis)}"/>')
    for number, one in enumerate(shown):
        if smooth and len(one.points) > 1 and len(shown) <= RAW_SERIES:
            places = _places(one.points, x_axis, y_axis)
            parts.append(f'<polyline class="raw {_style(number)}" points="{places}"/>')
    for number, one in enumerate(shown):
        line = running_mean(one.points) if smooth else one.points
        if len(line) > 1:
            places = _places(line, x_axis, y_axis)
            parts.append(f'<polyline class="line {_style(number)}" points="{places}"/>')
        parts += [_marker(number, x_axis.at(x), y_axis.at(y)) for x, y in _marked(line, number, len(shown))]
    for one in shown:
        for x, y in thin(one.points, MAX_HITS):
            value = f"{100 * y:.1f} %" if percent else f"{y:.4g}"
            parts.append(
                f'<circle class="hit" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="4">'
                f"<title>{escape(one.label)}, {escape(x_title)} {x:g}: {value}</title></circle>"
            )
    parts.append("</svg>")
    return Markup("".join(parts))


def interval_chart(
    rows: Sequence[tuple[str, float, tuple[float, float]]],
    *,
    title: str = "accuracies",
    x_title: str = "accuracy, 95 % interval",
    percent: bool = True,
) -> Markup:
    """An SVG of labelled values with their intervals, one row each, on one axis.

    Args:
        rows: label, value, (low, high); fractions of 1 if `percent`.
        title: for screen readers.
        x_title: the axis' title, with its unit.
        percent: label the axis in per cent.
    """
    height = 30 * len(rows) + 46
    left = min(360, 24 + 8 * max(len(label) for label, _, _ in rows))
    low = min(interval[0] for _, _, interval in rows)
    high = max(interval[1] for _, _, interval in rows)
    axis = _Axis(nice_ticks(low, high, 4), left + 14, left + AXIS)
    width = left + AXIS + 24
    bottom = height - 42
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" style="max-width: {width}px" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for tick in axis.ticks:
        x = f"{axis.at(tick):.1f}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="4" y2="{bottom}"/>')
        parts.append(_text("tick", x, bottom + 16, _label(tick, percent)))
    parts.append(_text("axis", f"{left + AXIS / 2:.1f}", height - 6, x_title))
    for number, (label, value, (start, end)) in enumerate(rows):
        y = 20 + 30 * number
        parts.append(_text("row", left, y + 4, label, "end"))
        ends = " ".join(f"M{axis.at(x):.1f} {y - 5}V{y + 5}" for x in (start, end))
        parts.append(
            f'<path class="bar {_style(number)}" d="M{axis.at(start):.1f} {y}H{axis.at(end):.1f}{ends}"/>'
            f"<g>{_marker(number, axis.at(value), y)}<title>{escape(label)}: {_label(round(value, 4), percent)} "
            f"[{_label(round(start, 4), percent)}, {_label(round(end, 4), percent)}]</title></g>"
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def legend(labels: Sequence[str | None]) -> Markup:
    """The labels with their line styles; nothing for a single label, which the title names.

    labels: in the order of the styles; None for a style without a line here.
    """
    if len(labels) < 2:
        return Markup()
    entries = [
        Markup(
            '<span><svg width="34" height="12" viewBox="0 0 34 12" aria-hidden="true">'
            f'<polyline class="line {_style(number)}" points="1,6 33,6"/>{_marker(number, 17, 6)}</svg>'
        )
        + label
        + Markup("</span>")
        for number, label in enumerate(labels)
        if label is not None
    ]
    return Markup('<div class="legend">') + Markup().join(entries) + Markup("</div>")


def nice_ticks(low: float, high: float, count: int, *, least_step: float = 0.0) -> list[float]:
    """About `count` round numbers around [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten.

    With `least_step` the step is a multiple of it.
    """
    if high - low < 1e-12 * max(abs(low), abs(high)) or max(abs(low), abs(high)) < LEAST:
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if abs(low) >= LEAST else (0.0, 1.0)
    rough = max((high - low) / count, least_step)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(
        factor * power
        for factor in (1, 2, 2.5, 5, 10)
        if factor * power >= rough * (1 - 1e-9) and not (least_step and factor * power % least_step)
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 12 - min(0, math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Each point's mean with its neighbours, up to a twentieth of the points on either side."""
    reach = max(1, len(points) // 20)
    return [
        (x, math.fsum(y for _, y in window) / len(window))
        for index, (x, _) in enumerate(points)
        if (window := points[max(0, index - reach) : index + reach + 1])
    ]


def thin(points: Sequence[T], most: int) -> list[T]:
    """At most `most` (two or more) evenly spaced points, including the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels: the first tick lies at `start`, the last at `end`."""

    ticks: list[float]
    start: float
    end: float

    def at(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _finite(rows: Sequence[tuple[float, ...]]) -> list:
    return [row for row in rows if all(map(math.isfinite, row))]


def _style(number: int) -> str:
    return f"s{number % STYLES}"


def _marker(number: int, x: float, y: float) -> str:
    return (
        f'<path class="mark {_style(number)}" d="{MARKERS[number % STYLES]}" transform="translate({x:.1f} {y:.1f})"/>'
    )


def _marked(line: Sequence[Point], number: int, count: int) -> list[Point]:
    """Places of a line's markers: every point of a short line, else a few, shifted from series to series."""
    if len(line) <= 2 * MARKS:
        return list(line)
    gap = len(line) / MARKS
    return [line[int(gap * (place + (number + 0.5) / count))] for place in range(MARKS)]


def _label(value: float, percent: bool) -> str:
    return f"{100 * value:.4g} %" if percent else f"{value:.6g}"


def _frame(x_axis: _Axis, y_axis: _Axis, percent: bool, x_title: str, y_title: str) -> list[str]:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", LEFT - 6, f"{y + 4:.1f}", _label(tick, percent), "end"))
    bottom = HEIGHT - BOTTOM
    for tick in x_axis.ticks:
        x = f"{x_axis.at(tick):.1f}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_text("tick", x, bottom + 17, f"{tick:g}"))
    parts.append(_text("axis", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_title))
    parts.append(f'<text class="axis" x="4" y="13">{escape(y_title)}</text>')
    return parts


def _text(kind: str, x: float | str, y: float | str, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _places(points: Sequence[Point], x_axis: _Axis, y_axis: _Axis) -> str:
    return " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
