"""A part of the acceptance: its inputs and its findings."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch


@dataclass
class Part:
    """Figures and checks of one part; each is printed at once, and kept if the part ends early.

    Attributes:
        device: of all measurements.
        tiny: whether sizes have no meaning for speed, so that a CPU runs them in seconds.
        figures: by name, for the JSON file.
        checks: figures that must be within a bound. Times are never among them.
    """

    device: torch.device
    tiny: bool
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def found(self, name: str, **figures: Any) -> None:
        """Keep and print figures."""
        self.figures[name] = figures
        print(f"  {name}: " + ", ".join(f"{key} {_shown(value)}" for key, value in figures.items()), flush=True)

    def check(self, name: str, value: float, bound: float) -> None:
        """Keep and print a figure that must be at most `bound`; NaN fails."""
        holds = value <= bound
        self.checks.append({"name": name, "value": value, "bound": bound, "holds": holds})
        print(f"  {'holds' if holds else 'FAILS'}: {name} {value:.3g}, at most {bound:.3g}", flush=True)

    def require(self, name: str, reason: str | None) -> None:
        """Keep and print a condition; it fails if there is a reason."""
        self.checks.append({"name": name, "holds": reason is None, "reason": reason})
        print(f"  holds: {name}" if reason is None else f"  FAILS: {name}: {reason}", flush=True)

    def seconds(self, function: Callable[[], Any]) -> float:
        """Wall seconds of a call and of the work that it leaves to the device."""
        self._wait()
        started = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - started

    def median_seconds(self, function: Callable[[], Any], runs: int) -> float:
        """The median of several calls."""
        return median(self.seconds(function) for _ in range(runs))

    def peak_bytes(self, function: Callable[[], Any]) -> int | None:
        """Peak allocation of a call on the device above the memory in use before it; None on a CPU."""
        if self.device.type != "cuda":
            function()
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference, as a multiple of the expected vector's length."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
