"""Whether a part of another library still acts as CPPO needs it, found out by running it at the smallest scale."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache

import torch

from cppo.errors import one_line

Probe = Callable[..., None]
"""Runs a part of another library and raises, with the reason, unless it acts as needed."""


@cache
def failure(probe: Probe, *arguments: str) -> str | None:
    """Why `probe(*arguments)` finds that a part does not act, in one line; None where it acts.

    It runs once a process, with gradients and at full precision, whatever holds where it is asked for. Random numbers
    are drawn afterwards as if it had not run.
    """
    try:
        with ExitStack() as conditions:
            conditions.enter_context(torch.random.fork_rng(devices=[]))
            conditions.enter_context(torch.device("cpu"))
            conditions.enter_context(torch.inference_mode(False))
            conditions.enter_context(torch.enable_grad())
            for device in ("cpu", "cuda"):
                conditions.enter_context(torch.autocast(device, enabled=False))
            probe(*arguments)
    except Exception as error:
        return one_line(error)
    return None


def expect(acts: bool, otherwise: str) -> None:
    """Let a probe fail with the reason `otherwise` unless it `acts`."""
    if not acts:
        raise RuntimeError(otherwise)
