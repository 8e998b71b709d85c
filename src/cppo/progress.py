"""Signs of life during long work: a bar on a terminal; elsewhere, or without a count, a line from time to time."""

import io
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tqdm import tqdm

SILENT_SECONDS = 6.0
"""Silence before a line is printed; shorter work prints none."""
BEAT_SECONDS = 0.5
NOWHERE = 1000
"""The position among tqdm's bars of work that is none."""


class Heartbeat:
    """Names the current work after `SILENT_SECONDS` of silence, in a thread that lives as long as the work.

    Work is nested; the innermost is named. While any of it is quiet, nothing is printed.

    Args:
        now: seconds of a clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._works: list[Progress] = []
        self._said = now()
        self._idle = threading.Event()

    def begin(self, work: "Progress") -> None:
        """Work begins."""
        self._works.append(work)
        if len(self._works) == 1:
            self.said()
            self._idle = threading.Event()
            threading.Thread(target=self._run, args=(self._idle,), daemon=True).start()

    def end(self, work: "Progress") -> None:
        """Work has ended; a second call does nothing."""
        self._works = [one for one in self._works if one is not work]  # tqdm calls bars of one position equal
        if not self._works:
            self._idle.set()

    def said(self) -> None:
        """Something was printed just now."""
        self._said = self._now()

    def beat(self) -> None:
        """Redraw the innermost bar; without a bar, print a line if it is time."""
        works = list(self._works)
        if not works or any(work.quiet for work in works):
            return
        bars = [work for work in works if work.is_bar]
        if bars:
            bars[-1].refresh()
        elif self._now() - self._said >= SILENT_SECONDS:
            self.said()
            tqdm.write(progress_line(works[-1].format_dict), file=sys.stderr)

    def _run(self, idle: threading.Event) -> None:
        with suppress(OSError, ValueError):  # nobody reads stderr any more
            while not idle.wait(BEAT_SECONDS):
                self.beat()


HEARTBEAT = Heartbeat()
"""The process has one stderr, so one heartbeat."""


class Progress(tqdm):
    """Work that may take long: `tqdm` on a terminal where `total` is given by name, else lines of a heartbeat.

    Only a launcher's first process shows it. The environment variable `TQDM_DISABLE` hides all of it.

    Args:
        quiet: show nothing of this work, nor of work around or inside it.
        heartbeat: names the current work.
    """

    def __init__(self, *args: Any, quiet: bool = False, heartbeat: Heartbeat = HEARTBEAT, **options: Any) -> None:
        self._heartbeat = heartbeat
        self.quiet = quiet
        options.pop("name", None)  # huggingface_hub names its bars
        shown = os.environ.get("LOCAL_RANK", "0") == "0" and not os.environ.get("TQDM_DISABLE")
        self.is_bar = shown and not quiet and options.get("total") is not None and sys.stderr.isatty()
        options |= {"leave": False, "disable": not shown, "dynamic_ncols": True}
        if not self.is_bar:  # it takes no line of the terminal, and tqdm clears none for it
            options |= {"file": io.StringIO(), "position": NOWHERE}
        super().__init__(*args, **options)
        if shown:
            heartbeat.begin(self)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Draw the bar, if it is one."""
        return super().display(msg, pos) if self.is_bar else True

    def close(self) -> None:
        """The work has ended."""
        self._heartbeat.end(self)
        super().close()


def say(line: str) -> None:
    """Print a line on stderr, above a bar if there is one."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()
    HEARTBEAT.said()


def progress_line(state: dict[str, Any]) -> str:
    """The line of `tqdm.format_dict`: progress, and time left at the present rate."""
    done, total = state["n"], state["total"]
    name = state["prefix"].removesuffix(": ")
    counted = [_amount(done, state)] if done else []
    if total:
        of_them = _amount(done, state).removesuffix(f" {state['unit']}")
        counted = [f"{100 * done / total:.0f} %", f"{of_them} of {_amount(total, state)}"]
    return f"{name}: {', '.join([*counted, time_left(state) or so_far(state)])}"


def time_left(state: dict[str, Any]) -> str:
    """Time left at the present rate, such as "01:20 left"; empty where unknown."""
    gained = state["n"] - (state["initial"] or 0)
    if not state["total"] or gained <= 0 or not state["elapsed"]:  # a bar that is disabled knows no time
        return ""
    return f"{tqdm.format_interval(state['elapsed'] * (state['total'] - state['n']) / gained)} left"


def so_far(state: dict[str, Any]) -> str:
    """Duration of the work so far, such as "00:12 so far"."""
    return f"{tqdm.format_interval(state['elapsed'])} so far"


def _amount(value: float, state: dict[str, Any]) -> str:
    text = tqdm.format_sizeof(value) if state["unit_scale"] else f"{value:,.1f}".removesuffix(".0")
    return f"{text}{'' if state['unit'] == 'B' else ' '}{state['unit']}"
