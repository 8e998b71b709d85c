"""The one exception for a user's mistake, and how its message is printed."""

import difflib
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PATIENCE_SECONDS = 15.0
"""How long another process of a launcher lets the first one speak of a mistake that all of them see."""


class UserError(ValueError):
    """Something the user gave (option, file, row, image, checkpoint) cannot be used.

    The message is one clear line that names the file, row or field and says what to do. The command line prints it
    without a traceback and exits with status 2.
    """


class Stopped(KeyboardInterrupt):
    """A signal ends the command. The exit status is 128 plus its number, as a shell reports it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def tell(message: str) -> None:
    """Print a line for the user on stderr; of several processes of a launcher on one machine only the first does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"cppo: {message}", file=sys.stderr, flush=True)


def tell_mistake(error: UserError, *, is_cause: bool = True) -> None:
    """Print the error that ends this process, once for all processes of a launcher that see it.

    A launcher ends all processes as soon as one has failed, so the others wait until the first has spoken; what it does
    not see they say themselves. `is_cause` is False where another process's error is the reason.
    """
    line = f"cppo: error: {one_line(error)}"
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE_SECONDS)
    if is_cause:
        _give_launcher(line)
    print(line, file=sys.stderr, flush=True)


def _give_launcher(line: str) -> None:
    """Write the file in which torchrun and `accelerate launch` look for a process's error.

    They end with a traceback of their own, and then with this line as its cause
    (docs.pytorch.org/docs/stable/elastic/errors.html).
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):  # the line is printed anyway
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """The question whether the nearest of the names was meant; empty where none is near."""
    near = difflib.get_close_matches(str(word).lower(), names, n=1)
    return f"did you mean `{near[0]}`?" if near else ""


def choose_one(word: object, names: Iterable[object]) -> str:
    """What to give in the place of `word`: the nearest of the names, where one is near, and then all of them."""
    known = list(map(str, names))
    return f"{did_you_mean(word, known)} choose one of {', '.join(known)}".lstrip()


def one_line(error: BaseException) -> str:
    """An error's text on one line; the name of its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of an error's text; the name of its kind where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def one_line_with_remedy(error: Exception) -> str:
    """What a library refuses, on one line; with the options to give where it speaks of a GPU that is not there."""
    text = one_line(error)
    if "bf16/gpu" in text:
        return "this machine has no GPU, and bf16 is asked for: add --use_cpu true --bf16 false"
    return text
