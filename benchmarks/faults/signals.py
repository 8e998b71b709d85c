"""Signals of batch systems in one and two processes: `python benchmarks/faults/signals.py`.

Sends SIGTERM, SIGHUP and SIGUSR1 to a run in its second step: to its one process, to both of two ranks, to one rank
alone. In one more run, torchrun itself gets SIGTERM. Each run then continues with `--resume_from_checkpoint auto`.
Prints the figures of docs/results/reliability.md: exit statuses, the newest checkpoint, whether it is complete, and
whether the resumed run left the same files as the uninterrupted run.

Measured with Python 3.11, torch 2.14.1, transformers 5.24 and trl 1.16, in about five minutes on two shared cores.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from small_run import SECONDS, Started, left_behind, train_command, versions, workplace

from cppo.checkpoints import checkpoint_folders, damage


def when_in_step(run: Path, step: int, alive: subprocess.Popen[bytes] | Started) -> None:
    """Wait until a run has logged a step; it is then in the next step."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        metrics = run / "metrics.jsonl"
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    raise SystemExit(f"{alive} did not get to step {step}")


def row(kind: str, statuses: list[int], run: Path, equal: bool) -> str:
    newest = checkpoint_folders(run)[-1]
    whole = "whole" if damage(newest) is None else "damaged"
    return f"| {kind} | {', '.join(map(str, statuses))} | {newest.name}, {whole} | {'equal' if equal else 'other'} |"


def signalled(folder: Path, number: signal.Signals, ranks: int, to: list[int], expected: dict[str, object]) -> str:
    run = folder / f"{number.name}-{ranks}-{len(to)}"
    argv = [*train_command(folder, run), "--resume_from_checkpoint", "auto"]
    started = Started(argv, folder / "log.txt", ranks)
    when_in_step(run, 1, started)
    for rank in to:
        os.kill(started.processes[rank].pid or 0, number)
    statuses = started.wait()
    line = row(f"{number.name} to {len(to)} of {ranks}", statuses, run, equal=False)
    again = Started(argv, folder / "log.txt", ranks)
    assert again.wait() == [0] * ranks, again.log.read_text()
    return line.replace("other", "equal") if left_behind(run) == expected else line


def by_torchrun(folder: Path, expected: dict[str, object]) -> str:
    run = folder / "torchrun"
    argv = [*train_command(folder, run), "--resume_from_checkpoint", "auto"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "cppo"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    with (
        (folder / "log.txt").open("wb") as log,
        subprocess.Popen([*launcher, *argv], env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            when_in_step(run, 1, process)
            process.send_signal(signal.SIGTERM)
            status = process.wait(SECONDS)
        finally:
            process.kill()
    line = row("SIGTERM to torchrun, 2 ranks", [status], run, equal=False)
    again = Started(argv, folder / "log.txt", 2)
    assert again.wait() == [0, 0], again.log.read_text()
    return line.replace("other", "equal") if left_behind(run) == expected else line


def main() -> None:
    print(versions(), flush=True)
    with workplace() as folder:
        for ranks, choices in ((1, [[0]]), (2, [[0, 1], [1]])):
            whole = folder / f"whole-{ranks}"
            started = Started(train_command(folder, whole), folder / "log.txt", ranks)
            assert started.wait() == [0] * ranks, started.log.read_text()
            expected = left_behind(whole)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                for to in choices:
                    print(signalled(folder, number, ranks, to, expected), flush=True)
        print(by_torchrun(folder, expected), flush=True)


if __name__ == "__main__":
    main()
