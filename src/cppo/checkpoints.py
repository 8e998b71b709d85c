"""Checkpoints on disk: whether one is complete, which one a resume takes, and which are set aside. Imports no torch.

A checkpoint is complete when its files match its manifest. The manifest lists every file with size and SHA-256 and is
written last.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cppo.errors import UserError, tell
from cppo.files import replace_text
from cppo.parsing import parse_json

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
OPTIMIZER = "optimizer*"
"""The optimizer's file or folder, for any wrapper of the model."""
NEEDED = ("scheduler.pt", "rng_state*.pth", "*config.json")
"""Patterns of the files that every checkpoint holds, besides optimizer and weights."""
PLAIN = "without FSDP and DeepSpeed"
WRITTEN = {
    "whole by FSDP": "pytorch_model_fsdp.bin",
    "sharded by FSDP": "pytorch_model_fsdp_0",
    "by DeepSpeed": "global_step*",
}
"""Other ways to write weights -> the pattern of the file or folder that shows it."""
OLDER = f"it has no {MANIFEST}, as from cppo 0.1.0; give its folder to --resume_from_checkpoint to continue from it"
SET_ASIDE = "abandoned-"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_manifest(
    checkpoint: Path, processes: int, rows: str | None = None, code: Mapping[str, str] | None = None
) -> None:
    """Declare the checkpoint complete.

    Args:
        checkpoint: its folder. All processes have written their files.
        processes: their number. A resume needs the same number.
        rows: the digest of the training rows (`RecordSource.digest`), if the run knows it.
        code: the files of the user's own functions -> fingerprint, if the run knows them.
    """
    entries = _hashed(checkpoint, _files(checkpoint))
    files = {name: list(entry) for name, entry in sorted(entries.items())}
    manifest = {"processes": processes, "rows": rows, "code": dict(code or {}), "files": files}
    replace_text(checkpoint / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def begin_manifest(checkpoint: Path) -> None:
    """Declare that the checkpoint is being written, perhaps over an older one."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    replace_text(checkpoint / MANIFEST, json.dumps({"files": None}) + "\n")


def check_processes(checkpoint: Path, processes: int) -> None:
    """Refuse to continue from a checkpoint of another number of processes.

    cppo 0.1.0 did not record the number. Raises UserError.
    """
    wrote = _recorded(checkpoint, "processes")
    if wrote not in (None, processes):
        raise UserError(
            f"resume_from_checkpoint: {wrote} process{'es' * (wrote != 1)} wrote {checkpoint}, but {processes} "
            f"resume{'s' * (processes == 1)}: start the same number, or start a new run from its weights with --model"
        )


def has_other_rows(checkpoint: Path, rows: str) -> bool:
    """Whether the checkpoint's run trained on other rows than those of this digest, or in another order.

    False where the checkpoint does not say.
    """
    return _recorded(checkpoint, "rows") not in (None, rows)


def changed_code(checkpoint: Path, code: Mapping[str, str]) -> list[str]:
    """The files with the user's own functions that changed since the checkpoint, by name. `code`: as it is now."""
    before = _recorded(checkpoint, "code") or {}
    return [file for file, fingerprint in code.items() if before.get(file, fingerprint) != fingerprint]


def check_weights_written(checkpoint: Path, how: str) -> None:
    """Refuse to continue from a checkpoint with weights in another layout than the run writes.

    Args:
        how: one of the names in `WRITTEN`, or `PLAIN`.

    Raises:
        UserError: the checkpoint's weights have another layout.
    """
    found = next((name for name, pattern in WRITTEN.items() if any(checkpoint.glob(pattern))), PLAIN)
    if found != how:
        model = str(checkpoint) if found == PLAIN else "and a complete model"
        raise UserError(
            f"resume_from_checkpoint: the weights in {checkpoint} were written {found}, but this run writes them "
            f"{how}: launch as before, or start a new run with --model {model}"
        )


def damage(checkpoint: Path, *, read: bool = True) -> str | None:
    """Why the checkpoint is not complete; None for a complete one.

    Args:
        read: also compare hashes, which reads every file. Without it only sizes are compared.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        listed = parse_json((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        if listed is None:
            return "its writing was interrupted"
        files = {name: (int(size), str(digest)) for name, (size, digest) in listed.items()}
        found = _files(checkpoint)
        for name, (size, _) in files.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != size:
                return f"{name} has {found[name]:,} bytes, not {size:,}"
        if read:
            hashed = _hashed(checkpoint, files)
            changed = [name for name, entry in files.items() if hashed[name] != entry]
            if changed:
                return f"the contents of {changed[0]} have changed"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"{MANIFEST} is damaged ({error})"
    return None


def is_own_checkpoint(folder: Path) -> bool:
    """Whether `cppo train` or `cppo sft` wrote the folder as a checkpoint, complete or not."""
    return (folder / MANIFEST).is_file() or _is_older(folder)


def written_by_verl(folder: Path) -> str | None:
    """What to do with a run of verl, its checkpoint, or its folder `actor`; None for another folder."""
    latest = folder / "latest_checkpointed_iteration.txt"
    if latest.is_file():
        folder = folder / f"global_step_{latest.read_text(encoding='utf-8').strip()}"
    for actor in (folder, folder / "actor"):
        if any(actor.glob("model_world_size_*_rank_0.pt")):
            model, goes_on = actor / "huggingface", "verl wrote it: `python -m cppo.verl` continues from it"
            if any(model.glob("*.safetensors")):
                return f"{goes_on}, and its model is {model}"
            merge = f"python -m verl.model_merger merge --backend fsdp --local_dir {actor} --target_dir DIR"
            return f"{goes_on}, and `{merge}` converts it to a model"
    return None


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is a run's checkpoint: `checkpoint-N`."""
    return _NAME.fullmatch(name) is not None


def looks_whole(checkpoint: Path) -> bool:
    """Whether all files have their sizes, or, without a manifest, the trainer state exists."""
    return damage(checkpoint, read=False) is None if (checkpoint / MANIFEST).is_file() else _is_older(checkpoint)


def checkpoint_folders(run: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, complete or not, by step."""
    if not run.is_dir():
        return []
    steps = {entry: int(match[1]) for entry in run.iterdir() if (match := _NAME.fullmatch(entry.name))}
    return sorted((entry for entry in steps if entry.is_dir()), key=steps.__getitem__)


def newest_whole(run: Path, passed_over: Callable[[str], object]) -> Path | None:
    """The complete checkpoint of the highest step that a run can continue from; None without one.

    Args:
        passed_over: called with a sentence for each later one that is damaged or has no optimizer.
    """
    for folder in reversed(checkpoint_folders(run)):
        fault = OLDER if _is_older(folder) else damage(folder) or _no_optimizer(folder)
        if fault is None:
            return folder
        passed_over(f"{folder} is skipped: {fault}")
    return None


def check_resumable(folder: Path) -> None:
    """Refuse a folder that a run cannot continue from. Raises UserError with the reason.

    cppo 0.1.0 wrote no manifest. A folder without one is accepted, with a warning, when its trainer state can be read.
    """
    if (hint := written_by_verl(folder)) is not None:
        raise UserError(f"resume_from_checkpoint: {folder} cannot be resumed from: {hint}")
    older = _is_older(folder)
    fault = (_missing(folder) if older else damage(folder)) or _no_optimizer(folder)
    if older:
        tell(f"warning: {folder} has no {MANIFEST}, so its files cannot be checked")
    if fault is not None:
        raise UserError(f"resume_from_checkpoint: {folder} cannot be resumed from: {fault}")
    checkpoint_step(folder)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint. Raises UserError where its trainer state is damaged."""
    file = checkpoint / TRAINER_STATE
    try:
        return int(parse_json(file.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"resume_from_checkpoint: {file} is damaged; resume from another checkpoint") from error


def set_aside(run: Path, after: int) -> list[tuple[Path, Path]]:
    """Rename the checkpoints of a run after a step, which a new branch from there abandons; (old, new) of each."""
    moved = []
    for folder in checkpoint_folders(run):
        if int(folder.name.rpartition("-")[2]) <= after:
            continue
        names = [f"{SET_ASIDE}{folder.name}", *(f"{SET_ASIDE}{folder.name}-{number}" for number in range(2, 1000))]
        free = next(run / name for name in names if not (run / name).exists())
        moved.append((folder, folder.rename(free)))
    return moved


def _recorded(checkpoint: Path, name: str) -> Any:
    """An entry of the manifest; None without one."""
    file = checkpoint / MANIFEST
    return parse_json(file.read_text(encoding="utf-8")).get(name) if file.is_file() else None


def _is_older(folder: Path) -> bool:
    return not (folder / MANIFEST).exists() and (folder / TRAINER_STATE).is_file()


def _missing(folder: Path) -> str | None:
    """The part that a checkpoint without a manifest lacks for an exact resume."""
    if any(folder.glob("global_step*")):  # DeepSpeed keeps its own
        return None
    return next((f"{pattern} is missing" for pattern in NEEDED if not any(folder.glob(pattern))), None)


def _no_optimizer(folder: Path) -> str | None:
    if any(folder.glob(OPTIMIZER)) or any(folder.glob("global_step*")):  # the latter is DeepSpeed's
        return None
    return "it holds no optimizer state (save_only_model, or a model folder); start from its weights with --model"


def _files(checkpoint: Path) -> dict[str, int]:
    """Sizes of the files below a checkpoint, without the manifest, by relative name."""
    found = (file for file in checkpoint.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {file.relative_to(checkpoint).as_posix(): file.stat().st_size for file in found}


def _hashed(checkpoint: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    def entry(name: str) -> tuple[int, str]:
        file = checkpoint / name
        with file.open("rb") as content:
            return file.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest()

    listed = list(names)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(listed, pool.map(entry, listed), strict=True))
