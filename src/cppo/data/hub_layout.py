"""Find the files of one split in a repository: by its card, else by the file names."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

import yaml

from cppo.errors import UserError, choose_one
from cppo.parsing import parse_yaml

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
"""Reader of `datasets` by file ending. With several kinds in a repository, the first kind here is read."""
CARD = "README.md"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\b.*")
_WORDS = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}
_NO_DATA = re.compile(r"(?:^|/)(?:\.|dataset_infos?\.json$|dataset_dict\.json$|state\.json$)")


def split_files(files: Sequence[str], card: str, *, label: str, split: str, config: str | None = None) -> list[str]:
    """The paths of a split's tables, in order.

    Args:
        files: all paths of the repository.
        card: its README.md; empty if there is none.
        label: the data's name in messages.

    Raises:
        UserError: the configuration, split or table does not exist, or some of its files are missing.
    """
    tables = [path for path in files if PurePosixPath(path).suffix in FORMATS and not _NO_DATA.search(path)]
    configs = _configs(card)
    splits = _of_card(tables, configs, label, config) if configs else _of_names(tables, label, config)
    chosen = splits.get(split)
    if not chosen:
        named = (
            f"there is no split {split!r}: {choose_one(split, splits)}" if any(splits.values()) else "it has no tables"
        )
        raise UserError(f"data {label!r}: {named}")
    kind = min((PurePosixPath(path).suffix for path in chosen), key=list(FORMATS).index)
    chosen = sorted(path for path in chosen if path.endswith(kind))
    _check_shards(chosen, label)
    return chosen


def _configs(card: str) -> list[Mapping[str, Any]]:
    """The configurations in a card's front matter."""
    found = re.match(r"\s*---\s*\n(.*?)\n---\s*(?:\n|$)", card.replace("\r\n", "\n"), re.DOTALL)
    try:
        header = parse_yaml(found[1]) if found else None
    except yaml.YAMLError:
        header = None
    configs = header.get("configs") if isinstance(header, Mapping) else None
    known = configs if isinstance(configs, list) else []
    return [config for config in known if isinstance(config, Mapping) and "data_files" in config]


def _of_card(
    tables: Sequence[str], configs: Sequence[Mapping[str, Any]], label: str, config: str | None
) -> dict[str, list[str]]:
    """{split: paths} of one configuration of the card."""
    by_name = {_word(one.get("config_name", "default")): one for one in configs}
    marked = [name for name, one in by_name.items() if one.get("default") is True]
    default = marked[0] if marked else next(iter(by_name)) if len(by_name) == 1 else "default"
    wanted = default if config is None else config
    if wanted not in by_name:
        raise UserError(
            f"data {label!r}: write ?config=NAME at its end, NAME one of {', '.join(by_name)}"
            if config is None
            else f"data {label!r}: there is no configuration {config!r}: {choose_one(config, by_name)}"
        )
    data_files = by_name[wanted]["data_files"]
    if isinstance(data_files, Mapping):
        entries = list(data_files.items())
    elif isinstance(data_files, list) and all(isinstance(entry, Mapping) for entry in data_files):
        entries = [(entry.get("split", "train"), entry.get("path")) for entry in data_files]
    else:
        entries = [("train", data_files)]
    folder = _word(by_name[wanted].get("data_dir")).strip("/")
    splits: dict[str, list[str]] = {}
    for split, paths in entries:
        words = [_word(path) for path in (paths if isinstance(paths, list) else [paths])]
        patterns = [f"{folder}/{word}" if folder else word for word in words]
        splits.setdefault(_word(split), []).extend(_matching(tables, patterns))
    return splits


def _word(value: Any) -> str:
    """A card's value as text; "" for a list or mapping, which YAML aliases can make huge."""
    return "" if value is None or isinstance(value, list | tuple | set | Mapping) else str(value)


def _of_names(tables: Sequence[str], label: str, config: str | None) -> dict[str, list[str]]:
    """{split: paths} by the names of shards, else by words such as `test` in the paths, else all as `train`."""
    if config is not None:
        raise UserError(f"data {label!r}: its card names no configurations; leave out ?config={config}")
    splits: dict[str, list[str]] = {}
    for path in tables:
        shard = _SHARD.fullmatch(PurePosixPath(path).name)
        words = [_WORDS.get(word, word) for word in re.findall(r"[a-z]+", path.lower())]
        named = [word for word in words if word in ("train", "validation", "test")]
        split = shard[1] if shard else named[-1] if named else "train"
        splits.setdefault(split, []).append(path)
    return splits


def _matching(paths: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The paths that match a pattern; only `**` crosses folders."""
    return [
        path
        for path in paths
        if any(
            fnmatchcase(path, pattern) and ("**" in pattern or path.count("/") == pattern.count("/"))
            for pattern in patterns
        )
    ]


def _check_shards(paths: Sequence[str], label: str) -> None:
    """Refuse a split with missing files, as an interrupted download leaves it."""
    shards = [found for path in paths if (found := _SHARD.fullmatch(path))]
    for (name, total), there in Counter((shard[1], shard[3]) for shard in shards).items():
        if there != int(total):
            raise UserError(f"data {label!r}: found {there} of {int(total)} files of {name}; fetch the others too")
