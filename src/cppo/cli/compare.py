"""`cppo compare`: methods x seeds x tasks from one start, in processes that never run twice."""

import fcntl
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import NoReturn

from cppo.cli.fields import add_group, given_values
from cppo.cli.parser import Parser
from cppo.comparison.finished import write_archive
from cppo.comparison.jobs import (
    Job,
    Source,
    adopt,
    check_finished,
    pending,
    sources_of,
    study_jobs,
    taken_over,
    tell_redefined,
    timing_jobs,
)
from cppo.comparison.pool import last_lines, run_jobs
from cppo.comparison.study import Study, load_study, study_names, study_schema
from cppo.errors import UserError, tell
from cppo.options import TrainOptions
from cppo.progress import Progress
from cppo.runs.checks import check_inputs, check_options
from cppo.runs.notices import warn_of_shared_files
from cppo.runs.sources import held_out, load_sources


def run(argv: Sequence[str]) -> None:
    """Run the cells that have not run yet, then write the results. Raises UserError for a user's mistake."""
    arguments = _parser().parse_all(argv)
    options = study_schema()
    given = {name: words for name, words in vars(arguments).items() if name in options.fields}
    study = load_study(arguments.config, given_values(options, given))
    check_cells(study, read=False)
    if arguments.archive and not arguments.archive.parent.is_dir():
        raise UserError(f"--archive: there is no folder {arguments.archive.parent}")
    command = ["cppo", "compare", *(word for word in argv if word != "--report_only")]
    jobs, timing, sources = study_jobs(study), timing_jobs(study), sources_of(study)
    archives = [source for source in sources if source.results is not None]
    reported = taken_over(jobs, archives, as_they_are=True)
    complete = archives and not arguments.rerun and all(job.result() for job in reported)
    failed: list[str] = []
    if arguments.report_only or complete:
        jobs, timing = reported, taken_over(timing, archives, as_they_are=True)
        check_finished([*jobs, *timing])  # the report would name others
        tell_definitions([*jobs, *timing])
    else:
        failed = run_cells(study, jobs, timing, sources, rerun=arguments.rerun)
    if not any(job.result() for job in jobs if job.kind == "cell"):
        raise UserError(f"no cell in {study.output_dir} has finished: there is nothing to report")

    from cppo.comparison.comparisons import FILES, write_results  # imports torch
    from cppo.comparison.tables import cell_warnings, difference_lines

    results = write_results(study, jobs, timing, command)
    files = [f"{name:<10} {study.output_dir / file}" for name, file in FILES.items()]
    if arguments.archive and not results["unfinished"]:
        write_archive(arguments.archive, {job.path: found for job in [*jobs, *timing] if (found := job.result())})
        files.append(f"{'archive':<10} {arguments.archive}")
    for line in cell_warnings(results):
        tell(line)
    print("\n".join([*difference_lines(results), *files]))
    if failed:
        tell(f"{len(failed)} failed; the same command tries them again: {', '.join(failed)}")
        sys.exit(1)
    if arguments.archive and results["unfinished"]:
        raise UserError(f"{arguments.archive} is not written: {len(results['unfinished'])} cells are unfinished")


def run_cells(study: Study, jobs: list[Job], timing: list[Job], sources: Sequence[Source], *, rerun: bool) -> list[str]:
    """Take finished cells from `sources`, run the rest. Returns the names of failed cells."""
    check_cells(study, read=True)
    with only_one(study.output_dir), stopped_by_sigterm():
        if adopted := adopt(jobs, sources):
            tell(f"{len(adopted)} taken from {', '.join(study.options.cells_from)}")
        waiting = pending(jobs, rerun=rerun)
        waiting_for_timing = pending(timing, rerun=rerun)
        gpus = free_gpus(study) if waiting or waiting_for_timing else []
        failed = _run_all(study, waiting, free_workers(study, gpus), gpus)
        return failed or _run_all(study, waiting_for_timing, 1, gpus[:1])


def tell_definitions(jobs: Sequence[Job]) -> None:
    """Print which definitions of the finished jobs differ from the code's."""
    redefined = {part: numbers for job in jobs for part, numbers in job.redefined().items()}
    if redefined:
        tell(f"cells were run with other definitions than the code has now: {tell_redefined(redefined)}")


def free_gpus(study: Study) -> list[str]:
    """The GPUs for cells, as CUDA_VISIBLE_DEVICES names them; none if all train on the CPU."""
    if all(cell.recipe.config.get("use_cpu") for cell in study.cells):
        return []
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def free_workers(study: Study, gpus: Sequence[str]) -> int:
    """Number of cells at once: the study's, else one per GPU, else one per core."""
    return study.options.workers or len(gpus) or max(1, len(os.sched_getaffinity(0)) // study.options.threads)


def check_cells(study: Study, read: bool) -> None:
    """Check every method on every task, and every seed's data, before the first starts; with `read` the rows too.

    Raises UserError for anything that a cell could not use.
    """
    checked: set[tuple[str, ...]] = set()
    for cell in study.cells:
        what = (cell.task, cell.label, str(cell.recipe.options.data))
        if what in checked:
            continue
        options = cell.recipe.options
        assert isinstance(options, TrainOptions)
        try:
            check_inputs(cell.recipe)
            check_options(cell.recipe)
            data = (str(options.data), str(options.eval_data), str(options.rewards), str(options.columns))
            if read and data not in checked:
                load_sources(cell.recipe)
                held_out(options, study.options.eval_items)
        except UserError as error:
            raise UserError(f"study {study.name}: {cell.task}, {cell.label}: {error}") from error
        checked |= {what, data}
    for task in study.tasks if read else ():
        options = study.cell_recipe(task, study.variants[0], 0).options
        assert isinstance(options, TrainOptions)
        warn_of_shared_files(options)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Lock the folder against a second `cppo compare`. Raises UserError if there is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another `cppo compare` is running in {folder}") from error
        yield


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the command and its processes, as Ctrl-C does."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_all(study: Study, waiting: list[Job], workers: int, gpus: Sequence[str]) -> list[str]:
    """Run the waiting cells and print each result. Returns the names of failed cells."""
    failed: list[str] = []
    seconds: dict[str, list[float]] = {}
    unfinished = list(waiting)

    def finished(job: Job, status: int, took: float) -> None:
        unfinished.remove(job)
        if status:
            failed.append(job.name)
            if lines := last_lines(job.log):
                tell(f"{job.name} failed with status {status}; {job.log} ends with")
                print("\n".join(f"  {line}" for line in lines), file=sys.stderr)
        else:
            seconds.setdefault(job.kind, []).append(took)
        known = [fmean(seconds[one.kind]) for one in unfinished if one.kind in seconds]
        left = f"  {_duration(sum(known) / workers)} left" if len(known) == len(unfinished) else ""
        tell(f"{len(waiting) - len(unfinished)}/{len(waiting)}  {job.name}{'  failed' if status else ''}{left}")

    if waiting:
        starts = sum(job.kind == "start" for job in waiting)
        measured = f" and {starts} start model{'' if starts == 1 else 's'}" if starts else ""
        tell(f"{len(waiting) - starts} cells{measured} to run, {workers} at a time, in {study.output_dir}")
        with Progress(total=len(waiting), desc="compare", unit="cells") as bar:

            def progress(share: float) -> None:
                bar.update(len(waiting) - len(unfinished) + share - bar.n)

            threads = study.options.threads
            run_jobs(waiting, workers=workers, threads=threads, finished=finished, gpus=gpus, progress=progress)
    return failed


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "under 1 min"


def _parser() -> Parser:
    parser = Parser(
        prog="cppo compare",
        description="Trains methods x seeds x tasks from one start checkpoint, each in its own process, evaluates them "
        "during training, and compares them with 95 % intervals. Finished cells are never run again.",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME|FILE",
        help=f"a packaged study ({', '.join(study_names())}) or a YAML file; the file may set every option of the "
        "study",
    )
    parser.add_argument(
        "--rerun", action="store_true", help="run finished cells again if their options or definitions have changed"
    )
    parser.add_argument("--report_only", action="store_true", help="run nothing, write the results again")
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FILE.jsonl.xz",
        help="also write the finished study's cells into one file, which `--cells_from` reads",
    )
    add_group(parser, "study", study_schema().run.values())
    return parser
