"""Results of a study's finished processes, in files of their own or in the study's archive.

An archive is a study in one file. For each result it has a line `{"path": FOLDER, "result": {...}}`. The lines are
sorted by path and compressed with xz, so equal results make equal bytes. An archive may come from anyone: reading takes
bounded time and memory, and writes nothing. No torch.
"""

import io
import json
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cppo.errors import UserError
from cppo.files import replace_bytes
from cppo.parsing import parse_json

RESULT = "cell.json"
DEFINITIONS = "definitions"
"""The entry of an identity with the numbers of `cppo.comparison.definitions`."""
MOST_BYTES, MOST_LINE_BYTES, DECODER_BYTES = 1 << 27, 1 << 22, 1 << 27
"""Limits of an archive's text, of one of its lines, and of the memory for decompression."""
TOO_LARGE = f"an archive holds at most {MOST_BYTES >> 20} MiB of text, {MOST_LINE_BYTES >> 20} MiB a line"


def read_result(file: Path) -> Any:
    """The JSON of a result's file; None if there is no file. Raises UserError if it cannot be read."""
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}; remove it to run the cell again") from error


def write_archive(file: Path, results: Mapping[str, Any]) -> None:
    """Write results, by path, as an archive. Raises UserError if the file cannot be written."""
    lines = [_line(path, results[path]) for path in sorted(results)]
    if max(map(len, lines)) > MOST_LINE_BYTES or sum(map(len, lines)) > MOST_BYTES:
        raise UserError(f"{file} cannot be written: {TOO_LARGE}")
    replace_bytes(file, lzma.compress(b"".join(lines), lzma.FORMAT_XZ, lzma.CHECK_CRC64, lzma.PRESET_EXTREME | 9))


def read_archive(file: Path) -> dict[str, Any]:
    """An archive's results by path, unchecked.

    Raises UserError for a file that is no archive, a damaged one and one beyond the limits.
    """
    try:
        return dict(_records(file))
    except (OSError, ValueError, RecursionError, lzma.LZMAError) as error:
        raise UserError(f"{file}: cannot be read as an archive of cppo compare: {error}") from error


def _line(path: str, result: Any) -> bytes:
    record = {"path": path, "result": result}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _records(file: Path) -> Iterator[tuple[str, Any]]:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, DECODER_BYTES)
    with file.open("rb") as content:
        text = decoder.decompress(content.read(MOST_BYTES), MOST_BYTES + 1)
    if len(text) <= MOST_BYTES and (not decoder.eof or decoder.unused_data):
        raise ValueError("it is cut off, or something follows its end")
    before = ""
    for number, line in enumerate(io.BytesIO(text), start=1):
        if max(len(text) - MOST_BYTES, len(line) - MOST_LINE_BYTES) > 0:
            raise ValueError(TOO_LARGE)
        record = parse_json(line)
        path = record.get("path") if isinstance(record, dict) else None
        # In the form of `write_archive`: in order, each path once, and only text that UTF-8 can hold.
        if not isinstance(path, str) or path <= before or _line(path, record.get("result")) != line:
            raise ValueError(f"line {number} was not written by it")
        yield path, record["result"]
        before = path


def _amount(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1e12


def _amount_or_none(value: Any) -> bool:
    return value is None or _amount(value)


def _duration(value: Any) -> bool:
    return _amount(value) and value > 0


def _marks(value: Any) -> bool:
    return isinstance(value, str) and value != "" and not value.strip("01")


def _texts_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))


EVALUATION = {
    "step": int,
    "correct": {str: _marks},
    "format_rate": {str: _amount},
    "detectors": {str: {str: _amount_or_none}},
}
FORM: Mapping[str, Any] = {
    "task": str,
    "identity": dict,
    "options": dict,
    "evaluations": [EVALUATION],
    "training": {str: list},
    "prompts": str,
    "warnings": _texts_or_none,
    "step_seconds": [_duration],
    "step_cpu_seconds": [_duration],
    "peak_mib": _amount,
    "seconds": _amount,
    "evaluation_seconds": _amount,
    "threads": int,
    "device": str,
    "versions": dict,
    "code": str,
}
"""The entries of a result by name: a type, a test, a list of one of these, or a mapping; `str` allows any name."""


def flaws(result: Any, kind: str, request: Mapping[str, Any]) -> list[str]:
    """The entries of a result that no process of this kind writes for this request.

    Evaluations are checked against the options in the result, which may differ from the request's.
    """
    if not isinstance(result, dict):
        return ["all of it"]
    if not _shallow(result):
        return ["its depth"]
    found = [name for name, form in FORM.items() if not _fits(result.get(name), form)]
    found += [name for name in ("task", "label", "seed") if name in request and result.get(name) != request[name]]
    if found:
        return found
    identity, evaluations = result["identity"], result["evaluations"]
    if not _fits(identity.get(DEFINITIONS, {}), {str: int}):
        found.append(DEFINITIONS)
    if kind != "start" and not (result["step_seconds"] and result["step_cpu_seconds"]):
        found.append("step_seconds")
    if kind == "timing":
        return found
    if not _fits(identity.get("evaluation"), {"conditions": [str]}):
        return [*found, "evaluation"]
    conditions = sorted(identity["evaluation"]["conditions"])
    named = [sorted(one[name]) for one in evaluations for name in ("correct", "format_rate")]
    lengths = {len(marks) for one in evaluations for marks in one["correct"].values()}
    steps = [0] if kind == "start" else identity.get("steps")
    if [one["step"] for one in evaluations] != steps or {*map(tuple, named)} != {(*conditions,)} or len(lengths) != 1:
        found.append("evaluations")
    return found


def _shallow(value: Any, levels: int = 20) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_shallow(one, levels - 1) for one in inner)


def _fits(value: Any, form: Any) -> bool:
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(one, form[0]) for one in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        names = value if str in form else form
        return all(_fits(value.get(name), form.get(str, form.get(name))) for name in names)
    return isinstance(value, form) if isinstance(form, type) else form(value)
