"""Pickles that would run code, in the files of a checkpoint: `python benchmarks/faults/payloads.py`.

A payload replaces each file that holds, or could hold, a pickle, in checkpoints of a run and of a run with LoRA: as a
plain pickle and as `torch.save` writes it. Each checkpoint gets a matching manifest, as an attacker would write it.
Then it is resumed from, evaluated and exported. Prints the figures of docs/results/reliability.md: payloads that ran,
and how the commands ended.

Measured with Python 3.11, torch 2.14.1, transformers 5.24 and trl 1.16, in about two minutes on two shared cores.
"""

import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import torch
from small_run import Started, train_command, versions, workplace

from cppo.checkpoints import write_manifest

STATES = ("rollout_state_0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
WEIGHTS = {
    "full": ("model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00001.bin"),
    "LoRA": ("adapter_model.safetensors", "adapter_model.bin"),
}


class Payload:
    """An object that makes the file `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def lay(checkpoint: Path, name: str, payload: Payload, zipped: bool) -> None:
    """Put the payload into a file; a file of weights replaces all other weights."""
    if any(name in names for names in WEIGHTS.values()):
        for other in (file for names in WEIGHTS.values() for file in names):
            (checkpoint / other).unlink(missing_ok=True)
    if name == "pytorch_model-00001-of-00001.bin":
        index = '{"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}'
        (checkpoint / "pytorch_model.bin.index.json").write_text(index)
    if zipped:
        torch.save(payload, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(payload))
    write_manifest(checkpoint, processes=1)


def main() -> None:
    print(versions(), flush=True)
    laid, ran, ended = 0, [], Counter[str]()
    with workplace() as folder:
        options = ("--max_steps", 2, "--probe_steps", 0, "--final_eval_samples", 0)
        for kind, more in (("full", ()), ("LoRA", ("--use_peft", "true"))):
            run = folder / kind
            started = Started(train_command(folder, run, *options, *more), folder / "log.txt")
            assert started.wait() == [0], started.log.read_text()
            (run / "summary.json").unlink()
            for name in (*STATES, *WEIGHTS[kind]):
                for zipped in (False, True):
                    laid += 1
                    marker, copy = folder / f"ran-{laid}", folder / "copy"
                    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint-2"))
                    checkpoint = copy / "checkpoint-1"
                    lay(checkpoint, name, Payload(marker), zipped)
                    commands = [train_command(folder, copy, *options, *more, "--resume_from_checkpoint", checkpoint)]
                    if name in WEIGHTS[kind]:
                        model = ["--model", str(checkpoint)]
                        commands = [
                            ["eval", *model, "--data", "tasks:digits?n=1", "--max_new_tokens", "2"],
                            ["export", *model, "--out", str(folder / "plain")],
                            *commands,
                        ]
                    for argv in commands:
                        started = Started(argv, folder / "log.txt")
                        (status,) = started.wait()
                        way = "traceback" if started.traceback() else f"status {status}"
                        ended[way] += 1
                        form = "torch.save" if zipped else "pickle"
                        print(f"{kind}, {name} by {form}: {argv[0]}: {way}: {started.said()[-1:]}", flush=True)
                    if marker.exists():
                        ran.append(name)
                    shutil.rmtree(copy)
                    shutil.rmtree(folder / "plain", ignore_errors=True)
    print(f"| {laid} | {ended.total()} | {len(ran)} | {dict(ended)} |")


if __name__ == "__main__":
    main()
