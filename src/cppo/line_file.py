"""Files of JSON lines that grow while a model answers; a stopped command continues them. Imports no torch.

Line 1 is a header with the settings; each further line is one result. A file never mixes lines of different settings,
models or data.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cppo.errors import UserError
from cppo.parsing import parse_json

VERSION = 1


@dataclass(frozen=True)
class LineFormat:
    """One kind of such files.

    Attributes:
        mark: the first key of the header; its value is the version.
        writer: the command that writes them.
        content: the content of a line, in the plural, for messages: "responses".
        is_complete: whether a line has all of its cells, from the line and the header.
    """

    mark: str
    writer: str
    content: str
    is_complete: Callable[[Mapping[str, Any], Mapping[str, Any]], bool]


class LineFile:
    """A file that is open for more lines.

    Attributes:
        lines: the lines read from it.

    Raises UserError for a file of another kind or of other settings, a damaged file, or one that cannot be read or
    written.
    """

    def __init__(self, path: str, kind: LineFormat, settings: Mapping[str, Any], option: str) -> None:
        """option: the option that names the file, for messages."""
        self._path = Path(path)
        settings = json.loads(json.dumps(settings))  # the file's header has also passed through JSON
        try:
            header, self.lines, size = _read(self._path, kind, option)
            if header is None:
                self._path.write_bytes(b"")
                self.append({kind.mark: VERSION, **settings})
                return
            for name in dict.fromkeys((*header, *settings)):
                before, now = header.get(name), settings.get(name)
                if before != now:
                    raise UserError(
                        f"{option}: {path} holds {kind.content} of other settings: {name} was "
                        f"{json.dumps(before):.80}, now {json.dumps(now):.80}; give another file"
                    )
            if size < self._path.stat().st_size:  # the line that a stop cut off
                with self._path.open("r+b") as file:
                    file.truncate(size)
        except OSError as error:
            raise _unusable(path, option, error) from error

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line, and hand it to the operating system at once."""
        with self._path.open("ab") as file:
            file.write((json.dumps(line) + "\n").encode("utf-8"))


def read_lines(path: str, kind: LineFormat, option: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header without its mark, and the lines of a file; a last line that a stop cut off is left out.

    Raises UserError as `LineFile` does, and for a missing file.
    """
    try:
        header, lines, _ = _read(Path(path), kind, option, must_exist=True)
    except OSError as error:
        raise _unusable(path, option, error) from error
    if header is None:
        raise UserError(f"{option}: {path} is empty; `{kind.writer}` writes it")
    return header, lines


def _read(
    path: Path, kind: LineFormat, option: str, must_exist: bool = False
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """Header (None in a new file), lines, and the number of bytes up to the end of the last whole line."""
    data = path.read_bytes() if must_exist or path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    foreign = UserError(f"{option}: {path} was not written by {kind.writer}; give another file")
    if not whole:
        if data and not data.startswith(f'{{"{kind.mark}"'.encode()):
            raise foreign
        return None, [], 0
    try:
        first, *texts = whole.decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: cannot use {path}: it is not UTF-8 text") from error
    header = _parsed(first)
    if header is None or header.pop(kind.mark, None) != VERSION:
        raise foreign
    lines = []
    for number, text in enumerate(texts, start=2):
        line = _parsed(text)
        if line is None or not kind.is_complete(line, header):
            raise UserError(f"{option}: {path} line {number} is damaged; give another file")
        lines.append(line)
    return header, lines, len(whole)


def _parsed(text: str) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _unusable(path: str, option: str, error: OSError) -> UserError:
    return UserError(f"{option}: cannot use {path}: {error.strerror}")
