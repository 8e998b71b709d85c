"""The perception loss of `cppo` in float64, one row and view at a time, with only plain transformers and formulas."""

import math
from collections.abc import Sequence

import torch
from cpu_bed import micro  # noqa: F401  (the model as it is elsewhere)
from injected import EPOCH, SEED, TEMPERATURE, Group
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from cppo.assets import MICRO_DIR
from cppo.views import ViewSampler, stable_sample_id

WEIGHT, TAU, TOP_FRACTION, EPSILON = 0.01, 0.1, 0.5, 1e-6


class Policy:
    """The embedded model: distributions of response tokens, [T, V], of one row."""

    def __init__(self) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(MICRO_DIR, dtype=torch.float64).eval()
        self.processor = AutoProcessor.from_pretrained(MICRO_DIR)

    @torch.no_grad()
    def __call__(self, prompt: Tensor, images: Sequence[Image.Image], response: Tensor) -> Tensor:
        made = self.processor(text=[self.processor.image_token * len(images)], images=images, return_tensors="pt")
        ids = torch.cat([prompt, response])[None]
        logits = self.model(
            input_ids=ids,
            pixel_values=made["pixel_values"].double(),
            image_grid_thw=made["image_grid_thw"],
            mm_token_type_ids=(ids == self.model.config.image_token_id).long(),
        ).logits
        return logits[0, -len(response) - 1 : -1].div(TEMPERATURE).log_softmax(-1)


def perception(groups: Sequence[Group]) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Per gated-in rollout: the weighted mean loss of its perception tokens, and these tokens."""
    policy, sampler, losses, selected = Policy(), ViewSampler(SEED), {}, {}
    for place, group in enumerate(groups):
        name = group.sample_id or stable_sample_id([{"role": "user", "content": group.text}], group.images)
        pairs = [sampler.views(image, name, EPOCH, index) for index, image in enumerate(group.images)]
        for number, (response, advantage) in enumerate(zip(group.responses, group.advantages, strict=True)):
            if advantage <= 0 or len(set(group.rewards)) == 1:
                continue
            own, preserving, removing = (
                policy(group.prompt, images, response)
                for images in (group.images, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
            )
            chosen = _chosen(_entropy(own), _entropy(removing))
            selected[f"uid-{place}/{number}"] = chosen
            total = 0.0
            for token in chosen:
                sampled = response[token]
                log_ratios = [float(view[token, sampled] - own[token, sampled]) for view in (preserving, removing)]
                pull, push = (min(math.exp(ratio) - ratio - 1, 10.0) for ratio in log_ratios)
                total += math.log1p(math.exp((pull - push) / TAU))
            losses[f"uid-{place}/{number}"] = WEIGHT * total / max(len(chosen), 1)
    return losses, selected


def _entropy(log_probabilities: Tensor) -> list[float]:
    return (-(log_probabilities.exp() * log_probabilities).sum(-1)).tolist()


def _chosen(entropy: list[float], removing: list[float]) -> list[int]:
    scores = {
        token: (without - seen) / (without + EPSILON)
        for token, (seen, without) in enumerate(zip(entropy, removing, strict=True))
        if without > seen
    }
    best = sorted(scores, key=lambda token: -scores[token])
    return sorted(best[: max(1, math.floor(TOP_FRACTION * len(scores)))]) if scores else []
