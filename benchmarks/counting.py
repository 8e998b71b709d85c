"""Cost of an update: counted FLOPs, bytes of live tensors, and seconds."""

import ctypes
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count
from transformers import TrainerCallback

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Options of glibc's `mallopt`."""
CLOCKS = {"time": time.process_time, "wall": time.perf_counter}


class PeakBytes(TorchDispatchMode):
    """Counts the live bytes of storages made in this context; `peak` is their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def _add(self, tensors: Any, made_here: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if made_here else 0
            if key not in self._known:
                self._known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A new argument was made outside: parameters and inputs are the baseline.
        self._add((args, kwargs), made_here=False)
        result = function(*args, **(kwargs or {}))
        self._add(result, made_here=True)
        return result


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""The CPU's attention kernel, which torch's counter skips: every query times every key, masked or not."""


def keep_freed_memory() -> None:
    """Let the C library keep freed memory, as allocators of GPU memory do (glibc only).

    Otherwise each large tensor is mapped again, and page faults take up to half of the time, most for large tensors.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26)):
            set_option(option, value)


@contextmanager
def stopwatch(found: dict[str, list[float]]) -> Iterator[None]:
    """Append the block's CPU seconds of the process and wall seconds to `found`."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found["cpu_seconds"].append(time.process_time() - cpu)
    found["wall_seconds"].append(time.perf_counter() - wall)


class StepClock(TrainerCallback):
    """CPU seconds (`time`) and wall seconds of every step except the first, and the tokens of its responses."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in CLOCKS}
        self.response_tokens: list[float] = []
        self._last: dict[str, float] = {}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = {name: clock() for name, clock in CLOCKS.items()}
        for name, started in self._last.items():
            self.seconds[name].append(now[name] - started)
        self._last = now

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        if "completions/mean_length" in logs:
            self.response_tokens.append(logs["completions/mean_length"])
