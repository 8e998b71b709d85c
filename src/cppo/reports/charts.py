"""Small line charts as inline SVG: no script, no external file, colours from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 30
MAX_POINTS = 400
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A named line; x is the step."""

    label: str
    points: Sequence[Point]


def line_chart(series: Sequence[Series], *, percent: bool = False, title: str = "") -> Markup:
    """An SVG of the series: the logged values pale, their running mean on top, one colour class a series.

    Args:
        series: at least one, each with at least one point.
        percent: label the vertical axis in per cent; values are fractions of 1.
        title: for screen readers.
    """
    shown = [Series(one.label, thin(one.points, MAX_POINTS)) for one in series]
    xs = [x for one in shown for x, _ in one.points]
    ys = [y for one in shown for _, y in one.points]
    x_axis = _Axis(nice_ticks(min(xs), max(xs), 5, least_step=1.0), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(nice_ticks(min(ys), max(ys), 4), HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_grid(x_axis, y_axis, percent),
    ]
    for number, one in enumerate(shown):
        if len(one.points) == 1:
            x, y = one.points[0]
            parts.append(f'<circle class="dot s{number}" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3"/>')
            continue
        parts.append(_path(one.points, x_axis, y_axis, f"raw s{number}"))
        parts.append(_path(running_mean(one.points), x_axis, y_axis, f"mean s{number}"))
    for number, one in enumerate(shown):
        for x, y in one.points:
            value = f"{100 * y:.1f} %" if percent else f"{y:.4g}"
            parts.append(
                f'<circle class="hit s{number}" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="4">'
                f"<title>{escape(one.label)}, step {x:g}: {value}</title></circle>"
            )
    parts.append("</svg>")
    return Markup("".join(parts))


def interval_chart(rows: Sequence[tuple[str, float, tuple[float, float]]]) -> Markup:
    """An SVG of labelled fractions of 1 with their intervals, one row each, on one axis."""
    height = 30 * len(rows) + 28
    low = min(interval[0] for _, _, interval in rows)
    high = max(interval[1] for _, _, interval in rows)
    axis = _Axis(nice_ticks(low, high, 5), 110, 600)
    bottom = height - 24
    parts = [f'<svg class="chart intervals" viewBox="0 0 640 {height}" role="img" aria-label="accuracies">']
    for tick in axis.ticks:
        x = axis.at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{100 * tick:g} %</text>')
    for number, (label, value, (start, end)) in enumerate(rows):
        y = 20 + 30 * number
        parts.append(f'<text class="row" x="100" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        parts.append(
            f'<line class="bar s{number}" x1="{axis.at(start):.1f}" x2="{axis.at(end):.1f}" y1="{y}" y2="{y}"/>'
        )
        parts.append(
            f'<circle class="dot s{number}" cx="{axis.at(value):.1f}" cy="{y}" r="5">'
            f"<title>{escape(label)}: {100 * value:.1f} %</title></circle>"
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def nice_ticks(low: float, high: float, count: int, *, least_step: float = 0.0) -> list[float]:
    """About `count` round numbers around [low, high]: 1, 2, 2.5 or 5 times a power of ten, >= `least_step`, apart."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)
    rough = max((high - low) / count, least_step)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Each point's mean with its neighbours within a twentieth of the points to either side."""
    reach = max(1, len(points) // 20)
    return [
        (x, math.fsum(y for _, y in window) / len(window))
        for index, (x, _) in enumerate(points)
        if (window := points[max(0, index - reach) : index + reach + 1])
    ]


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` of the points, evenly spaced, the first and the last among them."""
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


def _grid(x_axis: _Axis, y_axis: _Axis, percent: bool) -> list[str]:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        label = f"{100 * tick:g} %" if percent else f"{tick:g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for tick in x_axis.ticks:
        parts.append(
            f'<text class="tick" x="{x_axis.at(tick):.1f}" y="{HEIGHT - 12}" text-anchor="middle">{tick:g}</text>'
        )
    return parts


def _path(points: Sequence[Point], x_axis: _Axis, y_axis: _Axis, css: str) -> str:
    steps = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
    return f'<polyline class="{css}" points="{steps}"/>'
