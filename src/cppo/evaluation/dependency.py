"""Score given responses under an image, and how much their tokens depend on it, in batches."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cppo.data import Record, chat_messages
from cppo.evaluation.generate import generate_tokens, prompt_inputs
from cppo.perception import DEPENDENCY_SCORES, ResponseScores, dependency_score
from cppo.policy import plain_scores
from cppo.policy.vision_inputs import PER_TOKEN_KEYS
from cppo.views import ViewSampler


@dataclass(frozen=True)
class ScoredResponses:
    """Greedy responses to B records, and how much their tokens depend on the images.

    Attributes:
        rows: each response's token ids.
        mask: True for response tokens, False for padding on the right, [B, T].
        scores: by the name of the sampler of I-, then by the name of the dependency score, [B, T].
    """

    rows: list[list[int]]
    mask: Tensor
    scores: dict[str, dict[str, Tensor]]


def score_dependency(
    model: Any,
    processor: Any,
    records: Sequence[Record],
    samplers: Mapping[str, ViewSampler],
    *,
    max_new_tokens: int,
    system_prompt: str | None = None,
) -> ScoredResponses:
    """Answer records in one batch, and compute every dependency score under the I- of each of `samplers`."""
    prompts = [chat_messages(record.prompt, system_prompt) for record in records]
    inputs = prompt_inputs(processor, prompts, [list(record.images) for record in records])
    rows = generate_tokens(model, processor, inputs, max_new_tokens=max_new_tokens)
    anchor = score_responses(model, inputs, rows, temperature=1.0)
    scores = {}
    for name, sampler in samplers.items():
        removed = [
            [sampler.views(image, record.id, 0, index)[1] for index, image in enumerate(record.images)]
            for record in records
        ]
        removing = score_responses(model, prompt_inputs(processor, prompts, removed), rows, temperature=1.0)
        scores[name] = {score: dependency_score(score, anchor, removing) for score in DEPENDENCY_SCORES}
    return ScoredResponses(rows, padded_mask(rows).to(anchor.logps.device), scores)


@torch.no_grad()
def score_responses(
    model: Any,
    prompt: Any,
    rows: Sequence[list[int]],
    temperature: float,
    hidden_states: bool = False,
    similar: Collection[str] = (),
) -> ResponseScores:
    """Scores [B, T] and logits [B, T, V] of responses to `prompt_inputs`; padding follows a response."""
    inputs = dict(prompt.to(model.device).items())
    length = max(map(len, rows))
    padded = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows], device=model.device)
    ids = torch.cat([inputs.pop("input_ids"), padded], dim=1)
    mask = torch.cat([inputs.pop("attention_mask"), padded_mask(rows).to(model.device).long()], dim=1)
    for key in PER_TOKEN_KEYS:
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.zeros_like(padded)], dim=1)
    return plain_scores(model, ids, mask, length, temperature, inputs, hidden_states=hidden_states, similar=similar)


def padded_mask(rows: Sequence[list[int]]) -> Tensor:
    """True for response tokens, False for padding on the right, [B, T]."""
    lengths = torch.tensor([len(row) for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]
