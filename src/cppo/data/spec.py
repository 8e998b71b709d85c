"""SPEC: the one-line name of data: a generated task, a file, a folder or a name on the hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cppo.errors import UserError, choose_one
from cppo.tasks import TASK_NAMES, TaskOptions, parse_task_options
from cppo.tasks.base import SPLITS

DEFAULT_TASK_ITEMS = 2000


@dataclass(frozen=True)
class TaskSpec:
    """`tasks:NAME?...`: generated items. `split` None means the caller's split."""

    text: str
    family: str
    options: TaskOptions
    seed: int
    n: int
    split: str | None


@dataclass(frozen=True)
class PathSpec:
    """A `.jsonl` or `.parquet` file, or a folder written by `save_to_disk` of `datasets`.

    With several splits in a folder, the caller's split is read.
    """

    text: str
    path: Path
    kind: Literal["jsonl", "parquet", "folder"]

    @property
    def image_folder(self) -> Path:
        """The folder where image paths begin."""
        return (self.path if self.kind == "folder" else self.path.parent).resolve()


@dataclass(frozen=True)
class HubSpec:
    """`hub:ORG/NAME[:SPLIT][?config=NAME]`, or `hub:./FOLDER` with a repository's files.

    `split` None means the caller's split.
    """

    text: str
    name: str | Path
    split: str | None
    config: str | None


Spec = TaskSpec | PathSpec | HubSpec

_HUB_SPEC = re.compile(
    r"hub:(?:(?P<name>\w[\w.-]*/\w[\w.-]*)|(?P<folder>[./~][^:?]*))(?::(?P<split>[\w.-]+))?(?:\?config=(?P<config>.+))?",
    re.ASCII,
)
_FOLDER_FILES = ("dataset_info.json", "dataset_dict.json")


def parse_spec(spec: str) -> Spec:
    """Read a SPEC. Raises UserError for bad syntax, an unknown task, a bad option or a missing file."""
    if spec.startswith("tasks:"):
        return _parse_task(spec)
    if spec.startswith("hub:"):
        found = _HUB_SPEC.fullmatch(spec)
        if found is None:
            raise UserError(f"data {spec!r}: write hub:ORG/NAME[:SPLIT][?config=NAME], or hub:./FOLDER for local files")
        name = found["name"] or Path(found["folder"]).expanduser()
        if isinstance(name, Path) and not name.is_dir():
            raise UserError(f"data {spec!r}: there is no folder {str(name)!r}")
        return HubSpec(spec, name, found["split"], found["config"])
    path = Path(spec)
    if spec and path.is_dir():
        if not any((path / file).is_file() for file in _FOLDER_FILES):
            raise UserError(
                f"data {spec!r}: not a folder written by `save_to_disk` of `datasets`; give one, or the "
                ".parquet or .jsonl files in it"
            )
        return PathSpec(spec, path, "folder")
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".parquet"):
        raise UserError(
            f"data {spec!r}: not a data source; write tasks:NAME (NAME is {', '.join(TASK_NAMES)}), hub:ORG/NAME, or "
            "the path of a .jsonl file (one JSON object a line), a .parquet file or a `datasets` folder"
        )
    if not path.is_file():
        raise UserError(f"data {spec!r}: there is no such file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"data {spec!r}: cannot be opened: {error.strerror}") from error
    return PathSpec(spec, path, "jsonl" if suffix == ".jsonl" else "parquet")


def hub_dataset(spec: str) -> str | None:
    """The hub name in a `hub:` SPEC, None for any other SPEC and for a folder; nothing is opened."""
    found = _HUB_SPEC.fullmatch(spec)
    return found["name"] if found else None


def _parse_task(spec: str) -> TaskSpec:
    family, _, query = spec.removeprefix("tasks:").partition("?")
    if family not in TASK_NAMES:
        raise UserError(f"data {spec!r}: unknown task {family!r}; {choose_one(family, TASK_NAMES)}")
    options: dict[str, str] = {}
    for pair in query.split("&") if query else []:
        key, equals, value = pair.partition("=")
        if not key or not equals or not value:
            raise UserError(f"data {spec!r}: {pair!r} is not option=value")
        if key in options:
            raise UserError(f"data {spec!r}: option {key!r} is given twice")
        options[key] = value
    seed = _whole_number(spec, "seed", options.pop("seed", "0"), least=0)
    n = _whole_number(spec, "n", options.pop("n", str(DEFAULT_TASK_ITEMS)), least=1)
    split = options.pop("split", None)
    if split is not None and split not in SPLITS:
        raise UserError(f"data {spec!r}: split={split} is unknown; {choose_one(split, SPLITS)}")
    return TaskSpec(spec, family, parse_task_options(family, options), seed, n, split)


def _whole_number(spec: str, key: str, value: str, *, least: int) -> int:
    # At most 9 digits: a longer seed or count is a typing mistake.
    if not (value.isascii() and value.isdigit() and len(value) <= 9) or int(value) < least:
        raise UserError(f"data {spec!r}: {key}={value} must be a whole number of at least {least}")
    return int(value)
