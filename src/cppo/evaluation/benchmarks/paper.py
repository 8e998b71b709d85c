"""The seven benchmarks of the CPPO paper (arXiv 2601.00501), as its harness runs them.

The harness is VLMEvalKit with the scripts of vbdi/cppo@3443b17, folder eval-VLMEvalKit. Data sets and figures are from
run_eval.sh and create_performance_summary.py, sampling from vlmeval/config.py. The harness first cuts a response down
to the last `\\boxed{}`. A language model then reads what is neither a bare letter nor a number.
"""

import re
from typing import Any

from cppo.evaluation.benchmarks.answers import number, option_labels, option_letter, same_answer, text_list
from cppo.evaluation.benchmarks.benchmark import Benchmark, Question, Row, Sources
from cppo.evaluation.benchmarks.metrics import FOUR_DIMENSIONS, WORST_CASE

LETTERS = "ABCDEFGHIJ"
VLMEVALKIT = "open-compass/VLMEvalKit@e8e78f0 vlmeval/dataset"
LMMS_EVAL = "EvolvingLMMs-Lab/lmms-eval@75571cf lmms_eval/tasks"


# LogicVista: a gold answer is a letter, a list of letters ("B, D") or a digit; one row has none.
def _logicvista(row: Row, split: str) -> Question | None:
    answer = option_labels(str(row["answer"]))
    skill = _first(row["skill"]) if row.get("skill") else "unknown"  # lmms-eval, which names the mirror, reads no skill
    return Question(row["question"], row["image"], answer, facts={"skill": skill}) if answer else None


LOGICVISTA = Benchmark(
    name="logicvista",
    title="LogicVista",
    hub="lscpku/LogicVista",
    splits=("test",),
    columns=("question", "image", "answer"),
    size=447,
    licence="Apache-2.0",
    answers="option letters",
    ask=_logicvista,
    is_right=lambda question, answer: option_labels(answer) == question.answer,
    by=("skill",),
    judge="extraction",
    sources=Sources(
        layout=f"{LMMS_EVAL}/logicvista/reasoning/logicvista_thinking.yaml, utils.py",
        prompt=f"{VLMEVALKIT}/image_base.py",
        metric=f"{VLMEVALKIT}/utils/logicvista.py",
    ),
    in_paper=True,
)


# MathVista: the expected option is given by its text; a float is rounded to `precision` decimals.
def _mathvista(row: Row, split: str) -> Question:
    choices = tuple(row["choices"] or ())
    kind = "option" if row["question_type"] == "multi_choice" else row["answer_type"]
    answer = LETTERS[choices.index(row["answer"])] if kind == "option" else row["answer"]
    facts = {"kind": kind, "decimals": str(int(row["precision"] or 0)), "task": row["metadata"]["task"]}
    return Question(row["query"], row["decoded_image"], answer, choices, facts)


def _mathvista_right(question: Question, answer: str) -> bool:
    kind = question.facts["kind"]
    if kind == "option":
        return option_letter(answer, LETTERS[: len(question.choices)], question.choices) == question.answer
    if kind == "list":
        return _without_spaces(answer) == _without_spaces(question.answer)
    value = number(answer)
    if kind not in ("integer", "float") or value is None:
        return same_answer(answer, question.answer)
    return str(int(value) if kind == "integer" else round(value, int(question.facts["decimals"]))) == question.answer


MATHVISTA = Benchmark(
    name="mathvista",
    title="MathVista testmini",
    hub="AI4Math/MathVista",
    splits=("testmini",),
    columns=("query", "decoded_image", "choices", "precision", "answer", "question_type", "answer_type", "metadata"),
    size=1000,
    licence="CC BY-SA 4.0, not for training",
    answers="option letters, integers, floats, lists",
    ask=_mathvista,
    is_right=_mathvista_right,
    by=("task",),
    judge="extraction",
    sources=Sources(
        layout="AI4Math/MathVista@d32e834 README.md (hub)",
        prompt="lupantech/MathVista@53d5258 evaluation/build_query.py",
        metric=f"lupantech/MathVista@53d5258 evaluation/calculate_score.py; options: {VLMEVALKIT}/utils/mathvista.py",
    ),
    in_paper=True,
)


# DynaMath: ten variants of each of 501 seed questions; gold answers such as "5.000000000000001".
DYNAMATH_FORM = """
## Answer Instruction Please provide an answer to the question outlined above. Your response should adhere \
to the following JSON format, which includes two keys: 'solution' and 'short answer'. The 'solution' key can contain \
detailed steps needed to solve the question, and the 'short answer' key should provide a concise response. {}

Example of expected JSON response format:

{{
    "solution": "[Detailed step-by-step explanation]",
    "short answer": "[Concise Answer]"
}}"""
"""The form that VLMEvalKit's dynamath.py asks for, word for word: its metric reads it."""
DYNAMATH_KINDS = {
    "multiple choice": "Provide the corresponing choice option in the 'short answer' key, such as 'A', 'B', 'C', or "
    "'D'.",
    "float": "Format the answer as a three-digit floating-point number and provide it in the 'short answer' key.",
}
DYNAMATH_OTHER = "Float numbers in the answer should be formatted as three-digit floating-point numbers."
DYNAMATH_TOLERANCE = 0.001
_SHORT_ANSWER = re.compile(r'"short answer"\s*:\s*(?:"((?:[^"\\]|\\.)*)"|([^,}\n]+))')


def _dynamath(row: Row, split: str) -> Question:
    kind, answer = row["answer_type"], str(row["ground_truth"])
    if kind == "float":
        float(answer)  # reading the row reports what is no number
    prompt = f"## Question\n {row['question']}" + DYNAMATH_FORM.format(DYNAMATH_KINDS.get(kind, DYNAMATH_OTHER))
    facts = {"kind": kind, "seed": str(row["id"]), "subject": " ".join(row["subject"].split())}
    facts["level"] = row["knowledge_level"]
    return Question(prompt, row["decoded_image"], answer, facts=facts)


def _dynamath_right(question: Question, answer: str) -> bool:
    found = _SHORT_ANSWER.search(answer)
    short = (found[1] or found[2] or "").strip() if found else answer
    if question.facts["kind"] == "multiple choice":
        return option_letter(short, "ABCDE") == question.answer
    if question.facts["kind"] == "float":
        value = number(short)
        return value is not None and abs(value - float(question.answer)) <= DYNAMATH_TOLERANCE
    return short != "" and short.lower() in question.answer.lower()


DYNAMATH = Benchmark(
    name="dynamath",
    title="DynaMath",
    hub="DynaMath/DynaMath_Sample",
    splits=tuple(f"sample_variant{n}" for n in range(1, 11)),
    columns=("id", "question", "decoded_image", "ground_truth", "answer_type", "subject", "knowledge_level"),
    size=5010,
    licence="Apache-2.0",
    answers="option letters, floats (0.001), text",
    ask=_dynamath,
    is_right=_dynamath_right,
    metric=WORST_CASE,
    unit=("seed",),
    by=("subject", "level"),
    judge="extraction without JSON",
    sources=Sources(
        layout="DynaMath/DynaMath_Sample@5370736 README.md (hub)",
        prompt=f"{VLMEVALKIT}/dynamath.py",
        metric=f"{VLMEVALKIT}/dynamath.py",
    ),
    in_paper=True,
)


# We-Math: the options are one string, which is passed on unchanged.
def _wemath(row: Row, split: str) -> Question:
    facts = {"problem": str(row["ID"]), "key": row["key"]}
    return Question(f"{row['question']}\n{row['option']}", row["image_path"], row["answer"], facts=facts)


WEMATH = Benchmark(
    name="wemath",
    title="We-Math testmini",
    hub="We-Math/We-Math",
    splits=("testmini",),
    columns=("ID", "key", "question", "option", "answer", "image_path"),
    size=1740,
    licence="CC BY-NC 4.0",
    answers="option letters",
    ask=_wemath,
    is_right=lambda question, answer: option_letter(answer, "ABCDEFGH") == question.answer,
    metric=FOUR_DIMENSIONS,
    unit=("problem",),
    judge="extraction",
    sources=Sources(
        layout=f"{LMMS_EVAL}/wemath/reasoning/utils.py; We-Math/We-Math@a57a0e8 data/testmini.json",
        prompt=f"{LMMS_EVAL}/wemath/reasoning/utils.py",
        metric="We-Math/We-Math@a57a0e8 evaluation/four_dimensional_metrics.py, accuracy.py",
    ),
    in_paper=True,
)


# MathVision: if only the image shows the options, the row has the letters A to E instead.
def _mathvision(row: Row, split: str) -> Question:
    options = tuple(row["options"] or ())
    listed = options if "".join(options) != LETTERS[: len(options)] else ()
    lines = [row["question"], *(f"({letter}) {text}" for letter, text in zip(LETTERS, listed, strict=False))]
    facts = {"kind": "option" if options else "value", "level": str(row["level"]), "subject": row["subject"]}
    return Question("\n".join(lines), row["decoded_image"], str(row["answer"]), listed, facts)


def _letter_or_value(question: Question, answer: str) -> bool:
    if question.facts["kind"] != "option":
        return answer == question.answer or same_answer(answer, question.answer)
    expected = option_letter(question.answer, LETTERS) or question.answer
    named = option_letter(answer, LETTERS, question.choices)
    if named is not None or answer == expected:
        return expected in (named, answer)
    value = dict(zip(LETTERS, question.choices, strict=False)).get(expected)
    return value is not None and same_answer(answer, value)


MATHVISION = Benchmark(
    name="mathvision",
    title="MathVision testmini",
    hub="MathLLMs/MathVision",
    splits=("testmini",),
    columns=("question", "options", "decoded_image", "answer", "level", "subject"),
    size=304,
    licence="MIT",
    answers="option letters, numbers",
    ask=_mathvision,
    is_right=_letter_or_value,
    by=("level", "subject"),
    judge="extraction",
    sources=Sources(
        layout="MathLLMs/MathVision@3929e1f README.md (hub)",
        prompt="mathllm/MATH-V@a1f5cc3 models/GPT4V.py",
        metric=f"mathllm/MATH-V@a1f5cc3 evaluation/evaluate.py; {VLMEVALKIT}/utils/mathv.py",
    ),
    in_paper=True,
)


# MathVerse: five versions of each problem; a Vision Only row has its question in the image only.
_MATHVERSE_OPTION = re.compile(r"^([A-J]):(.*)$", re.MULTILINE)


def _mathverse(row: Row, split: str) -> Question:
    options = _MATHVERSE_OPTION.findall(row.get("question_for_eval") or row["question"])
    kind = "option" if row["question_type"] == "multi-choice" else "value"
    in_order = kind == "option" and "".join(letter for letter, _ in options) == LETTERS[: len(options)]
    choices = tuple(text.strip() for _, text in options) if in_order else ()
    facts = {"kind": kind, "problem": str(row["problem_index"]), "version": row["problem_version"]}
    facts["subject"] = row["metadata"]["subject"]
    return Question(row["question"] or row["query_wo"], row["image"], row["answer"].strip(), choices, facts)


MATHVERSE = Benchmark(
    name="mathverse",
    title="MathVerse testmini",
    hub="AI4Math/MathVerse",
    config="testmini",
    splits=("testmini",),
    columns=(
        "problem_index",
        "problem_version",
        "question",
        "image",
        "answer",
        "question_type",
        "metadata",
        "query_wo",
    ),
    size=3940,
    licence="MIT",
    answers="option letters, values",
    ask=_mathverse,
    is_right=_letter_or_value,
    unit=("problem",),
    by=("version", "subject"),
    judge="extraction, scoring",
    sources=Sources(
        layout="ZrrSkywalker/MathVerse@937b090 README.md; AI4Math/MathVerse@96641f2 README.md (hub)",
        prompt=f"{VLMEVALKIT}/image_vqa.py; Vision Only: query_wo of the data set",
        metric=f"{VLMEVALKIT}/utils/mathverse.py",
    ),
    in_paper=True,
)


# MMMU-Pro, vision: question and options are in the image.
MMMU_PRO_PROMPT = (
    "Answer the following multiple-choice question in the image. "
    "Answer directly with the option letter from the given choices. "
)


def _mmmu_pro(row: Row, split: str) -> Question:
    return Question(
        MMMU_PRO_PROMPT, row["image"], row["answer"], text_list(row["options"]), facts={"subject": row["subject"]}
    )


MMMU_PRO = Benchmark(
    name="mmmu_pro_vision",
    title="MMMU-Pro vision",
    hub="MMMU/MMMU_Pro",
    config="vision",
    splits=("test",),
    columns=("image", "options", "answer", "subject"),
    size=1730,
    licence="Apache-2.0",
    answers="option letters A to J",
    ask=_mmmu_pro,
    is_right=lambda question, answer: (
        option_letter(answer, LETTERS[: len(question.choices)], question.choices) == question.answer
    ),
    by=("subject",),
    judge="extraction",
    sources=Sources(
        layout=f"{LMMS_EVAL}/mmmu_pro/utils.py",
        prompt=f"{VLMEVALKIT}/image_mcq.py",
        metric="MMMU-Benchmark/MMMU@bb0b95a mmmu-pro/evaluate.py, without its random guesses",
    ),
    in_paper=True,
)

PAPER = (LOGICVISTA, MATHVISTA, DYNAMATH, WEMATH, MATHVISION, MATHVERSE, MMMU_PRO)


def _first(cell: Any) -> str:
    """The first of a list, or the cell itself, as text; "" for an empty list."""
    return str(next(iter(cell), "")) if isinstance(cell, list | tuple) else str(cell)


def _without_spaces(text: str) -> str:
    return "".join(text.split())
