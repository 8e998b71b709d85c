"""One process of test_train_processes.py: `train_rank_job.py FOLDER BATCH RUN ...`, each run as JSON.

A run has the arguments of a `cppo train` (`argv`), and the options of FSDP2 (`fsdp`) where weights are sharded. One
that names a run to `resume` goes on from the checkpoint after its second step, in a copy of its folder. Held-out items
are answered BATCH together; all answers are written to FOLDER/answers.json, by run.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from accelerate import PartialState
from rank_job import ShardedTrainer

from cppo.cli import train
from cppo.recipes import RunDirectory
from cppo.runs import probes
from cppo.runs import run as run_module
from cppo.runs.prepare import build_trainer


def main() -> None:
    folder, batch, *runs = sys.argv[1:]
    torch.set_num_threads(1)
    answers: dict[str, list[list[str]]] = {}
    original = run_module.answer_all

    def noted(trainer, source, label, **asked):
        found = original(trainer, source, label, **asked)
        name = Path(trainer.args.output_dir).name
        answers.setdefault(name, []).append([text for item in found.items for text in item.responses])
        return found

    probes.EVALUATION_BATCH = int(batch)
    run_module.answer_all = probes.answer_all = noted
    for given in map(json.loads, runs):
        sharded = type("Sharded", (ShardedTrainer,), {"fsdp": given["fsdp"]}) if "fsdp" in given else None
        run_module.build_trainer = partial(build_trainer, trainer_class=sharded) if sharded else build_trainer
        argv = given["argv"]
        if "resume" in given:
            path = RunDirectory(argv[argv.index("--output_dir") + 1]).path
            if PartialState(cpu=True).is_main_process:
                shutil.copytree(path.with_name(given["resume"]), path)
            PartialState().wait_for_everyone()
            argv = [*argv, "--resume_from_checkpoint", str(path / "checkpoint-2")]
        train.run(argv)
    if PartialState().is_main_process:
        Path(folder, "answers.json").write_text(json.dumps(answers))
    PartialState().wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
