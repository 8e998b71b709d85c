"""Public benchmarks: each one short declaration, read from the hub, scored by rule as its harness scores."""

from cppo.evaluation.benchmarks.benchmark import Benchmark, Question
from cppo.evaluation.benchmarks.metrics import Figures, mean_of
from cppo.evaluation.benchmarks.reading import Asked, read_benchmark
from cppo.evaluation.benchmarks.suites import BENCHMARKS, NEW_TOKENS, Suite, choose_suite

__all__ = [
    "BENCHMARKS",
    "NEW_TOKENS",
    "Asked",
    "Benchmark",
    "Figures",
    "Question",
    "Suite",
    "choose_suite",
    "mean_of",
    "read_benchmark",
]
