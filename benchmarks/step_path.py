"""Number of source files that a micro-batch of `cppo` passes on its way to the loss.

Counts the source files of the package that the first step's micro-batch enters between the call of `_compute_loss` and
its return. The micro VLM trains on the CPU, without gradient checkpointing; the backward pass does not count. A
function, generator, property or decorator that starts or resumes enters its file. The output is the files in the order
of their first entry, and then

- stays: the entries, with consecutive ones in one file counted once;
- returns: stays in a file that was left before;
- climbs: calls of a file that waits further up the stack.

    python benchmarks/step_path.py --json step_path.json

On another checkout: `PYTHONPATH=OTHER/src python benchmarks/step_path.py --json other.json`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from same_weights import ONE_IMAGE, make_rows, make_trainer
from torch import Tensor

import cppo
from cppo import CPPOTrainer

PACKAGE = Path(cppo.__file__).parent


class EntryRecorder:
    """A profile function that records the file of each call in the package, and the number of climbs."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.climbs = 0

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        file = own_file(frame) if event == "call" else None
        if file is None:
            return
        self.entries.append(file)
        caller, *above = [*callers(frame), None]
        self.climbs += file != caller and file in above


def own_file(frame: FrameType) -> str | None:
    """The package file of a frame's code; None for other code."""
    file = Path(frame.f_code.co_filename)
    return str(file.relative_to(PACKAGE)) if file.is_relative_to(PACKAGE) else None


def callers(frame: FrameType) -> Iterator[str]:
    """The package's files that wait for the frame, nearest first."""
    above = frame.f_back
    while above is not None:
        file = own_file(above)
        if file is not None:
            yield file
        above = above.f_back


class RecordedTrainer(CPPOTrainer):
    """Records the entries of its first micro-batch."""

    recorder: EntryRecorder | None = None

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if self.recorder is not None:
            return super()._compute_loss(model, inputs)
        self.recorder = EntryRecorder()
        sys.setprofile(self.recorder)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            sys.setprofile(None)


def measure(method: str) -> dict[str, Any]:
    """Files in the order of their first entry, stays, returns and climbs of a micro-batch."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"method": method, "max_steps": 1}
        trainer = make_trainer(folder, make_rows(ONE_IMAGE), options, RecordedTrainer)
        trainer.train()
    assert isinstance(trainer, RecordedTrainer)
    assert trainer.recorder is not None
    stays = [file for file, _ in groupby(trainer.recorder.entries)]
    files = list(dict.fromkeys(stays))
    return {
        "method": method,
        "files": files,
        "stays": stays,
        "returns": len(stays) - len(files),
        "climbs": trainer.recorder.climbs,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--method", default="cppo")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(args.method)
    print("\n".join(found["files"]))
    counts = f"{len(found['stays'])} stays, {found['returns']} returns, {found['climbs']} climbs"
    print(f"{args.method}: {len(found['files'])} files, {counts}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
