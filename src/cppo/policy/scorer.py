"""Two scorers of rows: the plain one, simple and slow, is the reference; the packed one shares prompts."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from cppo.perception import ResponseScores, entropy_from_logits
from cppo.policy.loading import unwrapped
from cppo.policy.packed import LanguageHead
from cppo.policy.packing import PromptGroup, pack
from cppo.policy.similarity import TokenPlaces, similarities
from cppo.policy.vision_inputs import model_images, without_empty_images


def plain_scores(
    model: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_response_tokens: int,
    temperature: float,
    vision: Mapping[str, Any],
    compute_aux_loss: bool = False,
    hidden_states: bool = False,
    similar: Collection[str] = (),
    more_inputs: Mapping[str, Any] | None = None,
) -> ResponseScores:
    """Score the last `num_response_tokens` tokens of each row in one ordinary forward pass.

    Args:
        model: a transformers vision-language model (or a wrapper that forwards to one).
        input_ids: prompt and response, [B, P + T]; prompts padded on the left, responses on the right.
        attention_mask: 1 for real tokens, [B, P + T].
        num_response_tokens: T.
        temperature: divisor of the logits.
        vision: the processor's image inputs for these B rows.
        compute_aux_loss: compute a mixture-of-experts model's load-balancing loss.
        hidden_states: keep the head's inputs.
        similar: names of `cppo.perception.SIMILARITIES` to compute.
        more_inputs: the model's other inputs (`InsideRows`).

    Returns:
        Scores in float32, or float64 for a float64 model.
    """
    inputs = {**model_images(unwrapped(model).config, without_empty_images(vision)), **(more_inputs or {})}
    if compute_aux_loss:
        inputs["output_router_logits"] = True
    taken: list[Tensor] = []
    near = None
    with ExitStack() as hooks:
        if similar:
            places = TokenPlaces.of_rows(unwrapped(model), input_ids, num_response_tokens)
            near = hooks.enter_context(similarities(unwrapped(model), similar, [places]))
        if hidden_states:
            head = unwrapped(model).get_output_embeddings()
            hooks.callback(head.register_forward_pre_hook(lambda _, given: taken.append(given[0])).remove)
        outputs = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_to_keep=num_response_tokens + 1,
            use_cache=False,
            **inputs,
        )
    logits = outputs.logits[:, -num_response_tokens - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    targets = input_ids[:, -num_response_tokens:].unsqueeze(-1)
    logps = torch.log_softmax(logits, dim=-1).gather(-1, targets).squeeze(-1)
    aux_loss = outputs.aux_loss if compute_aux_loss else None
    hidden = taken[0][:, -num_response_tokens - 1 : -1] if hidden_states else None
    cosines = {} if near is None else near.of_rows(attention_mask, num_response_tokens)
    return ResponseScores(logps, entropy_from_logits(logits), logits, aux_loss, hidden, similarities=cosines)


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
        temperature: divisor of the logits.
        groups: all rows, by the prompt that they answer.

    Returns:
        Log-probabilities and entropies, zero where `attention_mask` is zero; no logits.
    """
    batch = pack(unwrapped(model), input_ids, attention_mask, num_response_tokens, {"anchor": groups})

    def readout(hidden: Tensor, head: LanguageHead) -> dict[str, Tensor]:
        logps, entropies = head.scores(hidden, batch.targets, temperature)
        return {"logps": logps, "entropies": entropies}

    scores = model(shared_prompt=batch, readout=readout)
    everything = batch.tokens["anchor"]
    return ResponseScores(batch.unpack(everything, scores["logps"]), batch.unpack(everything, scores["entropies"]))
