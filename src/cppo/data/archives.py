"""Unpack archives of images once, into the cache. Their contents are not trusted."""

import errno
import hashlib
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from cppo.errors import UserError, one_line, tell
from cppo.progress import Progress

ARCHIVE = ".zip"
MAX_UNPACKED_BYTES = 100_000_000_000
"""Limit for all archives of a data set together, counted while writing; ViRL39K has 3 GB."""
MAX_UNPACKED_FILES = 1_000_000
CHUNK_BYTES = 1 << 20
LOCK_PATIENCE_SECONDS = 5.0
_KINDS = {stat.S_IFLNK: "a link", stat.S_IFBLK: "a device", stat.S_IFCHR: "a device", stat.S_IFIFO: "a pipe"}


class RefusedArchive(Exception):
    """An archive holds something that is refused; the text says what."""


def unpacked(archives: Mapping[str, Path], cache: Path) -> Path:
    """Return the folder below `cache` with the contents of the zip archives; unpack them if it does not exist yet.

    Args:
        archives: {path in the repository: file}. Members are unpacked into their archive's folder, as by `unzip`.

    One of several processes unpacks. The folder gets its name when it is complete, so a killed process leaves none.

    Raises:
        UserError: an archive is broken; or it holds a member that leaves the folder, a link, a device, a repeated name,
            an encrypted member, or more than `MAX_UNPACKED_BYTES` or `MAX_UNPACKED_FILES`; or the disk is full.
    """
    found = [(name, path.resolve(), path.stat()) for name, path in sorted(archives.items())]
    identity = repr([(name, str(path), state.st_size, state.st_mtime_ns) for name, path, state in found])
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:32]
    with _locked(folder):
        if not folder.is_dir():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)  # left by a killed process
            try:
                _unpack(archives, part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; print a line while another process holds it."""
    lock = FileLock(folder.with_suffix(".lock"))
    while True:
        try:
            lock.acquire(timeout=LOCK_PATIENCE_SECONDS)
            break
        except Timeout:
            tell("another process unpacks the images; this one waits")
    try:
        yield
    finally:
        lock.release()


def _unpack(archives: Mapping[str, Path], folder: Path) -> None:
    files = written = 0
    for name, path in sorted(archives.items()):
        into = folder / PurePosixPath(name).parent
        try:
            into.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(path) as archive:
                members = [info for info in archive.infolist() if _is_file(info)]
                if (files := files + len(members)) > MAX_UNPACKED_FILES:
                    raise RefusedArchive(f"more than {MAX_UNPACKED_FILES:,} files")
                total = sum(info.file_size for info in members)
                with Progress(total=total, desc=f"unpack {name}", unit="B", unit_scale=True) as bar:
                    for info in members:
                        target = into / info.filename
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with archive.open(info) as data, target.open("xb") as file:
                            while chunk := data.read(CHUNK_BYTES):
                                if (written := written + len(chunk)) > MAX_UNPACKED_BYTES:
                                    raise RefusedArchive(f"more than {MAX_UNPACKED_BYTES:,} bytes when unpacked")
                                file.write(chunk)
                                bar.update(len(chunk))
        except RefusedArchive as error:
            raise UserError(f"{path}: refused, because it holds {error}") from error
        except FileExistsError as error:
            raise UserError(f"{path}: refused, because it holds {Path(error.filename).name!r:.200} twice") from error
        # Decompressors raise many kinds of errors for broken files; `zipfile` seeks before the start of some.
        except Exception as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise UserError(f"{path}: cannot be unpacked into {folder.parent}: {one_line(error):.300}") from error
            raise UserError(f"{path}: is broken; fetch it again: {one_line(error):.300}") from error


def _is_file(info: zipfile.ZipInfo) -> bool:
    """Whether a member is a file; False for a folder. Raises RefusedArchive for other kinds and for its path."""
    name = info.filename
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
        raise RefusedArchive(f"{name!r:.200}, which leaves the folder")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise RefusedArchive(f"{name!r:.200}, which is {_KINDS.get(kind, 'no plain file')}")
    if info.flag_bits & 1:
        raise RefusedArchive(f"{name!r:.200}, which is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # `zipfile` unpacks other compressions in pieces of any size.
        raise RefusedArchive(f"{name!r:.200}, which is not compressed by deflate")
    return not info.is_dir()
