"""`cppo eval --suite` on stand-ins: small data sets of generated items in the exact layout of each benchmark.

    python benchmarks/paper_suite.py DIR                     writes them below DIR, as ORG/NAME, and evaluates `micro`
    python benchmarks/paper_suite.py DIR --suite paper pope  other benchmarks; the options are those of `cppo eval`

It tests the whole path, not the quality of a model.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, Features, Image, List, Value, disable_progress_bars

from cppo.cli.main import main as cppo
from cppo.tasks import TaskItem, make_item, parse_task_options

TEXT, WHOLE, REAL = Value("string"), Value("int64"), Value("float64")
Rows = list[dict[str, Any]]
MATHVERSE_VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")


def item(index: int) -> TaskItem:
    """A generated question with a whole number as its answer."""
    return make_item("digits", parse_task_options("digits", {"noise": "100"}), seed=0, index=index, split="test")


def encoded(index: int) -> dict[str, Any]:
    """An item's picture as `datasets` stores images."""
    buffer = io.BytesIO()
    item(index).image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": f"{index}.png"}


def options_of(index: int, count: int) -> tuple[list[str], str]:
    """`count` different whole numbers, and the letter of the right one among them."""
    right, place = int(item(index).answer), index % count
    return [str(right + shift - place) for shift in range(count)], "ABCDEFGHIJ"[place]


def lettered(index: int, count: int, form: str, between: str) -> tuple[str, str]:
    options, letter = options_of(index, count)
    return between.join(form.format(*pair) for pair in zip("ABCDEFGHIJ", options, strict=False)), letter


def logicvista() -> dict[str, Rows]:
    rows = []
    for n, answer in enumerate([None, None, None, None, "B, D", "3", ""]):
        lines, letter = lettered(n, 4, "{}: {}", ", ")
        rows.append(
            {
                "id": f"v1_{n}",
                "image": encoded(n),
                "question": f"{item(n).prompt} Select from {lines}.",
                "answer": letter if answer is None else answer,
                "reasoning": "",
                "skill": [("inductive", "numerical")[n % 2]],
                "broad_capability": ["diagram"],
                "specific_capability": ["sequence pattern"],
                "imagesource": "",
                "sourcelink": "",
                "liscenced": "true",
            }
        )
    return {"test": rows}


def mathvista() -> dict[str, Rows]:
    rows = []
    for n in range(6):
        lines, letter = lettered(n, 3, "({}) {}", "\n")
        options, _ = options_of(n, 3)
        is_option, is_float = n % 3 == 0, n % 3 == 1
        asked = f"Question: {item(n).prompt}" + f"\nChoices:\n{lines}" * is_option
        rows.append(
            {
                "pid": str(n),
                "question": item(n).prompt,
                "image": f"images/{n}.jpg",
                "decoded_image": encoded(n),
                "choices": options if is_option else None,
                "unit": None,
                "precision": 1.0 if is_float else None,
                "answer": options["ABC".index(letter)] if is_option else item(n).answer + ".0" * is_float,
                "question_type": "multi_choice" if is_option else "free_form",
                "answer_type": "text" if is_option else "float" if is_float else "integer",
                "metadata": {
                    "task": "figure question answering",
                    "skills": ["arithmetic reasoning"],
                    "split": "testmini",
                },
                "query": f"Hint: give the final value at the end.\n{asked}",
            }
        )
    return {"testmini": rows}


def dynamath() -> dict[str, Rows]:
    def row(seed: int, variant: int) -> dict[str, Any]:
        n = 10 * seed + variant
        lines, letter = lettered(n, 3, "({}) {}", " ")
        is_option = seed == 0
        return {
            "id": str(seed),
            "question": item(n).prompt + f" Choices: {lines}" * is_option,
            "image": f"{n}.png",
            "decoded_image": encoded(n),
            "ground_truth": letter if is_option else f"{item(n).answer}.000000000000001",
            "answer_type": "multiple choice" if is_option else "float",
            "subject": "solid  geometry",
            "knowledge_level": "high school",
        }

    return {f"sample_variant{v}": [row(seed, v - 1) for seed in range(3)] for v in range(1, 11)}


def wemath() -> dict[str, Rows]:
    rows = []
    for problem, steps in enumerate((2, 2, 3)):
        for place, step in enumerate((*range(1, steps + 1), "multi")):
            n = 4 * problem + place
            lines, letter = lettered(n, 4, "{}. {}", ("; ", ";")[n % 2])
            rows.append(
                {
                    "ID": f"{steps}steps_{problem}",
                    "split": "testmini",
                    "knowledge concept": "Area",
                    "question": item(n).prompt,
                    "option": lines,
                    "answer": letter,
                    "image_path": encoded(n),
                    "key": f"{steps}steps_{step}",
                    "question number": n,
                    "knowledge concept description": "",
                }
            )
    return {"testmini": rows}


def mathvision() -> dict[str, Rows]:
    rows = []
    for n in range(6):
        options, letter = options_of(n, 5)
        kind = ("option", "letters", "value")[n % 3]
        rows.append(
            {
                "id": str(n),
                "question": f"{item(n).prompt}\n<image1>",
                "options": {"option": options, "letters": list("ABCDE"), "value": []}[kind],
                "image": f"images/{n}.jpg",
                "decoded_image": encoded(n),
                "answer": item(n).answer if kind == "value" else letter,
                "solution": None,
                "level": 1 + n % 5,
                "subject": "counting",
            }
        )
    return {"testmini": rows}


def mathverse() -> dict[str, Rows]:
    rows = []
    for n in range(4):
        lines, letter = lettered(n, 4, "{}:{}", "\n")
        question = item(n).prompt + f"\nChoices:\n{lines}" * (n % 2)
        rows += [
            {
                "sample_index": str(5 * n + place),
                "problem_index": str(n),
                "problem_version": version,
                "question": "" if version == "Vision Only" else question,
                "image": encoded(n),
                "answer": letter if n % 2 else item(n).answer,
                "question_type": "multi-choice" if n % 2 else "free-form",
                "metadata": {
                    "split": "testmini",
                    "source": "GeoQA",
                    "subject": "Plane Geometry",
                    "subfield": "Angle",
                },
                "query_wo": f"According to the question shown in the image, answer it.\n{question}",
                "query_cot": question,
                "question_for_eval": question,
            }
            for place, version in enumerate(MATHVERSE_VERSIONS)
        ]
    return {"testmini": rows}


def mmmu_pro() -> dict[str, Rows]:
    rows = []
    for n in range(6):
        options, letter = options_of(n, 10)
        subject = ("Art", "Math")[n % 2]
        row = {"id": f"test_{subject}_{n}", "image": encoded(n), "options": str(options)}
        rows.append({**row, "answer": letter, "subject": subject})
    return {"test": rows}


def geometry3k() -> dict[str, Rows]:
    rows = []
    for n in range(6):
        options, letter = options_of(n, 4)
        row = {"images": [encoded(n)], "problem": f"<image>{item(n).prompt}", "answer": item(n).answer, "id": n}
        rows.append({**row, "choices": options, "ground_truth": letter})
    return {"test": rows}


def mmk12() -> dict[str, Rows]:
    rows = []
    for n in range(6):
        lines, letter = lettered(n, 4, "{}. {}", "\n")
        row = {"id": str(n), "question": f"{item(n).prompt}\n{lines}", "answer": letter}
        rows.append({**row, "subject": ("math", "physics")[n % 2], "image": encoded(n)})
    return {"test": rows}


def pope() -> dict[str, Rows]:
    rows = []
    for n in range(12):
        row = {"id": str(n), "question_id": str(n), "question": f"Is there a {('cat', 'dog')[n % 2]} in the image?"}
        row |= {"answer": ("yes", "no")[n % 3 % 2], "image_source": str(n // 6), "image": encoded(n // 6)}
        rows.append({**row, "category": ("random", "popular", "adversarial")[n % 3]})
    return {"test": rows}


def hallusionbench() -> dict[str, Rows]:
    rows = []
    for n in range(8):
        place = {"set_id": str(n // 4), "figure_id": str(1 + n // 2 % 2), "question_id": str(n % 2)}
        row = {"category": "VD", "subcategory": "figure", "visual_input": "1", **place, "sample_note": ""}
        row |= {"question": "Is the left digit the larger one?", "gt_answer_details": "", "gt_answer": str(n % 2)}
        rows.append({**row, "filename": f"./{n}.png", "image": encoded(n)})
    return {"image": rows}


MATHVISTA_META = {"task": TEXT, "skills": List(TEXT), "split": TEXT}
MATHVERSE_META = dict.fromkeys(("split", "source", "subject", "subfield"), TEXT)
SPECIAL: dict[str, Any] = {
    "skill": List(TEXT),
    "broad_capability": List(TEXT),
    "specific_capability": List(TEXT),
    "decoded_image": Image(),
    "precision": REAL,
    "question number": WHOLE,
    "level": WHOLE,
}
"""Types of columns that are not text, except those with the same name in all data sets."""
REPOSITORIES: dict[str, tuple[Any, str | None, dict[str, Any]]] = {
    "lscpku/LogicVista": (logicvista, None, {"image": Image()}),
    "AI4Math/MathVista": (mathvista, None, {"choices": List(TEXT), "metadata": MATHVISTA_META}),
    "DynaMath/DynaMath_Sample": (dynamath, None, {}),
    "We-Math/We-Math": (wemath, None, {"image_path": Image()}),
    "MathLLMs/MathVision": (mathvision, None, {"options": List(TEXT)}),
    "AI4Math/MathVerse": (mathverse, "testmini", {"image": Image(), "metadata": MATHVERSE_META}),
    "MMMU/MMMU_Pro": (mmmu_pro, "vision", {"image": Image()}),
    "hiyouga/geometry3k": (geometry3k, None, {"images": List(Image()), "choices": List(TEXT), "id": WHOLE}),
    "FanqingM/MMK12": (mmk12, None, {"image": Image()}),
    "lmms-lab/POPE": (pope, None, {"image": Image()}),
    "lmms-lab/HallusionBench": (hallusionbench, None, {"image": Image()}),
}
"""Per data set, its rows by split, its configuration, and the types of its own columns."""


def repository(name: str, rows: Mapping[str, Rows] | None = None) -> dict[str, bytes]:
    """The files of a stand-in by path; `rows` by split replace its own."""
    make, config, types = REPOSITORIES[name]
    splits = make() if rows is None else rows
    files, data_files = {}, []
    for split, content in splits.items():
        features = {column: {**SPECIAL, **types}.get(column, TEXT) for column in content[0]}
        buffer = io.BytesIO()
        Dataset.from_list(content, features=Features(features)).to_parquet(buffer)
        path = f"{config or 'data'}/{split}-00000-of-00001.parquet"
        files[path] = buffer.getvalue()
        data_files.append({"split": split, "path": path.replace("00000-of-00001", "*")})
    card = {"configs": [{"config_name": config or "default", "data_files": data_files}]}
    return {"README.md": f"---\n{yaml.safe_dump(card)}---\n".encode(), **files}


def write(folder: Path) -> None:
    """Every stand-in as a folder ORG/NAME below `folder`."""
    for name in REPOSITORIES:
        for path, content in repository(name).items():
            file = folder / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(__doc__)
        return 2
    disable_progress_bars()
    write(Path(argv[0]))
    options = list(argv[1:])
    if "--suite" not in options:
        options += ["--suite", "paper"]
    if "--model" not in options:
        options += ["--model", "micro"]
    return cppo(["eval", "--benchmark_folder", argv[0], *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
