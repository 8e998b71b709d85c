"""Probes: run a part of another library at the smallest scale to see whether it still works as CPPO needs."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache

import torch

from cppo.errors import one_line

Probe = Callable[..., None]
"""Runs a part of another library and raises, with the reason, unless it works as needed."""


@cache
def failure(probe: Probe, *arguments: str) -> str | None:
    """Why `probe(*arguments)` fails, in one line; None where it passes.

    It runs once per process, with gradients and at full precision in any context. The state of random generators is
    restored.
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
    """Make a probe fail with the reason `otherwise` unless it `acts`."""
    if not acts:
        raise RuntimeError(otherwise)
