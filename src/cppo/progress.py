"""Progress of a long piece of work: a bar on a terminal, elsewhere a line every few seconds."""

import io
import os
import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 5.0
"""Between two lines; work that takes less prints none."""


class Progress(tqdm):
    """`tqdm`, but whole lines where stderr is no terminal; of a launcher's processes the first alone shows it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("name", None)  # huggingface_hub names its bars
        options |= {"leave": False, "disable": os.environ.get("LOCAL_RANK", "0") != "0", "dynamic_ncols": True}
        self._lines = not sys.stderr.isatty()
        if self._lines:
            options |= {"file": io.StringIO(), "mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "miniters": 1}
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Draw the bar, or print a line."""
        if not self._lines:
            return super().display(msg, pos)
        if msg is None:
            print(progress_line(self.format_dict), file=sys.stderr, flush=True)
        return True


def progress_line(state: dict[str, Any]) -> str:
    """What `tqdm.format_dict` says as a line: how far, and how long the rest takes at the present rate."""
    done, total = state["n"], state["total"]
    name = state["prefix"].removesuffix(": ")
    if not total:
        return f"{name}: {_amount(done, state)}, {tqdm.format_interval(state['elapsed'])} so far"
    gained = done - state["initial"]
    left = tqdm.format_interval(state["elapsed"] * (total - done) / gained) if gained > 0 else "?"
    return f"{name}: {100 * done / total:.0f} %, {_amount(done, state)} of {_amount(total, state)}, {left} left"


def _amount(value: float, state: dict[str, Any]) -> str:
    text = tqdm.format_sizeof(value) if state["unit_scale"] else f"{value:,}"
    return f"{text}{'' if state['unit'] == 'B' else ' '}{state['unit']}"
