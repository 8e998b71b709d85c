"""Symbolic comparison of two answers by math-verify, in a separate process that can be killed.

math-verify's own time limit cannot be trusted: it raises ValueError in a thread, and `5^5^5^5^5` runs on in C
code that no signal handler interrupts. So a fresh interpreter runs `checker_process.py`, gets one JSON line a
question, and is killed when its reply is late.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from cppo.errors import UserError

START_TIMEOUT_SECONDS = 120.0
CHECKER = Path(__file__).with_name("checker_process.py")


class EquivalenceWorker:
    """A lazily started, reusable child process that says whether two answers are mathematically equal.

    Safe to call from any thread; calls take turns. After a time-out or a crash, and after
    `questions_per_process` questions (so that caches cannot grow into the memory limit), the child is killed
    and reaped, and the next call starts a new one.
    """

    def __init__(self, questions_per_process: int = 2000) -> None:
        self._questions_per_process = questions_per_process
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        process = self._process
        return None if process is None else process.pid

    def equivalent(self, given: str, expected: str, timeout: float) -> bool:
        """Whether math-verify finds the two LaTeX answers equal.

        False when it takes longer than `timeout` seconds, runs out of memory or fails. Starting the child
        (about a second) does not count. Raises UserError if the child cannot be started at all.
        """
        with self._lock:
            process = self._running_process()
            self._asked += 1
            question = json.dumps({"given": given, "expected": expected, "seconds": timeout})
            reply = _exchange(process, question.encode() + b"\n", timeout)
            if reply is None or self._asked >= self._questions_per_process:
                self._discard()
            return reply == b"1\n"

    def close(self) -> None:
        """Kill and reap the child, if there is one. The next question starts a new one."""
        with self._lock:
            self._discard()

    def _running_process(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is not None:
            self._discard()
        if self._process is None:
            # -P keeps this folder off the child's import path; one thread is all that the child needs.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(CHECKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            self._asked = 0
            if _exchange(self._process, b"", START_TIMEOUT_SECONDS) != b"ready\n":
                self._discard()
                raise UserError(
                    "rewards: the answer checker does not start; install math-verify for "
                    f"{sys.executable} (pip install math-verify)"
                )
        return self._process

    def _discard(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _exchange(process: "subprocess.Popen[bytes]", question: bytes, timeout: float) -> bytes | None:
    """Send a line and return the reply; None if the child died, or was killed because it was late."""
    assert process.stdin is not None
    assert process.stdout is not None
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    # Killing the child ends the blocking read, on every platform and in any thread.
    timer = threading.Timer(timeout, kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(question)
        process.stdin.flush()
        reply = process.stdout.readline()
    except OSError:
        reply = b""
    finally:
        timer.cancel()
        timer.join()
    return reply if reply.endswith(b"\n") and not late.is_set() else None


_shared_worker = EquivalenceWorker()


def shared_worker() -> EquivalenceWorker:
    """The one worker of this process, closed at exit. A forked child has its own."""
    return _shared_worker


def _leave_the_parents_worker() -> None:
    """In a forked child: the parent's checker is not ours to ask, to kill or to wait for."""
    global _shared_worker
    _shared_worker = EquivalenceWorker()


atexit.register(lambda: shared_worker().close())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_the_parents_worker)
