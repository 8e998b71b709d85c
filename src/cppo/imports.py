"""The user's own functions, named `module:function` or `file.py:function`, and their errors."""

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from cppo.errors import UserError

_IMPORT_PATH = re.compile(r"(?P<module>[^:?]+):(?P<name>[A-Za-z_]\w*)")


def is_own(name: str) -> bool:
    """Whether a name is an import path, not the name of a packaged function."""
    return ":" in name


def own_files(names: Iterable[str]) -> list[Path]:
    """The user's files that hold the functions of these names."""
    return [file for name in names if is_own(name) and (file := own_file(name))]


def own_file(path: str) -> Path | None:
    """The user's file of `file.py:function`; None for a module."""
    name = path.rpartition(":")[0]
    return Path(name) if name.endswith(".py") else None


def check_import_path(path: str, what: str) -> bool:
    """Whether `path` names a function in this form; nothing is imported. `what` begins an error's message.

    Raises:
        UserError: the file or the module does not exist.
    """
    match = _IMPORT_PATH.fullmatch(path)
    if match is None:
        return False
    if match["module"].endswith(".py"):
        if not Path(match["module"]).is_file():
            here = (
                ""
                if Path(match["module"]).is_absolute()
                else "; run from the folder where it lies, such as the training folder"
            )
            raise UserError(f"{what}: there is no file {match['module']}{here}")
    elif not _module_exists(match["module"]):
        raise UserError(f"{what}: there is no module {match['module']}; install it, or give file.py:function")
    return True


def check_own(path: str, what: str) -> None:
    """Raise UserError where `path` has another form, or its file or module does not exist; nothing is imported."""
    if not check_import_path(path, what):
        raise UserError(f"{what}: write module:function or file.py:function")


def load_function(path: str, what: str) -> Callable[..., Any]:
    """The function that `path` names; `what` begins an error's message. A file runs once, and after each change of it.

    Raises:
        UserError: it does not exist, cannot be imported, or is not a function.
    """
    check_own(path, what)
    function = import_object(path, what)
    if not callable(function) or isinstance(function, type):
        raise UserError(f"{what} is of type {type(function).__name__}, not a function")
    return function


def import_object(path: str, what: str) -> Any:
    """The object that `path` names. A file runs at the first call in a process and after each change of it.

    Raises:
        UserError: it cannot be imported, or the name does not exist.
    """
    module_name, _, name = path.rpartition(":")
    file = own_file(path)
    try:
        module = _load_file(file.resolve(), file.stat().st_mtime_ns) if file else importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # user code may raise anything, also `sys.exit`
        raise UserError(f"{what} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise UserError(f"{what}: {module_name} has no {name}")
    return getattr(module, name)


def failure(error: BaseException, what: str) -> UserError:
    """An error of the user's code in one line, with the line that raised it if it is the user's."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = not Path(frame.filename).is_relative_to(Path(__file__).parent)
    where = f" in {Path(frame.filename).name} line {frame.lineno}" if own else ""
    return UserError(f"{what} failed{where}: {type(error).__name__}: {error}")


def _module_exists(name: str) -> bool:
    """Whether the module exists; only the outermost package is looked up, because finding more would import it."""
    outermost = name.partition(".")[0]
    return outermost.isidentifier() and importlib.util.find_spec(outermost) is not None


@cache
def _load_file(path: Path, changed: int) -> Any:
    """The file as it was `changed` (in ns), as a module: one for all functions that options name in it."""
    # A unique module name lets its dataclasses and pickles work, and hides no other module or file.
    name = f"cppo_own_file_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
