"""Part B: attention kernels over a packed micro-batch, against softmax in float64, with their times."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from gpu.part import Part, relative_difference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cppo.errors import one_line
from cppo.policy import packed
from cppo.policy.packing import SharedPromptLayout

HEADS, KEY_HEADS, HEAD_SIZE = 16, 2, 128
SCALING = HEAD_SIZE**-0.5
VIEWS, GENERATIONS, PROMPT = 3, 5, 1158
RESPONSES = {"12k": 600, "33k": 2000}
"""Response tokens of a rollout; with three views of a group they give packed rows of this length."""
BOUNDS = {torch.bfloat16: 0.02, torch.float32: 1e-4}
"""Bounds of a difference, as a multiple of the length: several roundings of 2^-9, or of 2^-24."""
RUNS = 5
TRAINING = ("varlen where it runs", "padded, as torch picks")
"""The kernels of training: they must run."""

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values [1, heads, N, D] of a packed row; outputs [N, heads, D]."""
Context = Callable[[], AbstractContextManager]
"""Makes the context that the kernel must run in."""


def kernels(part: Part) -> None:
    """Outputs and the queries' gradients of each kernel, and milliseconds of forward and backward together.

    The first call is timed separately: cuDNN builds a graph for each shape. A kernel that refuses gives the reason.
    """
    prompt, responses = (12, {"tiny": 6}) if part.tiny else (PROMPT, RESPONSES)
    for name, response in responses.items():
        groups = [view for view in range(VIEWS) for _ in range(GENERATIONS)]
        layout = SharedPromptLayout.of([prompt - 1] * VIEWS, [response] * len(groups), groups, part.device)
        problem = Problem.random(layout, part.device, torch.float32 if part.tiny else torch.bfloat16)
        places, expected = problem.expected()
        for kernel, (context, function) in _kernels(layout).items():
            _measure(part, f"{kernel}, {name}", partial(problem.run, function, context), places, expected)
            if kernel in TRAINING:
                reason = part.figures[f"{kernel}, {name}"].get("reason")
                part.require(f"{kernel}, {name}: runs", reason)


def _measure(
    part: Part, label: str, run: Callable[[], dict[str, Tensor]], places: Tensor, expected: dict[str, Tensor]
) -> None:
    try:
        first = part.seconds(run)
        found = run()
        times = {"first_ms": 1e3 * first, "ms": 1e3 * part.median_seconds(run, RUNS)}
    except RuntimeError as error:
        part.found(label, reason=one_line(error))
        return
    part.found(label, **times)
    for name, values in found.items():
        part.check(f"{label}: {name}", relative_difference(values[places], expected[name]), BOUNDS[values.dtype])


@dataclass(frozen=True)
class Problem:
    """Queries, keys and values of a packed row, [1, heads, N, D], and the gradient of its outputs, [N, heads, D]."""

    layout: SharedPromptLayout
    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor

    @classmethod
    def random(cls, layout: SharedPromptLayout, device: torch.device, dtype: torch.dtype) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        query, key, value, gradient = (
            torch.randn((1, heads, layout.num_tokens, HEAD_SIZE), generator=generator).to(device, dtype)
            for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
        )
        inputs = (tensor.requires_grad_() for tensor in (query, key, value))
        return cls(layout, *inputs, gradient[0].transpose(0, 1).contiguous())

    def run(self, kernel: Kernel, context: Context) -> dict[str, Tensor]:
        """Outputs and the queries' gradients, [N, heads, D] each."""
        self.query.grad = None
        with context():
            outputs = kernel(self.query, self.key, self.value)
            outputs.backward(self.gradient)
        assert self.query.grad is not None
        return {"output": outputs.detach(), "query_gradient": self.query.grad[0].transpose(0, 1)}

    def expected(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Indices of the last rollout's T tokens; outputs and gradients there, by softmax in float64, [T, heads, D]."""
        places, owner = self.layout.segments[-1], self.layout.prompt_of_segment[-1]
        seen = torch.cat([self.layout.prompts[owner], places])
        query = self.query.detach()[0][:, places].double().requires_grad_()
        groups = HEADS // KEY_HEADS
        key, value = (
            tensor.detach()[0][:, seen].double().repeat_interleave(groups, dim=0) for tensor in (self.key, self.value)
        )
        length = len(places)
        later = torch.ones(length, len(seen), dtype=torch.bool, device=query.device).triu(len(seen) - length + 1)
        scores = (query @ key.transpose(1, 2) * SCALING).masked_fill(later, float("-inf"))
        outputs = (scores.softmax(dim=-1) @ value).transpose(0, 1)
        (gradient,) = torch.autograd.grad(outputs, query, self.gradient[places].double())
        return places, {"output": outputs.detach(), "query_gradient": gradient.transpose(0, 1)}


def _kernels(layout: SharedPromptLayout) -> dict[str, tuple[Context, Kernel]]:
    """By name. torch's flash attention takes no mask, so it runs one row per rollout, as TRL does."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed.packed_attention(query, key, value, layout, SCALING)[0]

    def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with patch.object(packed, "no_varlen_reason", return_value="this kernel is measured"):
            return attend(query, key, value)

    def rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _unshared(query, key, value, layout)

    efficient, cudnn, flash = (
        partial(sdpa_kernel, backend)
        for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    )
    return {
        TRAINING[0]: (nullcontext, attend),
        TRAINING[1]: (nullcontext, padded),
        "padded, efficient": (efficient, padded),
        "padded, cuDNN": (cudnn, padded),
        "a row a rollout, flash": (flash, rows),
        "a row a rollout, cuDNN": (cudnn, rows),
    }


def _unshared(query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout) -> Tensor:
    """Attention with the prompt repeated before each response; a prompt's own outputs come from its first row."""
    places = torch.cat([layout.prompts[layout.prompt_of_segment], layout.segments], dim=1)
    groups = HEADS // KEY_HEADS
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    taken = (tensor[0][:, places].transpose(0, 1) for tensor in (query, key, value))
    outputs = scaled_dot_product_attention(*taken, is_causal=True, scale=SCALING).transpose(1, 2)
    prompt = layout.prompts.shape[1]
    return layout.packed(outputs[::GENERATIONS, :prompt], outputs[:, prompt:])
