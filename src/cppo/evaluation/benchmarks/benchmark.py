"""A benchmark as a declaration: where its rows are, the question, the right answer, the metric."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cppo.evaluation.benchmarks.answers import final_answer
from cppo.evaluation.benchmarks.metrics import ACCURACY, Metric

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One row of a benchmark as a question.

    Attributes:
        prompt: the text, in the words of `Sources.prompt`.
        image: the row's cell; a list of several.
        answer: the expected answer.
        choices: the texts of the options A, B, ..., if the row lists them.
        facts: values that scoring and metric use: the kind of the answer, the problem that the row belongs to.
    """

    prompt: str
    image: Any
    answer: str
    choices: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sources:
    """Sources of the facts, each as "owner/repository@commit path"."""

    layout: str
    prompt: str
    metric: str


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: on the command line.
        title: in tables.
        hub: ORG/NAME of the data set.
        config: of the data set; None for its only one.
        splits: read one after the other.
        columns: required columns of every row.
        size: number of rows that are asked and counted in the metric.
        licence: as the data set's card or repository states it.
        answers: the kinds of answers, in words.
        ask: maps a row and its split to a question; None leaves the row out.
        is_right: whether a final answer (`final_answer`) to a question is right.
        metric: computes the benchmark's figures from right and wrong answers.
        unit: the facts that rows of one unit share (`Metric`); none: each row is a unit.
        by: the facts by which accuracy is broken down.
        judge: the language model's part in the benchmark's harness, done by rule here; "" for none.
        verified: whether layout, prompt and metric were all read at their source.
        in_paper: whether the CPPO paper's mean counts it.
    """

    name: str
    title: str
    hub: str
    splits: tuple[str, ...]
    columns: tuple[str, ...]
    size: int
    licence: str
    answers: str
    ask: Callable[[Row, str], Question | None]
    is_right: Callable[[Question, str], bool]
    sources: Sources
    metric: Metric = ACCURACY
    config: str | None = None
    unit: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    judge: str = ""
    verified: bool = True
    in_paper: bool = False

    def right(self, question: Question, response: str) -> bool:
        """Whether a response answers a question correctly."""
        return self.is_right(question, final_answer(response))
