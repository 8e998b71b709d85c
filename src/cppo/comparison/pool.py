"""Run a study's jobs as separate processes, a few at a time. No torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cppo.comparison.jobs import Job
from cppo.errors import tell
from cppo.parsing import parse_json
from cppo.recipes import RunDirectory

COMMAND = (sys.executable, "-m", "cppo.comparison.cell")
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 10.0
"""Time for a stopped process to end by itself."""


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int,
    threads: int,
    finished: Callable[[Job, int, float], None],
    gpus: Sequence[str] = (),
    progress: Callable[[float], object] = lambda share: None,
) -> None:
    """Run all jobs, `workers` at a time, and call `finished` for each: its exit status (0: it has a result), seconds.

    `progress` is called repeatedly with the sum of the running jobs' shares of done steps. With `gpus`, names as
    CUDA_VISIBLE_DEVICES takes them, each worker sees one, in turn. A job that cannot be started counts as failed and
    does not stop the others. When this call ends, by Ctrl-C too, it ends the processes.
    """
    waiting = list(reversed(jobs))
    free = list(reversed(range(workers)))
    running: dict[Job, tuple[subprocess.Popen, float, int]] = {}
    try:
        while waiting or running:
            while waiting and free:
                job, worker = waiting.pop(), free.pop()
                try:
                    process = start(job, threads, gpus[worker % len(gpus)] if gpus else None)
                except OSError as error:
                    tell(f"{job.name} cannot be started: {error.filename or job.folder}: {error.strerror}")
                    free.append(worker)
                    finished(job, 1, 0.0)
                    continue
                running[job] = (process, time.monotonic(), worker)
            for job, (process, began, worker) in list(running.items()):
                status = process.poll()
                if status is not None:
                    del running[job]
                    free.append(worker)
                    _close(process)
                    finished(job, 0 if job.result() is not None else status or 1, time.monotonic() - began)
            progress(sum(share_done(job) for job in running))
            time.sleep(POLL_SECONDS)
    finally:
        stop([process for process, *_ in running.values()])


def start(job: Job, threads: int, gpu: str | None = None) -> subprocess.Popen:
    """Start a job's process; it ends when its standard input closes, so it never outlives this process.

    Raises OSError if the job's folder cannot be written, or no process started.
    """
    job.begin()
    count = str(threads)
    environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with job.log.open("wb") as log:
        return subprocess.Popen(
            [*COMMAND, str(job.folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends its own
        )


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """End processes and their children."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()
        _close(process)


def share_done(job: Job) -> float:
    """The share of its training steps that a running job has done, by its last note; 0 before."""
    try:
        content = parse_json(RunDirectory(job.folder).progress.read_text(encoding="utf-8"))
        return float(content["step"] / content["last_step"])
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
        return 0.0


def last_lines(log: Path, count: int = 5) -> list[str]:
    """The end of a log, for a message; empty without a log."""
    if not log.is_file():
        return []
    return log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-count:]


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


def _close(process: subprocess.Popen) -> None:
    if process.stdin is not None:
        process.stdin.close()
