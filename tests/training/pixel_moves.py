"""Number of image patches that move to the trainer's device at a time."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class PixelMoves(TorchFunctionMode):
    """Records the patches of this size in each call of `Tensor.to` to a device; a copy stays on the host."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values
        self.patches: list[int] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_device = any(isinstance(value, torch.device) for value in (*args[1:], kwargs.get("device")))
        if function is torch.Tensor.to and to_device and args[0].shape[1:] == (self.values,):
            self.patches.append(len(args[0]))
        return function(*args, **kwargs)
