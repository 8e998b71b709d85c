"""The peak of a process's memory, of the GPU where it trains on one."""

import threading

import psutil
import torch

POLL_SECONDS = 0.005


class PeakMemory:
    """Peak since the last `reset`, in bytes: PyTorch's allocations on a GPU, or the process's resident memory on a CPU.

    A thread of this context reads resident memory every few milliseconds, so a shorter peak can be missed; what the
    allocator keeps after it was freed counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._process = psutil.Process()
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self.reset()
        if self._device is None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def reset(self) -> None:
        """Begin again from what is in use now."""
        self._peak = 0
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> int:
        """The peak since the last reset."""
        if self._device is not None:
            return torch.cuda.max_memory_allocated(self._device)
        return max(self._peak, self._process.memory_info().rss)

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)
