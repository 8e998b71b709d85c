"""Files written completely or not at all, read errors in one line, and fingerprints of contents. Imports no torch."""

import hashlib
import json
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cppo.errors import UserError, first_line

WHOLE_BYTES = 1 << 26
TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream error")
"""Marks of torch's write errors, which are plain RuntimeErrors."""
TORCH_READER = os.path.join("torch", "serialization.py")
"""Where torch reads a file; any damage there ends in an error of any type."""
BLOCKS, BLOCK_BYTES = 64, 1 << 16
MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer*.json", "vocab.json", "merges.txt", "chat_template*")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context: an error while writing below `path` becomes one line that names the file.

    Python names a file that cannot be opened, but not on a full disk; safetensors and torch name none. For a folder,
    the file written last is named.

    Raises:
        UserError: no room, no permission, the folder is gone, or another error of the file system.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITER):
            raise
        named = error.filename if isinstance(error, OSError) else None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        if isinstance(error, RuntimeError):
            reason = f"the disk may be full ({reason})"
        raise UserError(f"{named or _last_written(path)} cannot be written: {reason}") from error


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Context: a damaged file of tensors, or one with anything else, gives one line.

    Args:
        what: the file, or its folder's content, as the subject of a sentence.

    Raises:
        UserError: the file is cut off, is not a file of safetensors or torch, or would run code to be read.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        frames = traceback.walk_tb(error.__traceback__)
        in_torch = any(frame.f_code.co_filename.endswith(TORCH_READER) for frame, _ in frames)
        if not (in_torch or isinstance(error, SafetensorError)):
            raise
        # For a pickle that would run code, torch writes a page on how to load it anyway.
        plain = isinstance(error, SafetensorError | RuntimeError)
        reason = first_line(error) if plain else "it is cut off, or holds other things than tensors"
        raise UserError(f"{what} cannot be read: {reason}") from error


def replace_text(file: Path, text: str) -> None:
    """`replace_bytes` for a text in UTF-8."""
    replace_bytes(file, text.encode())


def replace_bytes(file: Path, content: bytes) -> None:
    """Replace a file: a reader sees the old or the new content, also where writing fails.

    Raises UserError where it fails.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with writing(file):
        try:
            draft.write_bytes(content)
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)


def _last_written(path: Path) -> Path:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=path)


def model_fingerprint(folder: Path, *, whole: bool = False) -> str:
    """A fingerprint of the weights and the processor in a model folder, independent of its path.

    Without `whole`, large files are sampled: fast, but small changes may be missed.
    """
    return _fingerprint({file for pattern in MODEL_FILES for file in folder.glob(pattern)}, folder, whole=whole)


def content_fingerprint(path: Path) -> str:
    """A fingerprint of a file or folder; files that it refers to by path do not count."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return _fingerprint(files, path.parent)


def _fingerprint(files: Iterable[Path], root: Path, *, whole: bool = False) -> str:
    """A hash of names, sizes and contents: all of a file up to 64 MiB, of a larger file 64 blocks or all."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(json.dumps([str(file.relative_to(root)), size]).encode())
        with file.open("rb") as content:
            if whole or size <= WHOLE_BYTES:
                while block := content.read(WHOLE_BYTES):
                    digest.update(block)
                continue
            for number in range(BLOCKS):
                content.seek((size - BLOCK_BYTES) * number // (BLOCKS - 1))
                digest.update(content.read(BLOCK_BYTES))
    return digest.hexdigest()[:32]
