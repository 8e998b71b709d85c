"""`cppo COMMAND ...`: run the command's module, and turn a user's mistake into one line and exit status 2."""

import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from cppo import __version__
from cppo.errors import Stopped, UserError, choose_one, one_line, tell, tell_mistake
from cppo.progress import Progress
from cppo.verl.versions import installed

COMMANDS = {
    "init": "write a commented recipe for your data, model and machine",
    "train": "train a vision-language model with CPPO or another method",
    "sft": "supervised fine-tuning on reference responses",
    "compare": "compare methods over seeds and tasks from one start checkpoint",
    "eval": "accuracy, pass@k and format rate of a model on data or benchmarks, and its perception card",
    "export": "write a run or checkpoint as a plain model folder, adapters merged",
    "inspect": "show which response tokens depend on the image",
    "report": "write a run's report, or compare several runs on one page",
    "plan": "estimate the memory of training on each GPU, and what fits",
    "views": "show the views of images: what is kept, what is removed",
    "data": "check data and name unusable rows; rate rows by a model",
    "verl-config": "write a recipe as options of verl, for more than one node",
    "verl-data": "write data as the Parquet file that verl trains from",
    "methods": "list the methods, or show the options of one",
    "doctor": "print versions, devices, kernels and what is missing, to paste into an issue",
    "recipes": "list the packaged recipes, studies and launch configurations, or copy one to edit",
}
OF_SEVERAL_PROCESSES = {"train", "sft", "eval", "data rate"}
"""The commands that a launcher may start; the others would do all of their work once in every process."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
BESIDE_VERL = (
    "in this environment `python -m cppo.verl` trains, inside verl; this command needs TRL, in an environment of its "
    "own: pip install -c constraints.txt -e . (docs/reference/versions.md)"
)
LEANED_ON = ("accelerate", "peft", "torch", "transformers", "trl")
"""Packages that may lack a name that is imported from them in another version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0, 2 after a user's mistake, 130 after Ctrl-C, 128 + N after signal N, 141 if nobody reads.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with it closed (`>&-`)
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    try:
        status = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return status
    except UserError as error:
        tell_mistake(error)
        return 2
    except Stopped as stop:
        tell(f"stopped by {signal.Signals(stop.number).name}")
        return 128 + stop.number
    except KeyboardInterrupt:
        tell("stopped")
        return 130
    except BrokenPipeError:
        # A reader such as `head` has stopped reading. The interpreter would complain about unwritten output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RuntimeError as error:
        if not _lost_another_process(error):
            raise
        lost = UserError("another process of this run has ended, so this one ends too; its own message says why")
        tell_mistake(lost, is_cause=False)
        return 2
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in LEANED_ON:
            raise
        beside_verl = error.name == "trl" and installed("verl") is not None
        remedy = BESIDE_VERL if beside_verl else "install the versions that docs/reference/versions.md names"
        tell_mistake(UserError(f"{one_line(error)}; {remedy}"))
        return 2
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        where = error.filename or "a file"
        again = (
            "free some space, then run the command again (a run with a checkpoint: with --resume_from_checkpoint true)"
        )
        tell_mistake(UserError(f"{where} cannot be written: {error.strerror}; {again}"))
        return 2


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"cppo {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        raise UserError(f"unknown command `{command}`; {choose_one(command, COMMANDS)}")
    if not {command, " ".join(argv[:2])} & OF_SEVERAL_PROCESSES and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UserError(f"`cppo {command}` runs in one process: start it without accelerate launch or torchrun")
    try:
        with Progress(desc=f"cppo {command}"):
            importlib.import_module(f"cppo.cli.{command.replace('-', '_')}").run(rest)
        _close_process_group()
    except SystemExit as exit_:  # argparse exits this way after --help
        return int(exit_.code or 0)
    return 0


def _lost_another_process(error: RuntimeError) -> bool:
    """Whether communication between processes failed. Gloo, on CPUs, has no error class of its own."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available():
        return False
    return isinstance(error, distributed.DistError) or "/gloo/transport/" in str(error)


def _close_process_group() -> None:
    """A process that ends with its group's threads still running can abort; torchrun then reports a failed run."""
    distributed = sys.modules.get("torch.distributed")  # not imported for this: most commands start without torch
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _overview() -> str:
    lines = [
        "cppo fine-tunes a vision-language model with reinforcement learning and a loss meant to teach it to look.",
        "",
        "usage: cppo COMMAND [options]",
        "",
        *(f"  {name:<11} {summary}" for name, summary in COMMANDS.items()),
        "",
        "`cppo COMMAND --help` shows a command's options. `cppo train` alone trains the embedded micro model.",
    ]
    return "\n".join(lines)
