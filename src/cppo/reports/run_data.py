"""Reads a run directory back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cppo.errors import UserError
from cppo.recipes import RunDirectory


@dataclass(frozen=True)
class RunData:
    """A run's resolved recipe, metrics, example responses and probes (one mapping a line), and summary ({} while it
    runs)."""

    name: str
    config: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    summary: Mapping[str, Any]

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) wherever the metric was logged as a number; the later line of a step counts."""
        points = {}
        for row in self.metrics:
            value = row.get(metric)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                points[float(row.get("step", 0))] = float(value)
        return sorted(points.items())


def read_run(path: str | Path) -> RunData:
    """Read the run directory `path`; a line that a stop cut off is left out.

    Raises:
        UserError: it is not a run directory, or one of its files cannot be read.
    """
    files = RunDirectory(path)
    if not files.config.is_file():
        raise UserError(f"{path} is not a run directory (it has no config.yaml)")
    try:
        config = yaml.safe_load(files.config.read_text(encoding="utf-8"))
        summary = json.loads(files.summary.read_text(encoding="utf-8")) if files.summary.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return RunData(
        name=files.path.name,
        config=config if isinstance(config, dict) else {},
        metrics=_json_lines(files.metrics),
        samples=_json_lines(files.samples),
        probes=_json_lines(files.probes),
        summary=summary,
    )


def _json_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
