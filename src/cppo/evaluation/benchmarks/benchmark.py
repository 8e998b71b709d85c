"""A benchmark as a declaration: where its rows lie, what is asked, which answer is right, how answers sum up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cppo.evaluation.benchmarks.answers import final_answer
from cppo.evaluation.benchmarks.metrics import ACCURACY, Metric

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One row of a benchmark as it is asked.

    Attributes:
        prompt: the text, in the words of `Sources.prompt`.
        image: the row's cell; a list of several.
        answer: the expected answer.
        choices: the texts of the options A, B, ..., where the row has them apart.
        facts: what scoring and summing up go by: the kind of the answer, the problem that the row belongs to.
    """

    prompt: str
    image: Any
    answer: str
    choices: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sources:
    """Where a fact was read, each as "owner/repository@commit path"."""

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
        columns: that every row must have.
        size: rows that are asked, and counted in the metric.
        licence: as the data set's card or repository states it.
        answers: the kinds of answers, in words.
        ask: a row and its split as a question; None where the row is left out.
        is_right: whether a final answer (`final_answer`) to a question is right.
        metric: how right and wrong sum up.
        unit: the facts that rows of one unit share (`Metric`); none: each row is a unit.
        by: the facts by which accuracy is also told.
        judge: the part of a language model in the benchmark's harness, which is done by rule here; "" for none.
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
        """Whether a response answers a question rightly."""
        return self.is_right(question, final_answer(response))
