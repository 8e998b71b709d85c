"""Read a run directory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cppo.errors import UserError, one_line
from cppo.parsing import parse_json, parse_yaml
from cppo.recipes import RunDirectory


@dataclass(frozen=True)
class RunData:
    """A run's resolved recipe, metrics, example responses and probes (one mapping a line), progress, and summary ({}
    while it runs)."""

    name: str
    config: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    progress: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def last_step(self) -> int:
        """The latest logged step; 0 if there is none."""
        return int(max((row.get("step", 0) for row in self.metrics), default=0))

    @property
    def seconds(self) -> float | None:
        """Duration of the run, or of its training since it started or resumed."""
        return self.summary.get("seconds", self.progress.get("seconds"))

    @property
    def resumed_at(self) -> int:
        """The step from which the run last resumed; 0 if it never did."""
        return int(self.progress.get("from_step", 0))

    @property
    def seconds_left(self) -> float | None:
        """Time for the remaining steps at the mean pace so far; None if unknown, or all are done."""
        done = self.progress.get("step", 0) - self.resumed_at
        if self.summary or done <= 0:
            return None
        return self.progress["seconds"] / done * (self.progress["last_step"] - self.progress["step"])

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the packages that the run's numbers depend on."""
        return self.summary.get("versions") or self.progress.get("versions") or {}

    @property
    def fallbacks(self) -> Sequence[str]:
        """What the run does in a slower or coarser way than CPPO can, and why, one line each."""
        return self.summary.get("fallbacks") or self.progress.get("fallbacks") or ()

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) for each step with the metric as a number; the later line of a step counts."""
        points = {}
        for row in self.metrics:
            value = row.get(metric)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                points[float(row.get("step", 0))] = float(value)
        return sorted(points.items())


def read_run(path: str | Path) -> RunData:
    """Read the run directory `path`; a line that a stop cut off is left out.

    Raises UserError if it is no run directory, or one of its files cannot be read.
    """
    files = RunDirectory(path)
    if not files.config.is_file():
        raise UserError(f"{path} is not a run directory (it has no config.yaml)")
    try:
        config = parse_yaml(files.config.read_text(encoding="utf-8"))
        summary, progress = _json_object(files.summary), _json_object(files.progress)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error
    return RunData(
        name=files.path.name,
        config=config if isinstance(config, dict) else {},
        metrics=_json_lines(files.metrics),
        samples=_json_lines(files.samples),
        probes=_json_lines(files.probes),
        progress=progress,
        summary=summary,
    )


def _json_object(file: Path) -> dict[str, Any]:
    content = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _json_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
