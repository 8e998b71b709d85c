"""Which of three ways scores the response tokens of rows as they are: packed, with whole logits, or by TRL's kernel."""

import math
from typing import Any

import torch
from torch import Tensor

from cppo.policy import ResponseScores, plain_scores, shared_prompt_scores, takes_images_a_row, unwrapped
from cppo.policy.vision_inputs import VisionInputs
from cppo.training.view_scoring import Score


def row_scorer(
    trainer: Any,
    model: Any,
    num_response_tokens: int,
    *,
    compute_entropy: bool = True,
    compute_aux_loss: bool = False,
    shares: bool = False,
) -> Score:
    """What scores rows with this trainer's options.

    Args:
        model: policy or reference.
        num_response_tokens: T, at the end of each row.
        shares: whether the rows are to be packed, each prompt and image once per group.
    """

    def shared(input_ids: Tensor, attention_mask: Tensor, vision: VisionInputs) -> ResponseScores:
        with trainer.accelerator.autocast():
            return shared_prompt_scores(
                model, input_ids, attention_mask, num_response_tokens, trainer.temperature, vision
            )

    def plain(input_ids: Tensor, attention_mask: Tensor, vision: VisionInputs) -> ResponseScores:
        with trainer.accelerator.autocast():
            return plain_scores(
                model, input_ids, attention_mask, num_response_tokens, trainer.temperature, vision, compute_aux_loss
            )

    def kernel(input_ids: Tensor, attention_mask: Tensor, vision: VisionInputs) -> ResponseScores:
        logps, entropies, aux_loss = trainer._kernel_scores(
            model,
            input_ids,
            attention_mask,
            num_response_tokens,
            compute_entropy=compute_entropy,
            compute_aux_loss=compute_aux_loss,
            **vision,
        )
        # TRL's head on a reference model knows no entropies.
        return ResponseScores(logps, entropies if compute_entropy else torch.full_like(logps, math.nan), None, aux_loss)

    if shares:
        return shared
    # Exact divergences are taken where entropies are: reference and old log-probabilities need neither. TRL's function
    # cannot be told the number of images in each row, which LLaVA-OneVision needs.
    whole = trainer.args.scorer == "plain" or (trainer.args.needs_logits and compute_entropy)
    return plain if whole or takes_images_a_row(unwrapped(model).config) else kernel
