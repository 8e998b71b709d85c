"""Read a benchmark's rows as records, from the hub or from a folder with its repository's files."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

from cppo.data import HubAway, RecordSource, load_rows, no_row_has, open_hub_table
from cppo.errors import UserError, one_line
from cppo.evaluation.benchmarks.benchmark import Benchmark, Question, Row
from cppo.evaluation.benchmarks.metrics import Figures, Judged, compute
from cppo.evaluation.results import EvalResult, ItemResult


@dataclass(frozen=True)
class Asked:
    """A benchmark's records, and its questions by record id."""

    benchmark: Benchmark
    questions: Mapping[str, Question]
    source: RecordSource

    def right(self, record_id: str, responses: Sequence[str]) -> list[float]:
        """1.0 for each right response to a record, 0.0 for the others."""
        question = self.questions[record_id]
        return [float(self.benchmark.right(question, response)) for response in responses]

    def scored(self, result: EvalResult) -> EvalResult:
        """Results with their responses scored again: a file may hold scores of an earlier version's rules."""
        items = [replace(item, correct=tuple(self.right(item.id, item.responses))) for item in result.items]
        return replace(result, items=tuple(items))

    def figures(self, items: Sequence[ItemResult]) -> Figures:
        """The benchmark's metric of results, which all have the same number of responses."""
        units: dict[tuple[str, ...], list[list[Judged]]] = {}
        for item in items:
            question = self.questions[item.id]
            samples = units.setdefault(unit_of(self.benchmark, item.id, question), [[] for _ in item.responses])
            for rows, response, correct in zip(samples, item.responses, item.correct, strict=True):
                rows.append(Judged(question.facts, question.answer, response, bool(correct)))
        return compute(self.benchmark.metric, list(units.values()), seed=crc32(self.benchmark.name.encode()))


def read_benchmark(
    benchmark: Benchmark, *, folder: str | None = None, limit: int | None = None, max_bad_fraction: float = 0.01
) -> Asked:
    """The questions of a benchmark, with checked images.

    Args:
        folder: holds the repositories of data sets as `ORG/NAME`; without it they are fetched from the hub.
        limit: at most this many rows, in whole units. Units are ordered by a hash, so that all parts have their share.
        max_bad_fraction: allowed fraction (of 1) of bad rows, which are left out.

    Raises:
        UserError: unreachable data, missing columns, too many bad rows.
    """
    asked: dict[str, Question] = {}
    number = 0
    for split in benchmark.splits:
        for row in _rows(benchmark, split, folder):
            number += 1
            question = _question(benchmark, row, split, number)
            if question is not None:
                asked[f"{benchmark.name}:{number}"] = question
    if limit is not None:
        asked = _within(benchmark, asked, limit)
    source = load_rows(
        [_record_row(name, question) for name, question in asked.items()],
        name=benchmark.title,
        max_bad_fraction=max_bad_fraction,
        extras=list(next(iter(asked.values())).facts) if asked else (),
    )
    return Asked(benchmark, asked, source)


def unit_of(benchmark: Benchmark, name: str, question: Question) -> tuple[str, ...]:
    """The key that rows of one unit share; the row's own name for a benchmark without units."""
    return tuple(question.facts[fact] for fact in benchmark.unit) or (name,)


def _rows(benchmark: Benchmark, split: str, folder: str | None) -> Iterator[Row]:
    label = f"{benchmark.title} (hub:{benchmark.hub}, split {split})"
    try:
        where = benchmark.hub if folder is None else Path(folder) / benchmark.hub
        if isinstance(where, Path) and not where.is_dir():
            raise HubAway(label, f"there is no folder {where}")
        table = open_hub_table(where, split=split, config=benchmark.config, images=(), label=label)
    except HubAway as error:
        raise UserError(
            f"{benchmark.title}: {error.reason}: run `hf download {benchmark.hub} --repo-type dataset --local-dir "
            f"DIR/{benchmark.hub}` where there is a network, and give --benchmark_folder DIR"
        ) from error
    missing = [column for column in benchmark.columns if column not in table.table.column_names]
    if missing:
        raise UserError(f"{no_row_has(label, missing, table.table.column_names)}: its layout is not the expected one")
    return table.rows()


def _question(benchmark: Benchmark, row: Row, split: str, number: int) -> Question | None:
    try:
        return benchmark.ask(row, split)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        kind = type(error).__name__
        place = f"{benchmark.title}: row {number} (split {split})"
        raise UserError(f"{place} has an unexpected layout: {kind}: {one_line(error)}") from error


def _within(benchmark: Benchmark, asked: Mapping[str, Question], limit: int) -> dict[str, Question]:
    """Whole units in the order of their hashes: as many as fit into `limit` rows, but at least one."""
    units: dict[tuple[str, ...], list[str]] = {}
    for name, question in asked.items():
        units.setdefault(unit_of(benchmark, name, question), []).append(name)
    kept: set[str] = set()
    for unit in sorted(units, key=lambda unit: hashlib.sha256(json.dumps(unit).encode()).digest()):
        if kept and len(kept) + len(units[unit]) > limit:
            break
        kept.update(units[unit])
    return {name: question for name, question in asked.items() if name in kept}


def _record_row(name: str, question: Question) -> Row:
    images = question.image if isinstance(question.image, list) else [question.image]
    return {**question.facts, "id": name, "prompt": question.prompt, "images": images, "answer": question.answer}
