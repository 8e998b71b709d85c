"""A study's processes: where each keeps its files, what it is asked, and whether it is finished already. No torch."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cppo
from cppo.assets import resolve_model
from cppo.comparison.study import FIXED, Cell, Study, given_options
from cppo.errors import UserError
from cppo.recipes import Recipe, schema

REQUEST, RESULT, LOG, MODEL = "request.json", "cell.json", "log.txt", "model"


@dataclass(frozen=True, eq=False)
class Job:
    """A process to run: `kind` is "start" (evaluate the start checkpoint), "cell" (train and evaluate) or "timing"
    (train alone on the machine). `identity` holds every option on which its result depends; the rest of the request
    says how it is called and what it keeps.
    """

    kind: str
    name: str
    folder: Path
    identity: Mapping[str, Any]
    request: Mapping[str, Any]

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def result(self) -> dict[str, Any] | None:
        """What the finished process wrote; None if it has not finished."""
        return _read_result(self.folder / RESULT)

    def changed(self) -> list[str]:
        """The options in which the finished result differs from what is asked now.

        One that either does not give counts as its default: new options do not make old results others.
        """
        result = self.result()
        if result is None:
            return []
        defaults = {name: field.default for name, field in schema("train").fields.items()}
        before, now = ({**defaults, **given} for given in (result["identity"], json.loads(json.dumps(self.identity))))
        return sorted(name for name in {*before, *now} - {*FIXED} if before.get(name) != now.get(name))

    def begin(self) -> None:
        """Make the folder ready for a new try."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, LOG, "metrics.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / REQUEST, {**self.request, "kind": self.kind, "identity": self.identity})


def study_jobs(study: Study) -> list[Job]:
    """Starts, then cells, in the order in which they are run."""
    return [*(start_job(study, task) for task in study.tasks), *(cell_job(study, cell) for cell in study.cells)]


def start_job(study: Study, task: str) -> Job:
    """The evaluation of a task's start checkpoint, which is step 0 of all its cells."""
    recipe = study.cell_recipe(task, study.variants[0], 0)
    identity = {"evaluation": study.evaluations[task], "start_weights": weights_digest(recipe.options.model)}
    request = {"task": task, "recipe": _recipe_values(recipe), "steps": [0]}
    return Job("start", f"{task}, start", study.output_dir / "start" / task, identity, request)


def cell_job(study: Study, cell: Cell) -> Job:
    """A cell of the grid."""
    identity = {
        **given_options(cell.recipe),
        "evaluation": study.evaluations[cell.task],
        "steps": study.evaluation_steps(cell.recipe),
        "start_weights": weights_digest(cell.recipe.options.model),
    }
    request = {
        **_who(cell),
        "recipe": _recipe_values(cell.recipe),
        "steps": identity["steps"],
        "keep_model": study.options.keep_models,
    }
    return Job("cell", f"{cell.task}, {cell.label}, seed {cell.seed}", _folder(study, "cells", cell), identity, request)


def timing_jobs(study: Study) -> list[Job]:
    """Each method of each task in turn, round after round; none if the study asks for none."""
    steps = study.options.timing_steps
    jobs = []
    for repeat in range(study.options.timing_repeats if steps else 0):
        for task in study.tasks:
            for variant in study.variants:
                recipe = study.cell_recipe(task, variant, repeat)
                recipe = dataclasses.replace(recipe, config={**recipe.config, "max_steps": steps})
                cell = Cell(task, variant.label, repeat, recipe)
                identity = {**given_options(recipe), "start_weights": weights_digest(recipe.options.model)}
                request = {**_who(cell), "recipe": _recipe_values(recipe), "steps": []}
                name = f"{task}, {variant.label}, timing {repeat}"
                jobs.append(Job("timing", name, _folder(study, "timing", cell), identity, request))
    return jobs


def pending(jobs: list[Job], *, rerun: bool) -> list[Job]:
    """The jobs without a result. With `rerun` also those whose options have changed since.

    Raises:
        UserError: a finished job's options have changed, and `rerun` is not given.
    """
    waiting = []
    for job in jobs:
        changed = job.changed()
        if changed and not rerun:
            raise UserError(
                f"{job.folder} was run with other options ({', '.join(changed)}); give --rerun to run such cells "
                "again, or another output_dir"
            )
        if changed or job.result() is None:
            waiting.append(job)
    return waiting


def adopt(study: Study, jobs: list[Job]) -> list[Job]:
    """Copy the results that the study lacks and another of its `cells_from` has, under the same task, label and seed
    and with equal options; returns the jobs that got one.

    Raises:
        UserError: one of the folders is not there, or a result in it cannot be read.
    """
    folders = [Path(name) for name in study.options.cells_from]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"cells_from: {folder}: no such folder; give the output_dir of another study")
    adopted = []
    for job in jobs:
        for folder in folders if job.result() is None else ():
            there = dataclasses.replace(job, folder=folder / job.folder.relative_to(study.output_dir))
            if (result := there.result()) is not None and not there.changed():
                job.begin()
                write_json(job.folder / RESULT, result)
                adopted.append(job)
                break
    return adopted


def code_digest() -> str:
    """Which code it was: a hash of the package's source."""
    digest = hashlib.sha256()
    root = Path(cppo.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def weights_digest(model: str) -> str:
    """A hash of a model folder's weights and configuration; of a hub's model the name."""
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".jinja"):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()[:16]


def write_json(file: Path, content: Any) -> None:
    """Write a whole file or none: under another name first."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(file)


def _folder(study: Study, kind: str, cell: Cell) -> Path:
    return study.output_dir / kind / cell.task / cell.label / f"seed-{cell.seed}"


def _who(cell: Cell) -> dict[str, Any]:
    return {"task": cell.task, "label": cell.label, "seed": cell.seed}


def _recipe_values(recipe: Recipe) -> dict[str, Any]:
    return {"name": recipe.name, "options": dataclasses.asdict(recipe.options), "config": dict(recipe.config)}


def _read_result(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}; remove it to run the cell again") from error
    if not isinstance(content, dict) or "identity" not in content:
        raise UserError(f"{file} was not written by cppo compare; choose another output_dir")
    return content
