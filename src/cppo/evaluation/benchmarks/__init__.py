"""Public benchmarks: each one short declaration, read from the hub, scored by rule as its harness scores."""

from cppo.evaluation.benchmarks.benchmark import Benchmark, Question
from cppo.evaluation.benchmarks.further import FURTHER
from cppo.evaluation.benchmarks.paper import PAPER

BENCHMARKS = {one.name: one for one in (*PAPER, *FURTHER)}
"""Every benchmark by its name."""

__all__ = ["BENCHMARKS", "PAPER", "Benchmark", "Question"]
