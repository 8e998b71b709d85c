"""One run a folder: a lock that the operating system releases when its process ends, however it ends."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from cppo.errors import UserError, tell
from cppo.options import TrainOptions
from cppo.parsing import parse_json
from cppo.recipes import Recipe, RunDirectory

LOCK_FILE = ".cppo.lock"


@contextmanager
def held(recipe: Recipe) -> Iterator[None]:
    """Lock a run's folder in its first process; a dry run writes nothing and locks nothing.

    Folders that a failed start made and left empty are removed.
    """
    dry = isinstance(recipe.options, TrainOptions) and recipe.options.dry_run
    with RunDirectory(recipe.output_dir).without_empty_leftovers():
        if dry or os.environ.get("RANK", "0") != "0":
            yield
        else:
            with folder_lock(Path(recipe.output_dir)):
                yield


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock the folder for this process; make the folder if it is missing.

    The lock file names its holder. A file of an ended process is taken over. Between hosts the lock works if the file
    system supports POSIX locks, as NFS does.

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holder = _acquire(folder / LOCK_FILE)
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        with holder:
            (folder / LOCK_FILE).unlink(missing_ok=True)


def _acquire(file: Path) -> IO[str]:
    while True:
        stream = file.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with stream:
                raise UserError(
                    f"output_dir: {file.parent} is in use by {_holder(stream)}: wait for it, stop it, or choose "
                    "another --output_dir"
                ) from None
        except OSError as error:
            tell(f"warning: {file.parent} has no file locks ({error.strerror}): a second run could use it too")
        if _is_at(stream, file):
            break
        stream.close()  # its last holder has just removed it
    stream.seek(0)
    stream.truncate()
    began = datetime.now(UTC).isoformat(timespec="seconds")
    json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": began}, stream)
    stream.flush()
    return stream


def _is_at(stream: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _holder(stream: IO[str]) -> str:
    stream.seek(0)
    try:
        found = parse_json(stream.read())
        return f"process {int(found['process'])} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
