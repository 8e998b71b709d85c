"""Data sets on the hub: their tables, and the archives of images that the tables name.

`huggingface_hub` fetches the files into its cache. A folder with a repository's files can replace the hub.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cppo.data.archives import ARCHIVE, unpacked
from cppo.data.hub_layout import CARD, FORMATS, split_files
from cppo.data.tables import ROWS_AT_ONCE, Table, prepared_table
from cppo.errors import UserError, one_line
from cppo.progress import Progress

if TYPE_CHECKING:
    import datasets

SECONDS_TO_ANSWER = 8.0
"""Time limit for the hub to describe a repository; after it the hub counts as offline."""
_POINTER = b"version https://git-lfs.github.com/"
LOOKED_AT, LONGEST_PATH = 32, 1024
"""Number of image paths that are read to find the image folder; a longer text is no path."""


class HubAway(UserError):
    """The hub is offline and the cache lacks the files; `reason` says so, without the remedy."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def open_hub_table(
    name: str | Path,
    *,
    split: str = "train",
    config: str | None = None,
    images: Sequence[str] = ("images", "image"),
    label: str | None = None,
) -> Table:
    """Fetch one split of a data set, and its image archives if the table holds paths.

    Returns its table, and the image folder: None if the columns `images` hold no paths.

    Args:
        name: ORG/NAME on the hub, or a folder with a repository's files.
        split: name in the data set's card or in its file names.
        config: one of several configurations; None for the default.
        images: columns with images or image paths; missing columns are ignored.
        label: the data's name in messages; `hub:NAME` by default.

    Raises:
        HubAway: the hub is offline and the cache lacks the files.
        UserError: the data set, configuration, split, table or images do not exist; or an archive is refused (see
            `cppo.data.archives.unpacked`).
    """
    label = label or f"hub:{name}"
    repository = _in_folder(name) if isinstance(name, Path) else _on_hub(name, label)
    card = ""
    if CARD in repository.files:
        card = repository.fetch(CARD).read_text(encoding="utf-8", errors="replace")
    chosen = split_files(repository.files, card, label=label, split=split, config=config)
    suffix = PurePosixPath(chosen[0]).suffix
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    table = prepared_table(label, FORMATS[suffix], [repository.fetch(path) for path in chosen], **options)
    paths = list(islice(_image_paths(table, images), LOOKED_AT))
    folder = _image_folder(repository, label, PurePosixPath(chosen[0]).parent, paths) if paths else None
    return Table(table, folder)


@dataclass(frozen=True)
class _Repository:
    """A repository's files by path, and the function that fetches one; `folder` is set for a local repository."""

    files: Sequence[str]
    fetch: Callable[[str], Path]
    folder: Path | None = None


def _in_folder(folder: Path) -> _Repository:
    def fetch(path: str) -> Path:
        try:
            with (folder / path).open("rb") as file:
                is_pointer = file.read(len(_POINTER)) == _POINTER
        except OSError as error:
            raise UserError(f"{folder / path}: cannot be opened: {error.strerror}") from error
        if is_pointer:
            raise UserError(f"{folder / path}: is a pointer of Git LFS, not the file itself; run `git lfs pull`")
        return folder / path

    return _Repository(_files_below(folder), fetch, folder.resolve())


def _files_below(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def _on_hub(name: str, label: str) -> _Repository:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    def failed(error: Exception) -> UserError:
        if isinstance(error, RepositoryNotFoundError):
            return UserError(
                f"data {label!r}: the hub has no data set {name!r}, or shows it only after `hf auth login`"
            )
        folder = f"./{name.partition('/')[2]}"
        reason = f"the hub cannot be reached ({one_line(error):.200}) and the cache lacks its files"
        fetch = f"`hf download {name} --repo-type dataset --local-dir {folder}` where there is a network"
        in_place = label.replace(f"hub:{name}", f"hub:{folder}")
        return HubAway(f"data {label!r}: {reason}: run {fetch}, and write {in_place} in its place", reason)

    try:
        described = HfApi().dataset_info(name, timeout=SECONDS_TO_ANSWER)
        commit, names = described.sha, [file.rfilename for file in described.siblings or []]
        files = [name for name in names if not {"", ".", ".."} & set(name.split("/"))]
    # The HTTP library's own errors, which change with the version, and errors of a hub that is down.
    except Exception as error:
        if isinstance(error, RepositoryNotFoundError):
            raise failed(error) from error
        cached = _newest_in_cache(name)
        if cached is None:
            raise failed(error) from error
        commit, files = cached.name, _files_below(cached)

    def fetch(path: str) -> Path:
        try:
            return Path(hf_hub_download(name, path, repo_type="dataset", revision=commit, tqdm_class=Progress))
        except Exception as error:
            raise failed(error) from error

    return _Repository(files, fetch)


def _newest_in_cache(name: str) -> Path | None:
    """The folder of the newest commit in the cache; its name is the commit's."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    commits = [
        one
        for found in repositories
        if (found.repo_type, found.repo_id) == ("dataset", name)
        for one in found.revisions
    ]
    return max(commits, key=lambda commit: commit.last_modified).snapshot_path if commits else None


def _image_paths(table: "datasets.Dataset", columns: Sequence[str]) -> Iterator[str]:
    """The paths in a table's image columns, up to the first embedded image."""
    for name in columns:
        if name not in table.column_names:
            continue
        batches = table.select_columns([name]).with_format("arrow").iter(ROWS_AT_ONCE)
        for cell in (cell for batch in batches for cell in batch[name].to_pylist()):
            for item in cell if isinstance(cell, list) else [cell]:
                if isinstance(item, dict) and item.get("bytes") is None:
                    item = item.get("path")
                if isinstance(item, dict | bytes):
                    return
                if isinstance(item, str) and 0 < len(item) <= LONGEST_PATH:
                    yield item


def _image_folder(repository: _Repository, label: str, beside: PurePosixPath, paths: Sequence[str]) -> Path:
    """The folder where `paths` begin: beside the table or at the repository's root, among its files or in its
    archives."""
    folder = _first_with(repository.folder, beside, paths) if repository.folder is not None else None
    if folder is not None:
        return folder
    archives = [path for path in repository.files if path.lower().endswith(ARCHIVE)]
    if archives:
        from huggingface_hub import cached_assets_path

        cache = cached_assets_path(library_name="cppo", namespace="images")
        folder = _first_with(unpacked({path: repository.fetch(path) for path in archives}, cache), beside, paths)
    if folder is None:
        where = f"in none of {', '.join(archives)}" if archives else f"nowhere, and there is no {ARCHIVE} archive"
        raise UserError(
            f"data {label!r}: its image {paths[0]!r:.200} is {where}; put the images where the table looks "
            "for them, in a folder with its files, and write hub:./FOLDER"
        )
    return folder


def _first_with(root: Path, beside: PurePosixPath, paths: Sequence[str]) -> Path | None:
    for folder in ((root / beside).resolve(), root.resolve()):
        if any(_lies_in(folder, path) for path in paths):
            return folder
    return None


def _lies_in(folder: Path, path: str) -> bool:
    try:
        file = (folder / path).resolve()
        return file.is_relative_to(folder) and file.is_file()
    except (OSError, RuntimeError, ValueError):  # a too long name, a loop of links, a null character
        return False
