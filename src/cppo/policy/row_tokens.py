"""The tokens of a batch's rows, as lists on the host."""

from torch import Tensor


def rows_on_host(
    input_ids: Tensor, attention_mask: Tensor, num_response_tokens: int
) -> tuple[list[list[int]], list[int]]:
    """The prompt of each row of [B, P + T], and the length of its response."""
    end = input_ids.shape[1] - num_response_tokens
    masks: list[list[int]] = attention_mask.tolist()
    prompts = [
        [token for token, kept in zip(ids, mask, strict=True) if kept]
        for ids, mask in zip(input_ids[:, :end].tolist(), (mask[:end] for mask in masks), strict=True)
    ]
    return prompts, [sum(mask[end:]) for mask in masks]
