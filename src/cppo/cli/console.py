"""Terminal output that the commands share."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cppo.errors import tell
from cppo.progress import Progress
from cppo.recipes import AUTO, Recipe, RunDirectory


def quiet_libraries() -> None:
    """Silence the libraries' notices and loading bars, which would hide our own lines. Imports transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at every fork of a data worker
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def unless_quiet(recipe: Recipe, work: str) -> Progress:
    """The progress of a run, which shows nothing with `quiet` or `disable_tqdm`."""
    return Progress(desc=work, quiet=bool(recipe.options.quiet or recipe.config.get("disable_tqdm")))


@contextmanager
def hint_where_to_go_on(output_dir: str) -> Iterator[None]:
    """If Ctrl-C or a signal stops a run inside the context, print the checkpoint from which it can resume."""
    try:
        yield
    except KeyboardInterrupt:
        checkpoints = RunDirectory(output_dir).checkpoints()
        if checkpoints:
            hint = f"the same command with --resume_from_checkpoint {AUTO} resumes from there"
            tell(f"{checkpoints[-1]} is complete; {hint}")
        else:
            tell(f"there is no checkpoint in {output_dir} yet, so there is nothing to resume from; see --save_steps")
        raise


def option_text(value: Any) -> str:
    """The value of an option in the form of the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def percent(fraction: float, interval: tuple[float, float] | None = None) -> str:
    """A fraction of 1 as text, e.g. "52.1 %  [49.0, 55.2]"."""
    text = f"{100 * fraction:5.1f} %"
    return text if interval is None else f"{text}  [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
