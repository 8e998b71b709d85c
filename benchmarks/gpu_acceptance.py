"""Acceptance of a machine with a GPU: correct figures and costs. One call, at most 9 minutes.

    python benchmarks/gpu_acceptance.py --json acceptance.json
    python benchmarks/gpu_acceptance.py --parts A C --json acceptance.json
    python benchmarks/gpu_acceptance.py --tiny --json tiny.json

Nothing is downloaded: the 3B shape has random weights in bfloat16, made on the card. Part D holds them four times
there, 28 GiB, plus up to 12 GiB of activations; it frees gradients, 7 GiB if kept, as they come. The host holds none of
it: a few GiB are enough. The file is written after each part. A part that fails, or exceeds memory or its share of the
time, reports the reason, and the next part starts. `--tiny` runs every part on the CPU, in sizes without meaning for
speed, to check this script.

Exit status 0 if parts A, B, C, E and G ended with every checked figure within its bound, 1 if not, 2 without a GPU.
Times never decide, nor do parts D and F.
"""

import argparse
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTS = {
    "A": (2, "machine", "versions", "card and versions; varlen_attn and TRL's Triton kernel run"),
    "B": (3, "attention", "kernels", "attention kernels over packed rows of 12k and 33k tokens"),
    "C": (3, "micro", "same_rollouts", "the same rollouts on CPU and card, float32 and bfloat16"),
    "D": (10, "published_shape", "updates", "updates in the 3B shape: TRL's GRPO, shared GRPO, CPPO; the vision tower"),
    "E": (2, "published_shape", "rounding_floor", "bfloat16 floor: the same tokens packed alone and together"),
    "F": (4, "published_shape", "generation", "rollouts in the 3B shape, with and without shared prefill"),
    "G": (5, "micro", "divergences", "training with k3, kl and js"),
}
"""Letter -> share of the time, module in `gpu`, function, and title."""

UNCHECKED = "DF"
"""Parts without a bound, which do not decide."""


class OutOfTime(BaseException):
    """A part's time is over. Not an `Exception`, so that no library catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after this many seconds, once the current kernel call returns."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(letter: str, seconds: float, device: Any, tiny: bool) -> dict[str, Any]:
    """Figures and checks of one part, its duration in seconds, and the reason for an early end, if any."""
    import torch
    from gpu.part import Part

    from cppo.errors import one_line

    _, file, function, about = PARTS[letter]
    print(f"{letter}: {about} (at most {max(seconds, 0):.0f} s)", flush=True)
    part, reason, started = Part(device, tiny), None, time.monotonic()
    try:
        if seconds <= 0:
            raise OutOfTime
        measure = getattr(importlib.import_module(f"gpu.{file}"), function)  # from a cold disk this takes long, once
        with time_limit(seconds):
            measure(part)
    except OutOfTime:
        reason = f"its time is over: {max(seconds, 0):.0f} s"
    except Exception as error:  # a card or a library may raise anything, and the other parts still run
        traceback.print_exc()
        reason = one_line(error)
    if reason is not None:
        print(f"  ended early: {reason}", flush=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    taken = time.monotonic() - started
    return {"about": about, "reason": reason, "seconds": taken, "figures": part.figures, "checks": part.checks}


def no_cuda_reason() -> str | None:
    """Why torch cannot use a GPU, such as a driver that is too old for it; None if it can."""
    import torch

    from cppo.errors import one_line

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA fails an assertion
        return one_line(error)
    return None


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for every figure, written after each part")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--seconds", type=float, default=540, help="for all parts together (default 540)")
    parser.add_argument("--tiny", action="store_true", help="every part on the CPU, in tiny sizes")
    args = parser.parse_args(arguments)
    # Libraries read both during import. With several GPUs transformers would spread each batch over them.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    ends = time.monotonic() + args.seconds

    import torch

    from cppo.cli.parser import check_output_file
    from cppo.errors import UserError
    from cppo.files import replace_text

    try:
        check_output_file("--json", str(args.json))
    except UserError as error:
        parser.error(str(error))
    if not args.tiny and (reason := no_cuda_reason()) is not None:
        print(f"gpu_acceptance: torch sees no CUDA device: {reason}; --tiny runs on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.tiny else "cuda")
    if device.type == "cuda":
        # By default cuDNN convolves float32 with ten bits of precision; the CPU does not.
        torch.backends.cudnn.allow_tf32 = False
    chosen = [letter for letter in PARTS if letter in args.parts]
    result: dict[str, Any] = {"command": " ".join(["python", "benchmarks/gpu_acceptance.py", *arguments]), "parts": {}}
    for place, letter in enumerate(chosen):
        shares = [PARTS[later][0] for later in chosen[place:]]
        seconds = (ends - time.monotonic()) * shares[0] / sum(shares)
        result["parts"][letter] = run_part(letter, seconds, device, args.tiny)
        replace_text(args.json, json.dumps(result, indent=1) + "\n")
    parts = result["parts"]
    outside = [letter for letter, part in parts.items() if not all(check["holds"] for check in part["checks"])]
    early = [letter for letter, part in parts.items() if part["reason"] is not None]
    result["passed"] = not outside and not set(early) - set(UNCHECKED)
    result["host_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    replace_text(args.json, json.dumps(result, indent=1) + "\n")
    for letters, what in ((outside, "outside a bound"), (early, "ended early")):
        if letters:
            print(f"{what}: {', '.join(letters)}")
    print("passed" if result["passed"] else "FAILED")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
