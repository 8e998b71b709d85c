"""The processes of a launcher (`torchrun`, `accelerate launch`) that share one evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from cppo.errors import UserError, first_line, one_line

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others. A launcher ends all processes when one fails."""


@dataclass(frozen=True)
class Processes:
    """The number of processes that share the work, and the index of this one. `ALONE` is a single process.

    Attributes:
        sharded: each process holds a part of the model's weights, so no process can run the model alone.
    """

    count: int = 1
    index: int = 0
    sharded: bool = False

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """The result of `work` in each process, in order; every process gets the whole list.

        Raises the error of `work` in this process. Raises UserError if it failed in another process, or one has ended.
        With sharded weights the others wait in the model, and learn of a failure when this process ends.
        """
        if self.count == 1:
            return [work()]
        failure: Exception | None = None
        mine: T | None = None
        try:
            mine = work()
        except Exception as error:
            if self.sharded:
                raise
            failure = error
        told = None if failure is None else one_line(failure)
        found = self._exchange(lambda: gather_object([(mine, told)]))
        if failure is not None:
            raise failure
        for index, (_, reason) in enumerate(found):
            if reason is not None:
                raise UserError(f"process {index} of {self.count} failed: {reason}")
        return [result for result, _ in found]

    def from_first(self, value: T) -> T:
        """The first process's value, in every process. Raises UserError if a process has ended."""
        if self.count == 1:
            return value
        return self._exchange(lambda: broadcast_object_list([value])[0])

    def _exchange(self, exchange: Callable[[], Any]) -> Any:
        try:
            return exchange()
        except RuntimeError as error:
            raise UserError(f"another process has ended: {first_line(error)}") from error


ALONE = Processes()


def join_processes(device: str, launched: int) -> tuple[Processes, str]:
    """Join the processes of a launcher, and take this process's own device.

    Args:
        device: "cpu" or "cuda"; a single process may name one GPU.
        launched: number of processes.

    Raises:
        UserError: there is not one such device for each process.
    """
    if launched == 1:
        return ALONE, device
    here = f"--device {device}: {launched} processes"
    if ":" in device:
        raise UserError(f"{here} take a GPU each; give `{device.partition(':')[0]}`")
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    if state.num_processes != launched:
        raise UserError(f"{here} cannot work together on it; give --device cpu")
    if device == "cuda" and state.local_process_index >= torch.cuda.device_count():
        raise UserError(f"{here}, but {torch.cuda.device_count()} GPUs; start one process a GPU")
    return Processes(state.num_processes, state.process_index), "cpu" if device == "cpu" else str(state.device)
