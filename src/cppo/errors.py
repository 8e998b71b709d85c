"""The exception for a user's mistake, and how its message is printed."""

import difflib
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PATIENCE_SECONDS = 15.0
"""Time for a launcher's first process to report a mistake that all processes see."""


class UserError(ValueError):
    """An input of the user (option, file, row, image, checkpoint) cannot be used.

    The message is one clear line that names the file, row or field and says what to do. The command line prints it
    without a traceback and exits with status 2.
    """


class Stopped(KeyboardInterrupt):
    """A signal ends the command. The exit status is 128 plus the signal's number, as in a shell.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def tell(message: str) -> None:
    """Print a line for the user on stderr; only the first of a launcher's processes on one machine prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"cppo: {message}", file=sys.stderr, flush=True)


def tell_mistake(error: UserError, *, is_cause: bool = True) -> None:
    """Print the error that ends this process, once for all processes of a launcher that see it.

    A launcher ends all processes when one fails. So the others wait until the first has printed, then print a mistake
    that it did not see. `is_cause` is False where the reason is another process's error.
    """
    line = f"cppo: error: {one_line(error)}"
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE_SECONDS)
    if is_cause:
        _give_launcher(line)
    print(line, file=sys.stderr, flush=True)


def _give_launcher(line: str) -> None:
    """Write the file in which torchrun and `accelerate launch` look for a process's error.

    They print their own traceback, then this line as its cause (docs.pytorch.org/docs/stable/elastic/errors.html).
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):  # the line is printed anyway
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """The question "did you mean" with the nearest of the names; empty where none is near."""
    near = difflib.get_close_matches(str(word).lower(), names, n=1)
    return f"did you mean `{near[0]}`?" if near else ""


def choose_one(word: object, names: Iterable[object]) -> str:
    """What to write instead of `word`: the nearest of the names, if one is near, then all of them."""
    known = list(map(str, names))
    return f"{did_you_mean(word, known)} choose one of {', '.join(known)}".lstrip()


def one_line(error: BaseException) -> str:
    """An error's text on one line, or the name of its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of an error's text, or the name of its type where it has no text."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def one_line_with_remedy(error: Exception) -> str:
    """A library's refusal on one line, with the options to give where it names a missing GPU."""
    text = one_line(error)
    if "bf16/gpu" in text:
        return "this machine has no GPU, and bf16 is asked for: add --use_cpu true --bf16 false"
    return text
