"""A study's processes: where each keeps its files, what it is asked, and whether it is finished already. No torch."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cppo
from cppo.assets import resolve_model
from cppo.comparison.definitions import evaluation_definitions, training_definitions
from cppo.comparison.study import FIXED, Cell, Study, given_options
from cppo.data.spec import PathSpec, parse_spec
from cppo.errors import UserError
from cppo.files import content_fingerprint, model_fingerprint, replace_text
from cppo.parsing import parse_json
from cppo.recipes import Recipe, TrainOptions, schema
from cppo.rewards import DEFAULT_REWARDS, check_rewards
from cppo.views import own_files

VIEW_LISTS = ("preserving_views", "removing_views", "rollout_views")
DEFINITIONS = "definitions"
"""The entry of an identity that holds them."""
REQUEST, RESULT, LOG, MODEL = "request.json", "cell.json", "log.txt", "model"
REMEDY = "give --rerun to run such cells again, or another output_dir"


@dataclass(frozen=True, eq=False)
class Job:
    """A process to run: `kind` is "start" (evaluate the start checkpoint), "cell" (train and evaluate) or "timing"
    (train alone on the machine). `identity` holds every option on which its result depends, and the definitions of what
    they name (`cppo.comparison.definitions`); the rest of the request says how it is called and what it keeps.
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
        """What the finished process wrote; None if it has not finished.

        Raises UserError for a file that cannot be read, or is another program's.
        """
        file = self.folder / RESULT
        try:
            content = parse_json(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read: {error}; remove it to run the cell again") from error
        if not isinstance(content, dict) or "identity" not in content:
            raise UserError(f"{file} was not written by cppo compare; choose another output_dir")
        return content

    def changed(self) -> list[str]:
        """The options in which the finished result differs from what is asked now.

        One that either does not give counts as its default: new options do not make old results others. Where the
        method has another definition since, only the options that the study gives are compared.
        """
        result = self.result()
        if result is None:
            return []
        fields, given = schema("train").fields, self.request["recipe"]
        ignored = {*FIXED, DEFINITIONS}
        if any(part.startswith("method ") for part in self.redefined()):
            # Options of then too, some of which may be gone.
            ignored |= {*fields, *result["options"]} - {*given["config"], *given["options"]}
        defaults = {name: field.default for name, field in fields.items()}
        before, now = ({**defaults, **one} for one in (result["identity"], json.loads(json.dumps(self.identity))))
        return sorted(name for name in {*before, *now} - ignored if before.get(name) != now.get(name))

    def redefined(self) -> dict[str, tuple[int, int]]:
        """The parts of which the finished result has another definition than the code has now: (its, the code's)."""
        result = self.result()
        if result is None:
            return {}
        before, now = definitions_of(result), self.identity[DEFINITIONS]
        return {part: (before.get(part, 1), number) for part, number in now.items() if before.get(part, 1) != number}

    def begin(self) -> None:
        """Make the folder ready for a new try."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, LOG, "metrics.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / REQUEST, {**self.request, "kind": self.kind, "identity": self.identity})


def definitions_of(result: Mapping[str, Any]) -> dict[str, int]:
    """The definitions that a result was run with; a part that is missing has definition 1."""
    return result["identity"].get(DEFINITIONS, {})


def study_jobs(study: Study) -> list[Job]:
    """Starts, then cells, in the order in which they are run."""
    fingerprint = cache(content_fingerprint)
    starts = (start_job(study, task, fingerprint) for task in study.tasks)
    return [*starts, *(cell_job(study, cell, fingerprint) for cell in study.cells)]


def start_job(study: Study, task: str, fingerprint: Callable[[Path], str] = content_fingerprint) -> Job:
    """The evaluation of a task's start checkpoint, which is step 0 of all its cells."""
    recipe = study.cell_recipe(task, study.variants[0], 0)
    identity = {
        "evaluation": study.evaluations[task],
        DEFINITIONS: evaluation_definitions(study.evaluations[task]),
        "start_weights": start_weights(recipe.options.model),
        **_contents([*_data_files(recipe.options.eval_data), *_view_files(study.evaluations[task])], fingerprint),
    }
    request = {"task": task, "recipe": _recipe_values(recipe), "steps": [0]}
    return Job("start", f"{task}, start", study.output_dir / "start" / task, identity, request)


def cell_job(study: Study, cell: Cell, fingerprint: Callable[[Path], str] = content_fingerprint) -> Job:
    """A cell of the grid."""
    identity = {
        **given_options(cell.recipe),
        "evaluation": study.evaluations[cell.task],
        DEFINITIONS: {**_definitions(cell.recipe), **evaluation_definitions(study.evaluations[cell.task])},
        "steps": study.evaluation_steps(cell.recipe),
        "start_weights": start_weights(cell.recipe.options.model),
        **_contents([*_cell_files(cell.recipe), *_view_files(study.evaluations[cell.task])], fingerprint),
    }
    request = {
        "task": cell.task,
        "label": cell.label,
        "seed": cell.seed,
        "recipe": _recipe_values(cell.recipe),
        "steps": identity["steps"],
        "keep_model": study.options.keep_models,
    }
    folder = study.output_dir / "cells" / cell.task / cell.label / f"seed-{cell.seed}"
    return Job("cell", f"{cell.task}, {cell.label}, seed {cell.seed}", folder, identity, request)


def timing_jobs(study: Study) -> list[Job]:
    """Each method of each task in turn, round after round, with its first seed; none if the study asks for none."""
    steps = study.options.timing_steps
    jobs = []
    for repeat in range(study.options.timing_repeats if steps else 0):
        for task in study.tasks:
            for variant in study.variants:
                recipe = study.cell_recipe(task, variant, study.seeds[variant.label][0])
                recipe = dataclasses.replace(recipe, config={**recipe.config, "max_steps": steps})
                identity = {
                    **given_options(recipe),
                    DEFINITIONS: _definitions(recipe),
                    "start_weights": start_weights(recipe.options.model),
                    **_contents(_cell_files(recipe), content_fingerprint),
                }
                request = {"task": task, "label": variant.label, "recipe": _recipe_values(recipe), "steps": []}
                folder = study.output_dir / "timing" / task / variant.label / f"round-{repeat}"
                jobs.append(Job("timing", f"{task}, {variant.label}, timing {repeat}", folder, identity, request))
    return jobs


def pending(jobs: list[Job], *, rerun: bool) -> list[Job]:
    """The jobs without a result. With `rerun` also those whose options or definitions have changed since.

    Raises UserError where a finished job's have changed and `rerun` is not given.
    """
    if not rerun:
        check_finished(jobs)
        for job in jobs:
            if redefined := job.redefined():
                raise UserError(
                    f"{job.folder} was run with other definitions than the code has now ({tell_redefined(redefined)}); "
                    f"{REMEDY}; --report_only reports it as it is"
                )
    return [job for job in jobs if job.result() is None or job.changed() or job.redefined()]


def check_finished(jobs: Iterable[Job]) -> None:
    """Raise UserError where a finished job ran with other options than are asked now."""
    for job in jobs:
        if changed := job.changed():
            raise UserError(f"{job.folder} was run with other options ({', '.join(changed)}); {REMEDY}")


def tell_redefined(redefined: Mapping[str, tuple[int, int]]) -> str:
    """What `Job.redefined` found, in words."""
    return ", ".join(f"{part}: {before}, now {now}" for part, (before, now) in redefined.items())


def adopt(study: Study, jobs: list[Job]) -> list[Job]:
    """Copy the results that the study lacks and another of its `cells_from` has, under the same task, label and seed,
    with equal options and definitions; returns the jobs that got one.

    Raises UserError where one of the folders is not there, or a result in it cannot be read.
    """
    folders = [Path(name) for name in study.options.cells_from]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"cells_from: {folder}: no such folder; give the output_dir of another study")
    adopted = []
    for job in jobs:
        for folder in folders if job.result() is None else ():
            there = dataclasses.replace(job, folder=folder / job.folder.relative_to(study.output_dir))
            if (result := there.result()) is not None and not (there.changed() or there.redefined()):
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
def start_weights(model: str) -> str:
    """What tells a model folder's weights from others; of a hub's model the name."""
    folder = Path(resolve_model(model))
    return model_fingerprint(folder, whole=True) if folder.is_dir() else model


def write_json(file: Path, content: Any) -> None:
    """Write a whole file or none."""
    replace_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _data_files(specs: str | list[str] | None) -> list[Path]:
    texts = [specs] if isinstance(specs, str) else specs or []
    return [spec.path for text in texts if isinstance(spec := parse_spec(text), PathSpec)]


def _cell_files(recipe: Recipe) -> list[Path]:
    """The local files that training and evaluation read, code of the user's own included."""
    options = recipe.options
    assert isinstance(options, TrainOptions)
    rewards = [spec.file for spec in check_rewards(options.rewards or DEFAULT_REWARDS, None) if spec.file]
    return [*_data_files(options.data), *_data_files(options.eval_data), *rewards, *_view_files(given_options(recipe))]


def _view_files(options: Mapping[str, Any]) -> list[Path]:
    return own_files([one for name in VIEW_LISTS for one in options.get(name, ())])


def _contents(files: list[Path], fingerprint: Callable[[Path], str]) -> dict[str, Any]:
    """What the files hold on which a result depends, as an entry of its identity; none where there are no files."""
    return {"contents_of_files": {str(file): fingerprint(file) for file in files}} if files else {}


def _definitions(recipe: Recipe) -> dict[str, int]:
    return training_definitions(recipe.resolved, recipe.method)


def _recipe_values(recipe: Recipe) -> dict[str, Any]:
    return {"name": recipe.name, "options": dataclasses.asdict(recipe.options), "config": dict(recipe.config)}
