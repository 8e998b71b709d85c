"""Files written whole or not at all, read or refused in words, and told apart by what is in them. No torch."""

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
"""What torch's errors of writing a file speak of; they are plain RuntimeErrors."""
TORCH_READER = os.path.join("torch", "serialization.py")
"""Where torch reads a file: a damaged one raises there whatever its first wrong byte leads to."""
BLOCKS, BLOCK_BYTES = 64, 1 << 16
MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer*.json", "vocab.json", "merges.txt", "chat_template*")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where writing below `path` fails, say so in one line that names the file.

    Python names the file where it cannot be opened, not where the disk is full; safetensors and torch name none. Of a
    folder the file that was written last is named.

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
    """Where a file of tensors is damaged, or holds anything but tensors, say so in one line.

    Args:
        what: the file, or what its folder holds, as the subject of a sentence.

    Raises:
        UserError: the file is cut off, no file of safetensors or torch, or would need code to be read.
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
        # Of a pickle that would run code torch writes a page on how to load it all the same.
        plain = isinstance(error, SafetensorError | RuntimeError)
        reason = first_line(error) if plain else "it is cut off, or holds other things than tensors"
        raise UserError(f"{what} cannot be read: {reason}") from error


def replace_text(file: Path, text: str) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(file, text.encode())


def replace_bytes(file: Path, content: bytes) -> None:
    """Write a file anew: a reader sees the old content or the new one, also where writing fails.

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
    """What tells the weights and the processor in a model folder from others, wherever it lies.

    Without `whole` large files are sampled, which is fast and overlooks small changes.
    """
    return _fingerprint({file for pattern in MODEL_FILES for file in folder.glob(pattern)}, folder, whole=whole)


def content_fingerprint(path: Path) -> str:
    """What tells the content of a file or folder from others; files that it names by path are not looked at."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return _fingerprint(files, path.parent)


def _fingerprint(files: Iterable[Path], root: Path, *, whole: bool = False) -> str:
    """A hash of names, sizes and contents: all of a file up to 64 MiB, of a larger one 64 blocks or all."""
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
