"""Files written whole or not at all, and files told apart by what is in them. No torch."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

WHOLE_BYTES = 1 << 26
BLOCKS, BLOCK_BYTES = 64, 1 << 16
MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer*.json", "vocab.json", "merges.txt", "chat_template*")


def replace_text(file: Path, text: str) -> None:
    """Write a file anew: a reader sees the old text or the new one, also where writing fails."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


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
