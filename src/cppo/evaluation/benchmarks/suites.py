"""Suites: which benchmarks run together, samples per question, and the limit of questions."""

from collections.abc import Sequence
from dataclasses import dataclass

from cppo.errors import UserError, choose_one
from cppo.evaluation.benchmarks.benchmark import Benchmark
from cppo.evaluation.benchmarks.further import FURTHER
from cppo.evaluation.benchmarks.paper import PAPER

BENCHMARKS = {one.name: one for one in (*PAPER, *FURTHER)}
"""Every benchmark by its name."""
PAPER_SAMPLES = 16
NEW_TOKENS = 2048
"""The longest response in the paper's harness, in tokens, independent of a model's training."""
QUICK_LIMIT = 200


@dataclass(frozen=True)
class Suite:
    """Benchmarks in order; `samples` of each question, of at most `limit` rows of each (None: all)."""

    benchmarks: tuple[Benchmark, ...]
    samples: int = PAPER_SAMPLES
    limit: int | None = None


SUITES = {"paper": Suite(PAPER), "quick": Suite(PAPER, samples=1, limit=QUICK_LIMIT)}


def choose_suite(words: Sequence[str]) -> Suite:
    """The suite for names of suites and benchmarks; `quick` among them sets samples and limit.

    Raises UserError for an unknown name.
    """
    chosen: dict[str, Benchmark] = {}
    for word in words:
        if word not in SUITES and word not in BENCHMARKS:
            raise UserError(f"--suite: {word!r} is unknown; {choose_one(word, (*SUITES, *BENCHMARKS))}")
        named = SUITES[word].benchmarks if word in SUITES else (BENCHMARKS[word],)
        chosen |= {one.name: one for one in named}
    how = SUITES["quick" if "quick" in words else "paper"]
    return Suite(tuple(chosen.values()), how.samples, how.limit)
