"""The fast scorer: one packed row for a whole batch, each prompt and image once per group, no [B, T, V] logits.

`add_shared_prompt_forward(model)` once; then `model(shared_prompt=pack(...), readout=readout)` wherever the model is
wrapped (DDP, FSDP, PEFT): the head is used inside the forward, and there is one forward a backward.
"""

import functools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cppo.perception import ResponseScores
from cppo.policy.attention import share_prompts
from cppo.policy.head import LanguageHead
from cppo.policy.loading import unwrapped
from cppo.policy.packing import PackedBatch, PackedRow, PromptGroup, pack

Readout = Callable[[Tensor, LanguageHead], dict[str, Tensor]]
"""(hidden states of the scored tokens [n, H], head) -> whatever the caller needs of them."""


def add_shared_prompt_forward(model: PreTrainedModel, cast_lm_head_to_fp32: bool = False) -> None:
    """Let `model(shared_prompt=batch, readout=readout)` run a packed batch and return what `readout` makes of it.

    The backbone runs over the batch's passes; then `readout` gets the hidden states of all scored tokens, in the order
    of `PackedBatch.tokens`, and the head. One pass for all views is the fast way. Of several with gradients, each is
    computed again in the backward pass, so that the memory in use peaks near that of one. Without `shared_prompt` the
    model's forward is the former one, TRL's fused head included, which must be added before; PEFT and other wrappers
    may come before or after.

    Args:
        model: a transformers vision-language model without wrappers, of a family that `unshared_reason` lets pass.
        cast_lm_head_to_fp32: as in TRL.
    """
    share_prompts(model)
    original_forward = model.forward

    # The signature stays: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        shared_prompt: PackedBatch | None = None,
        readout: Readout | None = None,
        **kwargs: Any,
    ) -> Any:
        if shared_prompt is None:
            return original_forward(*args, **kwargs)
        if readout is None:
            raise ValueError("shared_prompt is given without a readout: pass what to do with its hidden states")
        again = torch.is_grad_enabled() and sum(row.gradients for row in shared_prompt.passes) > 1

        def run(row: PackedRow) -> Tensor:
            if again and row.gradients:
                return checkpoint(_hidden_states, self, row, use_reentrant=False)
            with torch.set_grad_enabled(row.gradients and torch.is_grad_enabled()):
                return _hidden_states(self, row)

        return readout(torch.cat([run(row) for row in shared_prompt.passes]), LanguageHead(self, cast_lm_head_to_fp32))

    model.forward = MethodType(forward, model)


def shared_prompt_scores(
    model: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_response_tokens: int,
    temperature: float,
    groups: Sequence[PromptGroup],
) -> ResponseScores:
    """Score the last `num_response_tokens` tokens of each row, as `plain_scores` does, in one packed pass.

    Args:
        model: a model with `add_shared_prompt_forward`, or a wrapper around one.
        input_ids, attention_mask: [B, P + T]; prompts padded on the left, responses on the right.
        num_response_tokens: T.
        temperature: the logits are divided by it before anything is computed.
        groups: all rows, by the prompt that they answer.

    Returns:
        Log-probabilities and entropies, zero where `attention_mask` is; no logits.
    """
    batch = pack(unwrapped(model), input_ids, attention_mask, num_response_tokens, {"anchor": groups})

    def readout(hidden: Tensor, head: LanguageHead) -> dict[str, Tensor]:
        logps, entropies = head.scores(hidden, batch.targets, temperature)
        return {"logps": logps, "entropies": entropies}

    scores = model(shared_prompt=batch, readout=readout)
    everything = batch.tokens["anchor"]
    return ResponseScores(batch.unpack(everything, scores["logps"]), batch.unpack(everything, scores["entropies"]))


def _hidden_states(model: PreTrainedModel, row: PackedRow) -> Tensor:
    # The backbone is looked up on each call, since wrappers replace it. A ready 4-D mask keeps it from building one.
    outputs = model.base_model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=row.input_ids.device),
        use_cache=False,
        shared_prompt_layout=row.layout,
        **row.vision,
    )
    return row.scored_tokens(outputs.last_hidden_state)
