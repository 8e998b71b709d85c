"""A run directory: which file holds what, and whether a new run may write there."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from cppo.errors import UserError

CONFIG_HEADER = "# Resolved recipe of a cppo run"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def config_header(command: str) -> str:
    """How the first line of a run's recipe begins; the name of the recipe that the run was given follows."""
    return f"{CONFIG_HEADER} (cppo {command}, from "


class RunDirectory:
    """The files of one run.

    `config.yaml` is the resolved recipe, `metrics.jsonl` has one JSON object a logged step, `samples.jsonl` one example
    response a line, `probes.jsonl` one look at the held-out items per line, `progress.json` tells how far the run is,
    `summary.json` is written last, when it has finished, `report.html` shows it all, `README.md` is the model card.
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

    def options(self) -> dict[str, Any]:
        """The resolved recipe, unchecked; empty where there is none, or one that cannot be read."""
        try:
            options = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return options if isinstance(options, dict) else {}

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first: those whose last file, the trainer state, is there."""
        if not self.path.is_dir():
            return []
        found = [
            (int(match[1]), entry)
            for entry in self.path.iterdir()
            if (match := _CHECKPOINT.fullmatch(entry.name)) and (entry / "trainer_state.json").is_file()
        ]
        return [entry for _, entry in sorted(found)]

    def find_checkpoint(self, resume: bool | str | None) -> Path | None:
        """The checkpoint folder that `resume` names: None or False none, True the latest here, else that folder.

        Raises UserError where there is none here, or that folder is not a complete checkpoint.
        """
        if resume is None or resume is False:
            return None
        if resume is True:
            checkpoints = self.checkpoints()
            if not checkpoints:
                raise UserError(f"resume_from_checkpoint: {self.path} holds no complete checkpoint to continue from")
            return checkpoints[-1]
        folder = Path(resume)
        if not (folder / "trainer_state.json").is_file():
            raise UserError(f"resume_from_checkpoint: {folder} is not a checkpoint folder (no trainer_state.json)")
        return folder

    def check_usable(self, *, resume: bool | str | None, overwrite: bool, write: bool = True) -> None:
        """Refuse a folder that cannot be made or written to (it is made now, permissions alone do not tell), or holds
        an earlier run or a foreign file of the same name. Without `write` nothing is made, and permissions must do.
        Raises UserError.
        """
        if self.config.is_file() and not self.config.read_text("utf-8", "replace").startswith(CONFIG_HEADER):
            raise UserError(f"output_dir: {self.config} was not written by a run; choose another --output_dir")
        if self.card.is_file() and not self.card.read_text("utf-8", "replace").startswith("---\n"):
            raise UserError(f"output_dir: {self.card} is not a model card; choose another --output_dir")
        if not overwrite and not self._holds(self.find_checkpoint(resume)):
            self._check_no_earlier_run()
        if not write:
            existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
                raise UserError(f"output_dir: cannot write to {self.path}: {existing} is no folder to write in")
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise UserError(f"output_dir: cannot write to {self.path}: {error.strerror}") from error

    def _holds(self, checkpoint: Path | None) -> bool:
        """Whether a checkpoint is one of this run's own."""
        return checkpoint is not None and checkpoint.resolve().parent == self.path.resolve()

    def _check_no_earlier_run(self) -> None:
        if self.summary.is_file():
            raise UserError(
                f"output_dir: {self.path} already holds a finished run; give --overwrite to replace it, "
                "or another --output_dir"
            )
        if self.checkpoints():
            raise UserError(
                f"output_dir: {self.path} holds an unfinished run; continue it with --resume_from_checkpoint, "
                "or replace it with --overwrite"
            )

    @contextmanager
    def without_empty_leftovers(self) -> Iterator[None]:
        """Folders made inside, and left empty by a start that fails, are removed again."""
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            yield
        except BaseException:
            for folder in made:
                with suppress(OSError):  # it holds something by now, or was never made
                    folder.rmdir()
            raise

    def begin(self, *, checkpoint: Path | None, overwrite: bool) -> None:
        """Make the folder ready: a run that is new here starts without the files of an earlier one (without its
        checkpoints too, if `overwrite`), one that goes on here keeps the steps up to its checkpoint. Raises UserError
        where the folder cannot be made or written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.summary.unlink(missing_ok=True)
            if checkpoint is None or not self._holds(checkpoint):
                for file in (self.config, self.metrics, self.samples, self.probes, self.progress, self.report):
                    file.unlink(missing_ok=True)
                for entry in self.path.iterdir():
                    if overwrite and _CHECKPOINT.fullmatch(entry.name) and entry.is_dir():
                        shutil.rmtree(entry)
            else:
                last = checkpoint_step(checkpoint)
                for file in (self.metrics, self.samples, self.probes):
                    _keep_steps(file, last=last)
        except OSError as error:
            raise UserError(f"output_dir: cannot write to {self.path}: {error.strerror}") from error


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written. Raises UserError if its trainer state is damaged."""
    file = checkpoint / "trainer_state.json"
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"resume_from_checkpoint: {file} is damaged; resume from another checkpoint") from error


def _keep_steps(file: Path, *, last: int) -> None:
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except ValueError:
            continue  # the line that the stop cut off
        if step <= last:
            kept.append(line)
    file.write_text("".join(kept), encoding="utf-8")
