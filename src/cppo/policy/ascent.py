"""The view that depends on the policy: bounded gradient steps on the pixels raise the entropy of the responses.

Source: SaEI's entropy-guided adversarial sampling (arXiv 2512.10414); its constants were not found.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cppo.perception.selectors import select_band
from cppo.policy.packing import PromptGroup
from cppo.policy.scorer import plain_scores, shared_prompt_scores
from cppo.policy.vision_inputs import PER_TOKEN_KEYS, VisionInputs, concatenate_rows, packable


@dataclass(frozen=True)
class PixelSteps:
    """The gradient steps on the pixels.

    Attributes:
        steps: number of steps, at least 1.
        step: length of a step, in units of the pixels.
        bound: largest total change of a pixel.
        direction: "sign" of the gradient, or "normalized", over its root mean square.
    """

    steps: int
    step: float
    bound: float
    direction: str = "sign"

    def taken(self, pixels: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """The pixels after the steps, which raise the objective. Pixels without a gradient stay exactly the same."""
        moved = pixels
        for _ in range(self.steps):
            point = moved.detach().requires_grad_()
            with torch.enable_grad():
                value = objective(point)
                (gradient,) = torch.autograd.grad(value, point) if value.requires_grad else (torch.zeros_like(point),)
            if self.direction == "sign":
                way = gradient.sign()
            else:
                way = gradient / gradient.square().mean().sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
            moved = pixels + (moved + self.step * way - pixels).clamp(-self.bound, self.bound)
        return moved.detach()


def band_entropy(entropies: Tensor, response_mask: Tensor, band: Sequence[float]) -> Tensor:
    """Mean over rollouts of the mean entropy of their tokens between two quantiles of it, in nats; a scalar.

    entropies, response_mask: [n, T]. A rollout without such a token counts as 0. Source: SaEI (arXiv 2512.10414):
    tokens of middle entropy are neither facts (low) nor noise (high).
    """
    low, high = band
    chosen = select_band(entropies.detach(), response_mask, low, high)
    sums = entropies.masked_fill(~chosen, 0.0).sum(dim=1)
    return (sums / chosen.sum(dim=1).clamp(min=1)).mean()


def ascended(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_response_tokens: int,
    vision: VisionInputs,
    steps: PixelSteps,
    band: Sequence[float],
    temperature: float,
    shares_prompts: bool,
) -> VisionInputs:
    """The image inputs of a prompt after steps that raise the entropy of its rollouts (`band_entropy`).

    Args:
        model: the transformers model itself; no parameter gets a gradient.
        input_ids, attention_mask: the prompt and its rollouts, [n, P + T].
        num_response_tokens: T.
        vision: of the prompt, one row (`slice_rows`).
        temperature: of the rollouts.
        shares_prompts: whether the model has `add_shared_prompt_forward`.
    """
    mask = attention_mask[:, -num_response_tokens:]
    rows = (model, input_ids, attention_mask, num_response_tokens, temperature)
    own = {key: value.to(input_ids.device) if isinstance(value, Tensor) else value for key, value in vision.items()}

    def entropy(pixels: Tensor) -> Tensor:
        shown = {**own, "pixel_values": pixels}
        if shares_prompts:
            group = PromptGroup(list(range(len(input_ids))), packable(model.config, shown))
            scores = shared_prompt_scores(*rows, [group])
        else:
            parts = {key: _with_responses(key, value, num_response_tokens) for key, value in shown.items()}
            scores = plain_scores(*rows, concatenate_rows([parts] * len(input_ids)))
        return band_entropy(scores.entropies, mask, band)

    return {**own, "pixel_values": steps.taken(own["pixel_values"], entropy)}


def _with_responses(key: str, value: Any, length: int) -> Any:
    """Per-token inputs of a prompt, [1, P], extended to prompt and response."""
    return torch.nn.functional.pad(value, (0, length)) if key in PER_TOKEN_KEYS else value
