"""The perception term's share of the gradient norm."""

import math

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor


class GradientShare:
    """Collects the perception term's gradient over the micro-batches of one optimizer step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._grads = [torch.zeros_like(parameter) for parameter in self._parameters]

    def add(self, weighted_term: Tensor) -> None:
        """Add the gradient of a micro-batch's weighted perception term; its graph is kept for the backward pass."""
        grads = torch.autograd.grad(weighted_term, self._parameters, retain_graph=True, allow_unused=True)
        for total, grad in zip(self._grads, grads, strict=True):
            if grad is not None:
                total += grad

    def value(self, accelerator: Accelerator) -> float:
        """`|g_perception| / (|g_perception| + |g_rest|)`, a fraction; the rest is the whole gradient less this one.

        To be read after the step's last backward pass and before its clipping. NaN if both are zero.
        """
        scaler = getattr(accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        perception, rest = [], []
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            if accelerator.distributed_type != DistributedType.NO:
                grad = accelerator.reduce(grad, "mean")
            whole = torch.zeros_like(grad) if parameter.grad is None else parameter.grad / scale
            perception.append(grad.float().norm())
            rest.append((whole - grad).float().norm())
        norm = torch.stack(perception).norm().item()
        total = norm + torch.stack(rest).norm().item()
        return norm / total if total else math.nan
