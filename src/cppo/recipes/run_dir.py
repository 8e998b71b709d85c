"""A run directory: the contents of its files, and whether a new run may write there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import yaml

from cppo.checkpoints import (
    check_resumable,
    checkpoint_folders,
    checkpoint_step,
    is_checkpoint_name,
    looks_whole,
    newest_whole,
    set_aside,
)
from cppo.errors import UserError, tell
from cppo.files import replace_text
from cppo.parsing import parse_json, parse_yaml

CONFIG_HEADER = "# Resolved recipe of a cppo run"
AUTO = "auto"
"""The `resume_from_checkpoint` that resumes if there is a checkpoint, and else begins a run."""
SHOWN_FILES = 3


def config_header(command: str) -> str:
    """Beginning of the first line of a run's recipe; the name of the given recipe follows."""
    return f"{CONFIG_HEADER} (cppo {command}, from "


class RunDirectory:
    """The files of one run.

    - `config.yaml`: the resolved recipe;
    - `metrics.jsonl`: one JSON object a logged step;
    - `samples.jsonl`: one example response a line;
    - `probes.jsonl`: one evaluation of the held-out items a line;
    - `progress.json`: the run's progress;
    - `summary.json`: written last, when the run has finished;
    - `report.html`: all of it as a page;
    - `README.md`: the model card.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.probes = self.path / "probes.jsonl"
        self.progress = self.path / "progress.json"
        self.summary = self.path / "summary.json"
        self.report = self.path / "report.html"
        self.card = self.path / "README.md"

    @classmethod
    def of_model(cls, model: str) -> Self:
        """The run of a model: its folder, or the parent of a folder `checkpoint-N`; another model has no files."""
        folder = Path(model)
        return cls(folder.absolute().parent if is_checkpoint_name(folder.absolute().name) else folder)

    def options(self) -> dict[str, Any]:
        """The resolved recipe, unchecked; empty if it is missing or unreadable."""
        try:
            options = parse_yaml(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return options if isinstance(options, dict) else {}

    def checkpoints(self) -> list[Path]:
        """Checkpoints that look complete, oldest first; their files are not read."""
        return [folder for folder in checkpoint_folders(self.path) if looks_whole(folder)]

    def find_checkpoint(self, resume: bool | str | None) -> Path | None:
        """The checkpoint that `resume` names.

        Args:
            resume: None or False for none, True for the newest complete one here, "auto" for the same or none, else a
                folder.

        Raises:
            UserError: there is none here, or the folder is no complete checkpoint.
        """
        if resume is None or resume is False:
            return None
        if resume not in (True, AUTO):
            folder = Path(str(resume))
            check_resumable(folder)
            return folder
        found = newest_whole(self.path, passed_over=tell)
        if found is None and resume is True:
            raise UserError(
                f"resume_from_checkpoint: {self.path} holds no complete checkpoint; `{AUTO}` would begin a new run"
            )
        return found

    def check_usable(
        self,
        *,
        checkpoint: Path | None = None,
        auto: bool = False,
        overwrite: bool = False,
        model: str = "micro",
        write: bool = True,
    ) -> None:
        """Refuse a folder that a run must not, or cannot, write to.

        Refused are folders with files that no run wrote, with an earlier run, with the run's own model, and folders
        that cannot be made. The folder is made now, since permissions alone do not decide.

        Args:
            checkpoint: the run resumes from it.
            auto: whether an unfinished run without a complete checkpoint may begin again.
            overwrite: whether an earlier run may be replaced.
            model: the name or folder of the trained model.
            write: without it nothing is made, and only permissions are checked.

        Raises:
            UserError: the folder is refused.
        """
        kept = [self.path, *checkpoint_folders(self.path)]
        if Path(model).is_dir() and any(folder.resolve() == Path(model).resolve() for folder in kept):
            raise UserError(f"output_dir: the run would replace its own model {model}: choose another folder")
        held = checkpoint is not None and self._holds(checkpoint)
        if not held:
            self._check_no_foreign_files()
        if not (held or overwrite):
            self._check_no_earlier_run(unfinished_too=not auto)
        if not write:
            existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
                raise UserError(
                    f"output_dir: cannot write to {self.path}: {existing} is not a folder that can be written"
                )
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise UserError(f"output_dir: cannot write to {self.path}: {error.strerror}") from error

    def _holds(self, checkpoint: Path | None) -> bool:
        """Whether a checkpoint is one of this run's own."""
        return checkpoint is not None and checkpoint.resolve().parent == self.path.resolve()

    def _check_no_foreign_files(self) -> None:
        if not self.path.is_dir():
            return
        if self.config.is_file() and self.config.read_text("utf-8", "replace").startswith(CONFIG_HEADER):
            return
        files = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        if files:
            more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
            raise UserError(
                f"output_dir: {self.path} holds files that no run wrote ({', '.join(files[:SHOWN_FILES])}{more}): "
                "choose an empty or a new folder"
            )

    def _check_no_earlier_run(self, unfinished_too: bool) -> None:
        if self.summary.is_file():
            raise UserError(
                f"output_dir: {self.path} already holds a finished run; give --overwrite to replace it, "
                "or another --output_dir"
            )
        if unfinished_too and checkpoint_folders(self.path):
            raise UserError(
                f"output_dir: {self.path} holds an unfinished run; continue it with --resume_from_checkpoint {AUTO}, "
                "or replace it with --overwrite"
            )

    @contextmanager
    def without_empty_leftovers(self) -> Iterator[None]:
        """Remove folders that were made inside this context and left empty by a failed start."""
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            yield
        except BaseException:
            for folder in made:
                with suppress(OSError):  # it is no longer empty, or was never made
                    folder.rmdir()
            raise

    def begin(self, *, checkpoint: Path | None, overwrite: bool) -> None:
        """Prepare the folder for a run, which writes its `config.yaml` next.

        A run that is new here removes the files of an earlier one. A resumed run keeps the steps up to its checkpoint;
        later checkpoints are set aside. A run that begins again sets damaged checkpoints aside too; with `overwrite` it
        removes everything.

        Raises:
            UserError: the folder cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            last = 0
            if checkpoint is not None and self._holds(checkpoint):
                last = checkpoint_step(checkpoint)
            self.forget(after=last)
            if not last:
                for entry in checkpoint_folders(self.path) if overwrite else ():
                    shutil.rmtree(entry)
            for old, new in set_aside(self.path, after=last):
                tell(f"{old} belongs to steps that this run replaces; it is now {new}")
        except OSError as error:
            raise UserError(f"output_dir: cannot write to {self.path}: {error.strerror}") from error

    def forget(self, *, after: int) -> None:
        """Keep what was recorded up to a step; after step 0, of a run that begins, nothing."""
        self.summary.unlink(missing_ok=True)
        for file in (self.metrics, self.samples, self.probes):
            if after:
                _keep_steps(file, last=after)
            else:
                file.unlink(missing_ok=True)
        if not after:
            self.progress.unlink(missing_ok=True)
            self.report.unlink(missing_ok=True)


def _keep_steps(file: Path, *, last: int) -> None:
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = parse_json(line)["step"]
        except ValueError:
            continue  # a stop cut this line off
        if step <= last:
            kept.append(line)
    replace_text(file, "".join(kept))
