"""Symbolic comparison of two answers by math-verify, in separate processes that can be killed.

math-verify's own time limit cannot be trusted: it raises ValueError in a thread, and `5^5^5^5^5` continues in C code
that no signal handler interrupts. So fresh interpreters run `checker_process.py`. Each gets one JSON line a question,
limits its own processor time, and is killed when its reply is very late.
"""

import atexit
import contextlib
import json
import math
import os
import queue
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from cppo.errors import UserError

START_TIMEOUT_SECONDS = 120.0
WALL_SECONDS_PER_PROCESSOR_SECOND = 10.0
"""Waiting time for a reply per second of allowed processor time: the machine may be busy."""
PATIENCE_SECONDS = 0.1
"""Waiting time of a question for a running checker, before it starts another."""
CHECKER = Path(__file__).with_name("checker_process.py")


class Unfinished(Exception):
    """A stopped comparison: it took too long or too much memory, or the time for its batch was over."""


class EquivalenceWorker:
    """A lazily started, reusable child process that decides whether two answers are mathematically equal.

    For one thread at a time. The child is killed and reaped after a time-out, a crash, or `questions_per_process`
    questions (so that caches stay below the memory limit); the next call starts a new one.
    """

    def __init__(self, questions_per_process: int = 2000) -> None:
        self._questions_per_process = questions_per_process
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0

    @property
    def pid(self) -> int | None:
        """Process id of the child, None without a child."""
        process = self._process
        return None if process is None else process.pid

    def equivalent(
        self, given: str, expected: str, timeout: float, deadline: float = float("inf"), tolerance: float = 0.0
    ) -> bool:
        """Whether math-verify finds the two LaTeX answers equal.

        Args:
            timeout: seconds of processor time; ten times as many by the clock. The child's start (about a second) does
                not count.
            deadline: reading of `time.monotonic()` that ends all waiting.
            tolerance: allowed error of a number, as a fraction of the expected number.

        Raises:
            Unfinished: the comparison was stopped.
            UserError: the child cannot be started at all.
        """
        process = self._running_process()
        wall = min(timeout * WALL_SECONDS_PER_PROCESSOR_SECOND, deadline - time.monotonic())
        if wall <= 0:
            raise Unfinished
        self._asked += 1
        question = {"given": given, "expected": expected, "seconds": timeout, "tolerance": tolerance}
        reply = _exchange(process, json.dumps(question).encode() + b"\n", wall)
        if reply is None or self._asked >= self._questions_per_process:
            self.close()
        if reply is None:
            raise Unfinished
        return reply == b"1\n"

    def _running_process(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            # -P keeps this folder off the child's import path; the child needs one thread only.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(CHECKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            self._asked = 0
            if _exchange(self._process, b"", START_TIMEOUT_SECONDS) != b"ready\n":
                self.close()
                raise UserError(
                    "rewards: the answer checker does not start; install math-verify for "
                    f"{sys.executable} (pip install math-verify)"
                )
        return self._process

    def close(self) -> None:
        """Kill and reap the child, if there is one. The next question starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class WorkerPool:
    """Up to `size` workers for any number of threads; another one starts when a question finds all of them busy."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._workers: list[EquivalenceWorker] = []
        self._idle: queue.LifoQueue[EquivalenceWorker] = queue.LifoQueue()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running children."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def equivalent(
        self, given: str, expected: str, timeout: float, deadline: float = float("inf"), tolerance: float = 0.0
    ) -> bool:
        """As `EquivalenceWorker.equivalent`; waiting for a worker does not count towards `timeout`."""
        worker = self._take(deadline)
        try:
            return worker.equivalent(given, expected, timeout, deadline, tolerance)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Kill and reap every child; no question may be open."""
        for worker in self._workers:
            worker.close()

    def _take(self, deadline: float) -> EquivalenceWorker:
        with contextlib.suppress(queue.Empty):
            return self._idle.get(timeout=PATIENCE_SECONDS if self._workers else 0.0)
        with self._lock:
            if len(self._workers) < self.size:
                self._workers.append(EquivalenceWorker())
                return self._workers[-1]
        try:
            return self._idle.get(timeout=min(max(deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX))
        except queue.Empty:
            raise Unfinished from None


def _exchange(process: "subprocess.Popen[bytes]", question: bytes, timeout: float) -> bytes | None:
    """Send a line and return the reply; None if the child died or is late."""
    assert process.stdin is not None
    assert process.stdout is not None
    ready = select.poll()
    ready.register(process.stdout, select.POLLIN)
    try:
        process.stdin.write(question)
        process.stdin.flush()
        reply = process.stdout.readline() if ready.poll(math.ceil(1000 * timeout)) else b""
    except OSError:
        reply = b""
    return reply if reply.endswith(b"\n") else None


def _cores() -> int:
    """Cores for this process; ranks of one machine share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(ranks) if ranks.isdecimal() else 1))


_shared_pool = WorkerPool(_cores())


def shared_pool() -> WorkerPool:
    """The workers of this process, closed at exit. A forked child has its own."""
    return _shared_pool


def _leave_the_parents_pool() -> None:
    """In a forked child: the parent's checkers must not be asked, killed or waited for."""
    global _shared_pool
    _shared_pool = WorkerPool(_cores())


atexit.register(lambda: shared_pool().close())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_the_parents_pool)
