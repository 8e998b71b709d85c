"""A study's processes: where each keeps its files, its request, and whether it is finished. No torch."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cppo.assets import resolve_model
from cppo.comparison.definitions import evaluation_definitions, present_part, training_definitions
from cppo.comparison.finished import DEFINITIONS, RESULT, flaws, read_archive, read_result
from cppo.comparison.study import FIXED, Cell, Study
from cppo.data.spec import PathSpec, parse_spec
from cppo.errors import UserError
from cppo.files import content_fingerprint, model_fingerprint, replace_text
from cppo.options import TrainOptions, schema
from cppo.recipes import Recipe, function_files, given_options, own_code
from cppo.values import present_value

REQUEST, LOG, MODEL = "request.json", "log.txt", "model"
REMEDY = "give --rerun to run such cells again, or another output_dir"


@dataclass(frozen=True, eq=False)
class Job:
    """A process to run.

    Attributes:
        kind: "start" (evaluate the start checkpoint), "cell" (train and evaluate) or "timing" (train alone on the
            machine).
        path: its folder below `root`.
        identity: every option that its result depends on, and the definitions that they name
            (`cppo.comparison.definitions`). The rest of the request holds its name and what it keeps.
        archived: its result if `root` is an archive.
    """

    kind: str
    name: str
    root: Path
    path: str
    identity: Mapping[str, Any]
    request: Mapping[str, Any]
    archived: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return self.root / self.path

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def result(self) -> dict[str, Any] | None:
        """Result of the finished process; None if it has not finished.

        Raises UserError for a file that cannot be read, or holds something else.
        """
        return self.archived or self.checked(read_result(self.folder / RESULT))

    def checked(self, content: Any) -> dict[str, Any] | None:
        """A result, or None, as it was read. Raises UserError for a result that this process does not write."""
        wrong = [] if content is None else flaws(content, self.kind, self.request)
        if wrong:
            raise UserError(
                f"{self.folder / RESULT} is not what cppo compare writes for this cell (wrong: {', '.join(wrong)}); "
                "remove it to run the cell again, or leave its archive out of cells_from"
            )
        return content

    def changed(self) -> list[str]:
        """The options in which the finished result differs from the present request.

        A missing option counts as its default, so new options do not change old results. If the method has another
        definition since, only the options that the study gives are compared.
        """
        result = self.result()
        if result is None:
            return []
        fields, given = schema("train").fields, self.request["recipe"]
        ignored = {*FIXED, DEFINITIONS}
        if any(part.startswith("method ") for part in self.redefined()):
            # Options of that time too; some may be gone.
            ignored |= {*fields, *result["options"]} - {*given["config"], *given["options"]}
        defaults = {name: field.default for name, field in fields.items()}
        before, now = ({**defaults, **one} for one in (result["identity"], json.loads(json.dumps(self.identity))))
        before |= {name: present_value(field, before[name]) for name, field in fields.items()}
        return sorted(name for name in {*before, *now} - ignored if before.get(name) != now.get(name))

    def redefined(self) -> dict[str, tuple[int, int]]:
        """The parts with another definition in the finished result than in the code: (its, the code's)."""
        result = self.result()
        if result is None:
            return {}
        before, now = definitions_of(result), self.identity[DEFINITIONS]
        return {part: (before.get(part, 1), number) for part, number in now.items() if before.get(part, 1) != number}

    def begin(self) -> None:
        """Prepare the folder for a new try."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULT, LOG, "metrics.jsonl", "progress.json"):
            (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / REQUEST, {**self.request, "kind": self.kind, "identity": self.identity})


def definitions_of(result: Mapping[str, Any]) -> dict[str, int]:
    """The definitions that a result was run with; a missing part has definition 1."""
    return {present_part(part): number for part, number in result["identity"].get(DEFINITIONS, {}).items()}


def study_jobs(study: Study) -> list[Job]:
    """Starts, then cells, in the order in which they run."""
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
        **_contents([*_data_files(recipe.options.eval_data), *function_files(study.evaluations[task])], fingerprint),
    }
    request = {"task": task, "recipe": _recipe_values(recipe), "steps": [0]}
    return Job("start", f"{task}, start", study.output_dir, f"start/{task}", identity, request)


def cell_job(study: Study, cell: Cell, fingerprint: Callable[[Path], str] = content_fingerprint) -> Job:
    """A cell of the grid."""
    identity = {
        **given_options(cell.recipe),
        "evaluation": study.evaluations[cell.task],
        DEFINITIONS: {**_definitions(cell.recipe), **evaluation_definitions(study.evaluations[cell.task])},
        "steps": study.evaluation_steps(cell.recipe),
        "start_weights": start_weights(cell.recipe.options.model),
        **_contents([*_cell_files(cell.recipe), *function_files(study.evaluations[cell.task])], fingerprint),
    }
    request = {
        "task": cell.task,
        "label": cell.label,
        "seed": cell.seed,
        "recipe": _recipe_values(cell.recipe),
        "steps": identity["steps"],
        "keep_model": study.options.keep_models,
    }
    name, path = f"{cell.task}, {cell.label}, seed {cell.seed}", f"cells/{cell.task}/{cell.label}/seed-{cell.seed}"
    return Job("cell", name, study.output_dir, path, identity, request)


def timing_jobs(study: Study) -> list[Job]:
    """Each method of each task in turn, in rounds, with its first seed; none if the study asks for none."""
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
                path = f"timing/{task}/{variant.label}/round-{repeat}"
                name = f"{task}, {variant.label}, timing {repeat}"
                jobs.append(Job("timing", name, study.output_dir, path, identity, request))
    return jobs


def pending(jobs: list[Job], *, rerun: bool) -> list[Job]:
    """The jobs without a result. With `rerun` also those with options or definitions that have changed since.

    Raises UserError if a finished job's have changed and `rerun` is not given.
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
    """Raise UserError if a finished job ran with other options than the present request's."""
    for job in jobs:
        if changed := job.changed():
            raise UserError(f"{job.folder} was run with other options ({', '.join(changed)}); {REMEDY}")


def tell_redefined(redefined: Mapping[str, tuple[int, int]]) -> str:
    """Words for the result of `Job.redefined`."""
    return ", ".join(f"{part}: {before}, now {now}" for part, (before, now) in redefined.items())


@dataclass(frozen=True)
class Source:
    """Cells of another study or of an earlier run: an output folder, or an archive with its `results` by path."""

    root: Path
    results: Mapping[str, Any] | None = None

    def like(self, job: Job) -> Job:
        """The job with its files in this source. Raises UserError for a result that cannot be read."""
        there = dataclasses.replace(job, root=self.root)
        found = self.results.get(job.path) if self.results else None
        return dataclasses.replace(there, archived=there.checked(found))


def sources_of(study: Study) -> list[Source]:
    """The sources in the study's `cells_from`. Raises UserError for a missing or unreadable one."""
    found = []
    for name in study.options.cells_from:
        root = Path(name)
        if not root.exists():
            raise UserError(
                f"cells_from: {root}: no such folder or archive; give another study's output_dir, or its archive"
            )
        found.append(Source(root) if root.is_dir() else Source(root, read_archive(root)))
    return found


def taken_over(jobs: Iterable[Job], sources: Sequence[Source], *, as_they_are: bool = False) -> list[Job]:
    """The jobs; a job without a result is replaced by the same job of the first source that has its result.

    Options must be equal. Definitions must be equal too, unless results are taken `as_they_are`, for a report. Raises
    UserError for a result that cannot be read.
    """
    found = []
    for job in jobs:
        for there in (source.like(job) for source in sources) if job.result() is None else ():
            if there.result() is not None and not there.changed() and (as_they_are or not there.redefined()):
                job = there
                break
        found.append(job)
    return found


def adopt(jobs: Sequence[Job], sources: Sequence[Source]) -> list[Job]:
    """Copy the results that `taken_over` finds into the jobs' folders; returns the jobs that got one."""
    pairs = [(job, there) for job, there in zip(jobs, taken_over(jobs, sources), strict=True) if there is not job]
    for job, there in pairs:
        job.begin()
        write_json(job.folder / RESULT, there.result())
    return [job for job, _ in pairs]


@cache
def start_weights(model: str) -> str:
    """Identifies a model folder's weights; the name of a hub model."""
    folder = Path(resolve_model(model))
    return model_fingerprint(folder, whole=True) if folder.is_dir() else model


def write_json(file: Path, content: Any) -> None:
    """Write a complete file or none."""
    replace_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _data_files(specs: str | list[str] | None) -> list[Path]:
    texts = [specs] if isinstance(specs, str) else specs or []
    return [spec.path for text in texts if isinstance(spec := parse_spec(text), PathSpec)]


def _cell_files(recipe: Recipe) -> list[Path]:
    """The local files that training and evaluation read, with the user's own code."""
    options = recipe.options
    assert isinstance(options, TrainOptions)
    ratings = [Path(options.data_ratings)] if options.data_ratings else []
    data = [*_data_files(options.data), *_data_files(options.eval_data), *ratings]
    return [*data, *own_code(recipe)]


def _contents(files: list[Path], fingerprint: Callable[[Path], str]) -> dict[str, Any]:
    """The contents of files that a result depends on, as an entry of its identity; none without files."""
    return {"contents_of_files": {str(file): fingerprint(file) for file in files}} if files else {}


def _definitions(recipe: Recipe) -> dict[str, int]:
    return training_definitions(recipe.resolved, recipe.method)


def _recipe_values(recipe: Recipe) -> dict[str, Any]:
    return {"name": recipe.name, "options": dataclasses.asdict(recipe.options), "config": dict(recipe.config)}
