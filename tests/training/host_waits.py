"""Counts, on the CPU, where a host would wait for a GPU: where Python needs values that only the GPU knows.

Every tensor counts as the GPU's, except those made without a device, from such tensors alone, or by `cpu()` and
`to("cpu")`. The trainer's own device is an object that represents the GPU.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
}
"""Operations with a result, or its shape, that the host needs."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
"""These wait where an index is a mask: they count its true values."""
LISTED = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
"""On the CPU these dispatch no operation."""
MOVES = {Tensor.to, Tensor.cuda}
PACKAGES = ("cppo", "trl", "transformers", "accelerate")


class HostWaits(TorchFunctionMode):
    """Context: `places` counts the waits by the line that asks: "cppo/policy/packing.py:120 row"."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._operations = _Operations(self)
        self.quiet = False

    def of(self, *names: str) -> int:
        """The waits at places that hold one of these names."""
        return sum(count for place, count in self.places.items() if any(name in place for name in names))

    def count(self) -> None:
        if not self.quiet:
            self.places[_place(sys._getframe(2))] += 1

    def __enter__(self) -> "HostWaits":
        super().__enter__()
        self._operations.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operations.__exit__(*error)
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moved = kwargs.get("device") is not None or (function in MOVES and any(_is_device(arg) for arg in args[1:]))
        host = not moved and all(getattr(tensor, "on_host", False) for tensor in _tensors((args, kwargs)))
        if function in LISTED and not host:
            self.count()
        before, self.quiet = self.quiet, self.quiet or host
        try:
            result = function(*args, **kwargs)
        finally:
            self.quiet = before
        if host or function is Tensor.cpu or "cpu" in args[1:2]:
            return tree_map_only(Tensor, _mark, result)
        # A move on the CPU returns the tensor itself, which stays the host's.
        return result.view(result.shape) if moved and any(result is arg for arg in args) else result


class _Operations(TorchDispatchMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = function in INDEXED and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if function in WAITS or masked:
            self._waits.count()
        return function(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or value == "cpu"


def _mark(tensor: Tensor) -> Tensor:
    tensor.on_host = True
    return tensor


def _place(frame: FrameType | None) -> str:
    # By module: the folder of a checkout may have a package's name too.
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] in PACKAGES:
            return f"{module.replace('.', '/')}.py:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
