"""Where the time of an optimizer step goes, and what memory it took."""

import functools
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PHASES = ("rollout", "reward", "views", "scoring", "update")
"""Generation with all that prepares it; rewards; waiting for views and processing them; forward passes over responses;
the rest: loss, backward pass, optimizer."""
MIB = 2**20


class PhaseClock:
    """Splits an optimizer step's seconds over `PHASES`; what runs inside a phase of its own counts there alone.

    A step's clock runs from `begin_step` to `end_step`; phases outside of a step, as in an evaluation, are not counted.
    On a GPU a phase ends when the device has done its work.
    """

    def __init__(self, device: torch.device | None = None, now: Callable[[], float] = time.perf_counter) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._now = now
        self._running: list[str] = []
        self._since = 0.0
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def begin_step(self) -> None:
        """Start the clock with phase "update", unless it runs: a step begins with its first micro-batch."""
        if not self._running:
            self._seconds = dict.fromkeys(PHASES, 0.0)
            self._since = self._time()
            self._running = ["update"]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as this phase."""
        if not self._running:
            yield
            return
        self._credit()
        self._running.append(name)
        try:
            yield
        finally:
            self._credit()
            self._running.pop()

    def end_step(self) -> dict[str, float]:
        """Stop the clock. Returns the seconds of each phase."""
        if self._running:
            self._credit()
            self._running = []
        return dict(self._seconds)

    def _credit(self) -> None:
        now = self._time()
        self._seconds[self._running[-1]] += now - self._since
        self._since = now

    def _time(self) -> float:
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        return self._now()


def timed(phase: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a trainer's method: its calls count as this phase of the trainer's `_phases`."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self._phases.phase(phase):
                return method(self, *args, **kwargs)

        return counted

    return decorate


class StepCosts(TrainerCallback):
    """Ends the clock's step when the optimizer's ends, and appends its seconds and the memory to `metrics`."""

    def __init__(self, clock: PhaseClock, device: torch.device, metrics: MutableMapping[str, list[float]]) -> None:
        self._clock, self._device, self._metrics = clock, device, metrics

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        costs = {f"time/{phase}": seconds for phase, seconds in self._clock.end_step().items()}
        for name, value in (costs | peak_memory_mib(self._device)).items():
            self._metrics.setdefault(name, []).append(value)


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """The peaks of this process since it began, in MiB: resident memory, and PyTorch's allocations on a GPU."""
    found = {"memory/peak_rss_mib": _peak_rss_bytes() / MIB}
    if device.type == "cuda":
        found["memory/peak_cuda_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return found


def _peak_rss_bytes() -> int:
    # On Linux `ru_maxrss` begins with the memory of the process that started this one.
    status = Path("/proc/self/status")
    own = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    if own is not None:
        return int(own[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
