"""Benchmarks beside the paper's: geometry and school questions near the training data, and hallucination."""

from cppo.evaluation.benchmarks.answers import option_letter, same_answer, yes_or_no
from cppo.evaluation.benchmarks.benchmark import Benchmark, Question, Row, Sources
from cppo.evaluation.benchmarks.metrics import CONSISTENCY, YES_F1
from cppo.evaluation.benchmarks.paper import LMMS_EVAL, VLMEVALKIT

GEOMETRY3K = Benchmark(
    name="geometry3k",
    title="Geometry3K test",
    hub="hiyouga/geometry3k",
    splits=("test",),
    columns=("images", "problem", "answer"),
    size=601,
    licence="MIT",
    answers="values",
    ask=lambda row, split: Question(row["problem"], row["images"], row["answer"]),
    is_right=lambda question, answer: same_answer(answer, question.answer),
    sources=Sources(
        layout="hiyouga/geometry3k@37e4933 README.md (hub)",
        prompt="the data set's own text",
        metric="MikeWangWZHL/PAPO@fb63bf4 README.md (equality of the last box)",
    ),
)

MMK12 = Benchmark(
    name="mmk12",
    title="MMK12 test",
    hub="FanqingM/MMK12",
    splits=("test",),
    columns=("question", "answer", "image", "subject"),
    size=2000,
    licence="Apache-2.0 by third parties",
    answers="option letters",
    ask=lambda row, split: Question(row["question"], row["image"], row["answer"], facts={"subject": row["subject"]}),
    is_right=lambda question, answer: option_letter(answer, "ABCDEFGH") == question.answer,
    by=("subject",),
    sources=Sources(
        layout="third-party readers of the data set alone",
        prompt="the data set's own text",
        metric="accuracy of the letter; no harness of its own was found",
    ),
    verified=False,
)


def _pope(row: Row, split: str) -> Question:
    facts = {"category": row["category"], "picture": str(row["image_source"])}
    return Question(row["question"], row["image"], row["answer"].strip().lower(), facts=facts)


def _says(question: Question, answer: str) -> bool:
    return yes_or_no(answer) == question.answer


POPE = Benchmark(
    name="pope",
    title="POPE",
    hub="lmms-lab/POPE",
    splits=("test",),
    columns=("question", "answer", "image_source", "image", "category"),
    size=9000,
    licence="unverified",
    answers="yes or no",
    ask=_pope,
    is_right=_says,
    metric=YES_F1,
    unit=("picture",),
    by=("category",),
    judge="extraction of unclear answers",
    sources=Sources(
        layout=f"{LMMS_EVAL}/pope/utils.py; columns from copies' cards",
        prompt=f"{VLMEVALKIT}/image_yorn.py",
        metric=f"{VLMEVALKIT}/utils/yorn.py",
    ),
    verified=False,
)


def _hallusion(row: Row, split: str) -> Question:
    group = "_".join(str(row[name]) for name in ("category", "subcategory", "set_id"))
    facts = {"set": group, "figure": str(row["figure_id"]), "question": str(row["question_id"])}
    facts["category"] = row["category"]
    return Question(row["question"], row["image"], "yes" if str(row["gt_answer"]) == "1" else "no", facts=facts)


HALLUSIONBENCH = Benchmark(
    name="hallusionbench",
    title="HallusionBench, with images",
    hub="lmms-lab/HallusionBench",
    splits=("image",),
    columns=("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer", "image"),
    size=951,
    licence="BSD-3-Clause by third parties",
    answers="yes or no",
    ask=_hallusion,
    is_right=_says,
    metric=CONSISTENCY,
    unit=("set",),
    by=("category",),
    judge="extraction of unclear answers",
    sources=Sources(
        layout=f"{LMMS_EVAL}/hallusion_bench/hallusion_bench_image.yaml, utils.py; card of the data set (hub)",
        prompt=f"{VLMEVALKIT}/image_yorn.py",
        metric=f"{VLMEVALKIT}/utils/yorn.py",
    ),
)

FURTHER = (GEOMETRY3K, MMK12, POPE, HALLUSIONBENCH)
