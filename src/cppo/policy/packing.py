"""Build packed rows: the responses of a batch under several views; each prompt and image once per group and view.

A packed row holds N tokens without padding. First come all prompts without their last tokens. Then comes one segment
per rollout: the prompt's last token, then the response without its last token. Each segment token predicts one response
token. A rollout sees its prompt and itself, and all rollouts share one copy of the prompt: attention over the row costs
(sum of R x (P + R)) instead of (sum of all tokens) squared.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cppo.errors import UserError
from cppo.policy.inside import INSIDE_KEYS, REPLACED, ReplacedValues, seen_prompt
from cppo.policy.row_tokens import rows_on_host
from cppo.policy.vision_inputs import VisionInputs, join_images


@dataclass(frozen=True)
class PromptGroup:
    """Rollouts of a batch that answer one prompt, and the images for scoring.

    Attributes:
        rollouts: their rows in the batch, at least one.
        vision: the model's image inputs for the prompt, as from `cppo.policy.vision_inputs.prompt_vision`;
            `mm_token_type_ids` is [1, P + T].
    """

    rollouts: list[int]
    vision: VisionInputs


@dataclass(frozen=True)
class SharedPromptLayout:
    """Index tensors of a packed row with Q prompts of at most P tokens and S segments of at most T tokens.

    Attributes:
        prompts: index of each prompt's tokens in the row, [Q, P]; padded with 0 at the end.
        segments: index of each segment's tokens in the row, [S, T]; padded with 0 at the end.
        prompt_of_segment: [S].
        prompt_valid: the keys of its prompt that a segment sees, bool [S, P], or [1, P] for equally long prompts.
        unpadded: index of each row token in the flattened `prompts` followed by the flattened `segments`, [N]; None
            where nothing is padded and the order is already the row's.
        keys: the row indices that each prompt and then each segment sees, concatenated, for kernels of variable length.
        cu_seqlens_q, cu_seqlens_k: start of the queries and keys of each prompt and then of each segment, and the end
            of the last, int32 [Q + S + 1].
        max_seqlen_q, max_seqlen_k: the largest number of queries and keys of any of them.
        num_prompt_tokens: tokens of all prompts together; the segments start here.
        biases: float masks by dtype, built once for all layers.
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
        """The layout of prompts and segments of these lengths (a prompt may be empty, a segment may not)."""
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
        """The term added to a segment's attention scores over `prompt + own tokens`: 0 where visible, else -inf.

        [S, 1, T, P + T], or [1, 1, T, P + T] for equally long prompts. Kernels of variable length need none.
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
        """The prompts' tokens, [Q, P, ...], of the packed row's [N, ...]; padding holds arbitrary tokens."""
        if self.unpadded is None:
            return tokens[: self.num_prompt_tokens].unflatten(0, self.prompts.shape)
        return tokens.index_select(0, self.prompts.flatten()).unflatten(0, self.prompts.shape)

    def padded_segments(self, tokens: Tensor) -> Tensor:
        """The segments' tokens, [S, T, ...], of the packed row's [N, ...]; padding holds arbitrary tokens."""
        if self.unpadded is None:
            return tokens[self.num_prompt_tokens :].unflatten(0, self.segments.shape)
        return tokens.index_select(0, self.segments.flatten()).unflatten(0, self.segments.shape)

    def packed(self, prompts: Tensor, segments: Tensor) -> Tensor:
        """Padded prompts [Q, P, ...] and segments [S, T, ...] in the order of the packed row, [N, ...]."""
        tokens = torch.cat([prompts.flatten(0, 1), segments.flatten(0, 1)])
        return tokens if self.unpadded is None else tokens.index_select(0, self.unpadded)


@dataclass(frozen=True)
class PackedRow:
    """One row of N tokens for one backbone pass.

    Attributes:
        input_ids: [1, N].
        position_ids: [1, N], or [3, 1, N] for M-RoPE.
        vision: image inputs in the order of the prompts.
        layout: which tokens see which.
        scored: the segment tokens that predict a response token; None for all.
        gradients: whether the pass takes part in the backward pass.
        replaced: the values that attention replaces, if any.
    """

    input_ids: Tensor
    position_ids: Tensor
    vision: VisionInputs
    layout: SharedPromptLayout
    scored: Tensor | None
    gradients: bool
    replaced: ReplacedValues | None = None

    def scored_tokens(self, hidden: Tensor) -> Tensor:
        """The hidden states that predict response tokens, [n, H], from all hidden states [1, N, H]."""
        segments = hidden[0, self.layout.num_prompt_tokens :]
        return segments if self.scored is None else segments[self.scored]


@dataclass(frozen=True)
class PackedBatch:
    """Rows to run, and the positions of their n scored tokens in a batch of B rows of T responses.

    Places are indices of scored tokens in run order, from 0 to n - 1: an index tensor, or a slice of `tokens`.

    Attributes:
        passes: one packed row for all views together, one each for views with and without gradients, or one per view.
        tokens: the places of each view's tokens.
        targets: the response tokens, [n].
        rows, columns: their positions in the batch, [n] each.
        shape: (B, T).
    """

    passes: tuple[PackedRow, ...]
    tokens: dict[str, slice]
    targets: Tensor
    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    def unpack(self, places: slice | Tensor, values: Tensor) -> Tensor:
        """Values [n, ...], one per place, as [B, T, ...], with zeros elsewhere."""
        shape = (*self.shape, *values.shape[1:])
        return values.new_zeros(shape).index_put((self.rows[places], self.columns[places]), values)

    def places(self, view: str, chosen: Tensor) -> Tensor:
        """The places of the view's tokens that are chosen, bool [B, T]."""
        part = self.tokens[view]
        return part.start + chosen[self.rows[part], self.columns[part]].nonzero().squeeze(1)

    def counterparts(self, view: str, places: slice | Tensor) -> Tensor:
        """The view's places of the same response tokens as another view's places."""
        part = self.tokens[view]
        own = torch.arange(part.start, part.stop, device=self.targets.device)
        return self.unpack(part, own)[self.rows[places], self.columns[places]]


def prompt_groups(group_ids: Sequence[int], vision: Sequence[VisionInputs]) -> list[PromptGroup]:
    """The rows of a batch by group, in order of appearance. vision: per row, as in `PromptGroup`."""
    rows_of: dict[int, list[int]] = {}
    for row, group in enumerate(group_ids):
        rows_of.setdefault(group, []).append(row)
    return [PromptGroup(rows, vision[rows[0]]) for rows in rows_of.values()]


def pack(
    model: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_response_tokens: int,
    views: Mapping[str, Sequence[PromptGroup]],
    sequential: bool = False,
    detached: Collection[str] = (),
    prompts: Sequence[Sequence[int]] | None = None,
    response_lengths: Sequence[int] | None = None,
) -> PackedBatch:
    """Pack the responses of a batch for scoring under each view.

    Args:
        model: the transformers model itself, without wrappers (for its M-RoPE positions).
        input_ids: prompt and response, [B, P + T]; prompts padded on the left, responses on the right.
        attention_mask: 1 for real tokens, [B, P + T]. A row with a fully masked response scores nothing.
        num_response_tokens: T.
        views: view name -> the groups to score; a row at most once per view.
        sequential: one backbone pass per view instead of one for all: less memory, see `add_shared_prompt_forward`.
        detached: the last views, through which no gradient flows; their passes build no graph.
        prompts, response_lengths: of each row, where known: with them, and with image inputs on the host, nothing here
            waits for a GPU.

    Raises:
        UserError: a prompt has no token.
    """
    if prompts is None or response_lengths is None:
        prompts, response_lengths = rows_on_host(input_ids, attention_mask, num_response_tokens)
    packer = _Packer(model, input_ids, num_response_tokens, prompts, response_lengths)
    tokens: dict[str, slice] = {}
    num_scored = 0
    for name, groups in views.items():
        count = sum(packer.lengths[rollout] for group in groups for rollout in group.rollouts)
        tokens[name] = slice(num_scored, num_scored + count)
        num_scored += count
    kept, passes = [name for name in views if name not in detached], []
    together = [[name] for name in views] if sequential else [kept, [name for name in views if name in detached]]
    for names in together:
        groups = [group for name in names for group in views[name]]
        if groups:
            passes.append(packer.row(groups, gradients=names[0] not in detached))
    rows, device = [row for groups in views.values() for group in groups for row in group.rollouts], input_ids.device
    lengths = [packer.lengths[row] for row in rows]
    columns = torch.cat([torch.arange(length) for length in lengths]).to(device)
    places = torch.repeat_interleave(torch.tensor(rows), torch.tensor(lengths)).to(device)
    targets = input_ids[places, packer.prompt_end + columns]
    shape = (input_ids.shape[0], num_response_tokens)
    return PackedBatch(tuple(passes), tokens, targets, places, columns, shape)


class _Packer:
    """Cuts one batch into packed rows."""

    def __init__(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        num_response_tokens: int,
        prompts: Sequence[Sequence[int]],
        response_lengths: Sequence[int],
    ) -> None:
        self.prompt_end = input_ids.shape[1] - num_response_tokens
        self.lengths = response_lengths
        self._ids = input_ids
        self._prompts = prompts
        self._model = model
        self._positions: dict[tuple[Any, ...], Tensor] = {}

    def row(self, groups: Sequence[PromptGroup], gradients: bool) -> PackedRow:
        prompts, prompt_positions, segments, segment_positions = [], [], [], []
        owners, parts, replaced = [], [], []
        for number, group in enumerate(groups):
            first = group.rollouts[0]
            prompt = self._ids[first, self._start(first) : self.prompt_end]
            if not prompt.numel():
                raise UserError(f"row {first} of the batch has an empty prompt: every prompt needs a token")
            positions, vision = self._prompt_positions(first, group.vision), group.vision
            following = positions.max() + 1
            if vision.keys() & INSIDE_KEYS:
                prompt, positions, following, vision = seen_prompt(prompt, positions, vision)
            parts.append(vision)
            prompts.append(prompt[:-1])
            if REPLACED in group.vision:
                replaced.append((0, sum(map(len, prompts[:-1])), group.vision[REPLACED][:-1]))
            prompt_positions.append(positions[..., :-1])
            last = positions[..., -1:]
            for rollout in group.rollouts:
                # A response without a token still takes one: a layout has no empty segments.
                length = max(self.lengths[rollout], 1)
                segments.append(torch.cat([prompt[-1:], self._ids[rollout, self.prompt_end :][: length - 1]]))
                steps = torch.arange(length - 1) + following
                segment_positions.append(torch.cat([last, steps.expand(*last.shape[:-1], -1)], dim=-1))
                owners.append(number)
        layout = SharedPromptLayout.of(
            [len(prompt) for prompt in prompts], [len(segment) for segment in segments], owners, self._ids.device
        )
        device = self._ids.device
        position_ids = torch.cat([*prompt_positions, *segment_positions], dim=-1).to(device)
        images = join_images(parts)
        return PackedRow(
            torch.cat([*prompts, *segments])[None],
            position_ids[None] if position_ids.ndim == 1 else position_ids[:, None],
            {key: value.to(device) for key, value in images.items()},
            layout,
            self._scored([rollout for group in groups for rollout in group.rollouts]),
            gradients,
            ReplacedValues(tuple(replaced)) if replaced else None,
        )

    def _scored(self, rows: Sequence[int]) -> Tensor | None:
        if all(self.lengths[row] for row in rows):
            return None
        flags = [torch.full((max(self.lengths[row], 1),), self.lengths[row] > 0) for row in rows]
        return torch.cat(flags).nonzero().squeeze(1).to(self._ids.device)

    def _start(self, row: int) -> int:
        return self.prompt_end - len(self._prompts[row])

    def _prompt_positions(self, row: int, vision: VisionInputs) -> Tensor:
        """`prompt_positions` of a row's prompt, shared by its rollouts."""
        types, grid = vision.get("mm_token_type_ids"), vision.get("image_grid_thw")
        if types is not None:
            types = types[:, self._start(row) : self.prompt_end]
        key = (tuple(self._prompts[row]), () if grid is None else tuple(grid.flatten().tolist()))
        if key not in self._positions:
            self._positions[key] = prompt_positions(self._model, self._prompts[row], types, grid)
        return self._positions[key]


def prompt_positions(model: Any, prompt: Sequence[int], types: Tensor | None, grid: Tensor | None) -> Tensor:
    """Position of each token of a prompt, [P] or [3, P] for M-RoPE, as the model numbers them.

    Computed on the host, without waiting for a device. types: the `mm_token_type_ids` of the prompt, [1, P].
    """
    rope_index = getattr(model.base_model, "get_rope_index", None)
    plain = torch.arange(len(prompt))
    if rope_index is None:
        return plain
    # Without either, the models number all tokens in a row, also during generation.
    if types is None or grid is None or not len(grid):
        return plain.expand(3, -1)
    ids = torch.tensor([list(prompt)])
    return rope_index(input_ids=ids, mm_token_type_ids=types.cpu(), image_grid_thw=grid.cpu())[0][:, 0]


def _padded_places(lengths: Sequence[int], start: int) -> tuple[Tensor, Tensor]:
    """Indices of consecutive pieces from `start` on, [pieces, longest], and which of them are not padding."""
    sizes = torch.as_tensor(list(lengths), dtype=torch.long)
    offsets = torch.arange(int(sizes.max()))
    valid = offsets < sizes[:, None]
    places = start + (sizes.cumsum(0) - sizes)[:, None] + offsets
    return places.masked_fill(~valid, 0), valid


def _cu_seqlens(lengths: Sequence[int]) -> Tensor:
    return torch.as_tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
