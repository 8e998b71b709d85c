"""Who sees whom in a packed row: a rollout sees its prompt and itself, and the prompt is there once for all of them.

A packed row holds N tokens without padding: first every prompt but its last token, then for every rollout one
segment, the prompt's last token followed by the response but its last token. Each segment token predicts one response
token. Attention over the row costs (sum of R x (P + R)) instead of (sum of all tokens) squared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedPromptLayout:
    """Index tensors of a packed row with Q prompts of at most P tokens and S segments of at most T tokens.

    Attributes:
        prompts: place of each prompt's tokens in the row, [Q, P]; filled up with 0 at the end.
        segments: place of each segment's tokens in the row, [S, T]; filled up with 0 at the end.
        prompt_of_segment: [S].
        prompt_valid: which keys of its prompt a segment sees, bool [S, P], or [1, P] where prompts are equally long.
        unpadded: place of each of the row's tokens in the flattened `prompts` followed by the flattened `segments`,
            [N]; None where nothing is padded and the order is already the row's.
        keys: the row's places that each prompt and then each segment sees, one after the other, for kernels of
            variable length.
        cu_seqlens_q, cu_seqlens_k: where the queries and keys of each prompt and then of each segment start, and
            where the last end, int32 [Q + S + 1].
        max_seqlen_q, max_seqlen_k: the most queries and keys of any of them.
        num_prompt_tokens: tokens of all prompts together; the segments start here.
        biases: float masks, by dtype, made once for all layers.
    """

    prompts: Tensor
    segments: Tensor
    prompt_of_segment: Tensor
    prompt_valid: Tensor
    unpadded: Tensor | None
    keys: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    num_prompt_tokens: int
    biases: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        prompt_lengths: Sequence[int],
        segment_lengths: Sequence[int],
        prompt_of_segment: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> "SharedPromptLayout":
        """The layout of prompts and segments of these lengths (a prompt may be empty, a segment not)."""
        num_prompt_tokens = sum(prompt_lengths)
        owners = torch.as_tensor(list(prompt_of_segment), dtype=torch.long)
        prompts, prompt_valid = _padded_places(prompt_lengths, 0)
        segments, segment_valid = _padded_places(segment_lengths, num_prompt_tokens)
        valid = torch.cat([prompt_valid.flatten(), segment_valid.flatten()])
        visible_prompt = prompt_valid[:1] if bool(prompt_valid.all()) else prompt_valid[owners]
        keys = [prompts[q, :length] for q, length in enumerate(prompt_lengths)]
        key_lengths = list(prompt_lengths)
        for s, (q, length) in enumerate(zip(prompt_of_segment, segment_lengths, strict=True)):
            keys += [prompts[q, : prompt_lengths[q]], segments[s, :length]]
            key_lengths.append(prompt_lengths[q] + length)
        query_lengths = [*prompt_lengths, *segment_lengths]
        return cls(
            prompts.to(device),
            segments.to(device),
            owners.to(device),
            visible_prompt.to(device),
            None if bool(valid.all()) else valid.nonzero().squeeze(1).to(device),
            torch.cat(keys).to(device),
            _cu_seqlens(query_lengths).to(device),
            _cu_seqlens(key_lengths).to(device),
            max(query_lengths),
            max(key_lengths),
            num_prompt_tokens,
        )

    @property
    def num_tokens(self) -> int:
        """N, tokens of the packed row."""
        return self.prompts.numel() + self.segments.numel() if self.unpadded is None else self.unpadded.numel()

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to a segment's attention scores over `prompt + own tokens`: 0 where visible, else -inf.

        [S, 1, T, P + T], or [1, 1, T, P + T] where all prompts are equally long. Kernels of variable length need none.
        """
        if dtype not in self.biases:
            length, device = self.segments.shape[1], self.prompt_valid.device
            own = torch.ones(length, length, dtype=torch.bool, device=device).tril()
            parts = (self.prompt_valid[:, None].expand(-1, length, -1), own.expand(len(self.prompt_valid), -1, -1))
            visible = torch.cat(parts, dim=2)[:, None]
            zeros = torch.zeros(visible.shape, dtype=dtype, device=device)
            self.biases[dtype] = zeros.masked_fill(~visible, float("-inf"))
        return self.biases[dtype]

    def padded_prompts(self, tokens: Tensor) -> Tensor:
        """Of the packed row's tokens [N, ...] those of each prompt, [Q, P, ...]; padding holds arbitrary tokens."""
        if self.unpadded is None:
            return tokens[: self.num_prompt_tokens].unflatten(0, self.prompts.shape)
        return tokens.index_select(0, self.prompts.flatten()).unflatten(0, self.prompts.shape)

    def padded_segments(self, tokens: Tensor) -> Tensor:
        """Of the packed row's tokens [N, ...] those of each segment, [S, T, ...]; padding holds arbitrary tokens."""
        if self.unpadded is None:
            return tokens[self.num_prompt_tokens :].unflatten(0, self.segments.shape)
        return tokens.index_select(0, self.segments.flatten()).unflatten(0, self.segments.shape)

    def packed(self, prompts: Tensor, segments: Tensor) -> Tensor:
        """Put padded prompts [Q, P, ...] and segments [S, T, ...] back into the order of the packed row, [N, ...]."""
        tokens = torch.cat([prompts.flatten(0, 1), segments.flatten(0, 1)])
        return tokens if self.unpadded is None else tokens.index_select(0, self.unpadded)


def _padded_places(lengths: Sequence[int], start: int) -> tuple[Tensor, Tensor]:
    """Places of consecutive pieces that begin at `start`, [pieces, longest], and which of them are no padding."""
    sizes = torch.as_tensor(list(lengths), dtype=torch.long)
    offsets = torch.arange(int(sizes.max()))
    valid = offsets < sizes[:, None]
    places = start + (sizes.cumsum(0) - sizes)[:, None] + offsets
    return places.masked_fill(~valid, 0), valid


def _cu_seqlens(lengths: Sequence[int]) -> Tensor:
    return torch.as_tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
