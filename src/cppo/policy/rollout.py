"""Rollouts that prefill each prompt and image once per group, inside transformers' own `generate`.

`generate` calls the model once on all prompts, then one token at a time. Only the first call changes: equal rows run
once, and their last logits, keys and values are copied to every row. Sampling and later calls stay the same, so a seed
gives the same draws as without sharing, up to rounding of another batch size. Active dropout in the prompt is also
drawn once per group, as in the packed scorer.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from cppo.errors import UserError
from cppo.policy.families import family_of
from cppo.policy.vision_inputs import (
    PER_TOKEN_KEYS,
    counted_images,
    has_images,
    join_images,
    model_images,
    packable,
    slice_rows,
)

ROW_KEYS = ("input_ids", "attention_mask", "position_ids", *PER_TOKEN_KEYS)
"""Inputs with a row count in their second-last dimension."""


SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


@contextmanager
def only_special_tokens(model: PreTrainedModel) -> Iterator[None]:
    """Context: `model.generate` takes only special tokens from the checkpoint's generation config.

    `generate` takes options that a call omits from that config: beams, minimum lengths, penalties, time limits. They
    are for chats and would silently change rollouts and measurements.

    Args:
        model: without wrappers.
    """
    checkpoints = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(checkpoints, name) for name in SPECIAL_TOKENS})
    try:
        yield
    finally:
        model.generation_config = checkpoints


@contextmanager
def shared_generation(
    model: PreTrainedModel,
    group_ids: Sequence[int] | None,
    generation_config: GenerationConfig | None = None,
    rows_at_a_time: int | None = None,
) -> Iterator[list[int]]:
    """Context: `model.generate`, also through wrappers, prefills each group's prompt once, in slices of rows.

    Yields a list that gets the number of prompts of each prefill that was or could have been shared.

    Unsupported calls run unchanged: beams, several sequences per row, a prefill in chunks, videos, image sizes that
    vary without a grid or LLaVA-OneVision's counts, embeddings in place of tokens, a cache of another kind, active
    gradient checkpointing (which has no cache). Rows of a group with different tokens are prefilled separately, as are
    the rows of a call with another number of rows.

    Slices need memory for the keys and values of their rows only. Greedy answers stay the same, up to rounding of
    another batch size; samples change, because slices draw one after another.

    Images may stay on the host: those of a prefill move to the device of its tokens.

    Args:
        model: a transformers vision-language model without wrappers, of a family that `unshared_reason` accepts.
        group_ids: the group of each row that `generate` will get, in order; rows of a group have the same prompt and
            images. Without it nothing is shared.
        generation_config: the one that `generate` will get, beside the model's own.
        rows_at_a_time: at least 1; None for all.
    """
    encoded = any(
        config is not None and _needs_encoded(config) for config in (generation_config, model.generation_config)
    )
    shares, prefills, groups_now = group_ids is not None and not encoded, list[int](), list[int]()
    original_generate: Any = model.generate
    original_forward = model.forward

    def generate(**inputs: Any) -> Any:
        total = len(inputs["input_ids"])
        known = list(group_ids) if group_ids is not None and len(group_ids) == total else list(range(total))
        size = rows_at_a_time or total
        answers: list[Tensor] = []
        for start in range(0, total, size):
            groups_now[:] = known[start : start + size]
            cut = inputs if size >= total else _rows_between(model.config, inputs, start, start + size)
            answers.append(original_generate(**(cut if shares else _beside_tokens(model.config, cut))))
        if len(answers) == 1:
            return answers[0]
        longest = max(answer.shape[1] for answer in answers)
        padding = inputs["generation_config"].pad_token_id
        return torch.cat([pad(answer, (0, longest - answer.shape[1]), value=padding) for answer in answers])

    def plain_forward(*args: Any, **inputs: Any) -> Any:
        return original_forward(*args, **_beside_tokens(model.config, inputs))

    @functools.wraps(original_forward)
    def forward(*args: Any, **inputs: Any) -> Any:
        if args or not _is_prefill(model.config, inputs) or _checkpoints(model):
            return plain_forward(*args, **inputs)
        return _prefill(plain_forward, model.config, inputs, groups_now, prefills)

    # `generate` reads the signature. With encoded images in it, it would encode the images of all rows first.
    signature = inspect.signature(original_forward)
    taken = [parameter for name, parameter in signature.parameters.items() if name != "mm_encoder_outputs"]
    vars(forward)["__signature__"] = signature.replace(parameters=taken)
    with ExitStack() as changes:
        if shares:
            changes.enter_context(method_replaced(model, "forward", forward))
        changes.enter_context(method_replaced(model, "generate", generate))
        yield prefills


@contextmanager
def method_replaced(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Context: `function` replaces the model's method of that name."""
    own = vars(model).get(name)
    vars(model)[name] = function
    try:
        yield
    finally:
        if own is None:
            del vars(model)[name]
        else:
            vars(model)[name] = own


def _rows_between(config: Any, inputs: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    """The arguments of `generate` for rows `start` to `end` (exclusive)."""
    vision = counted_images(config, inputs)
    if vision is None:
        raise UserError("per_device_generation_batch_size: the images cannot be assigned to rows; set null")
    cut = slice_rows(vision, start, end)
    # Idefics takes an image of zeros where all are.
    if not has_images(config, cut):
        cut = {key: value for key, value in cut.items() if key in PER_TOKEN_KEYS}
    images = model_images(config, cut)
    cut_keys = {*family_of(config).image_inputs, *PER_TOKEN_KEYS}
    kept = {key: value for key, value in inputs.items() if key not in cut_keys}
    return {
        **kept,
        "input_ids": kept["input_ids"][start:end],
        "attention_mask": kept["attention_mask"][start:end],
        **images,
    }


def _beside_tokens(config: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with its images on the device of its tokens."""
    ids = inputs.get("input_ids")
    images = [name for name in family_of(config).image_inputs if isinstance(inputs.get(name), Tensor)]
    return inputs if ids is None else {**inputs, **{name: inputs[name].to(ids.device) for name in images}}


def _needs_encoded(config: GenerationConfig) -> bool:
    """Whether `generate` copies or splits rows, which works only with images that it encoded itself."""
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    return copies > 1 or config.prefill_chunk_size is not None


def _checkpoints(model: PreTrainedModel) -> bool:
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _is_prefill(config: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether a forward call fills an empty growing cache from tokens and images alone."""
    cache, ids = _cache_in(inputs), inputs.get("input_ids")
    if type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length() or ids is None or len(ids) < 2:
        return False
    # Without positions, Qwen's models compute them and store offsets for the rows of this call.
    if inputs.get("position_ids") is None:
        return False
    asked = any(inputs.get(key) for key in ("output_hidden_states", "output_attentions"))
    others = [value for key, value in inputs.items() if key not in (*ROW_KEYS, *family_of(config).image_inputs)]
    return not asked and not any(isinstance(value, Tensor | Mapping) for value in others)


def _cache_in(inputs: Mapping[str, Any]) -> DynamicCache | None:
    """The cache of keys and values among a call's arguments; transformers 5.24 changed its name."""
    return next((value for value in inputs.values() if isinstance(value, DynamicCache)), None)


def _prefill(
    forward: Callable[..., Any], config: Any, inputs: dict[str, Any], group_ids: Sequence[int], prefills: list[int]
) -> Any:
    """One forward pass over the first row of each group of [B, P]; last logits and cache are copied to all B rows."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    vision = counted_images(config, inputs)
    if vision is None or (mask is not None and mask.ndim != 2) or len(group_ids) != len(ids):
        return forward(**inputs)
    firsts = {group: row for row, group in reversed(list(enumerate(group_ids)))}
    first_of = ids.new_tensor([firsts[group] for group in group_ids])
    equal = (ids == ids[first_of]).all(dim=1)
    if mask is not None:
        equal &= (mask == mask[first_of]).all(dim=1)
    own = [row if not same else firsts[group_ids[row]] for row, same in enumerate(equal.tolist())]
    distinct_rows = list(dict.fromkeys(own))
    prefills.append(len(distinct_rows))
    if len(distinct_rows) == len(ids):
        return forward(**inputs)
    distinct = {key: value for key, value in inputs.items() if key not in family_of(config).image_inputs}
    first = torch.tensor(distinct_rows, device=ids.device)
    for key in ROW_KEYS:
        value = inputs.get(key)
        # One row of positions may serve all rows.
        if value is not None and value.shape[-2] > 1:
            distinct[key] = value.index_select(-2, first)
    images = join_images([packable(config, slice_rows(vision, row, row + 1)) for row in distinct_rows])
    outputs = forward(**distinct, **images)
    place = {row: number for number, row in enumerate(distinct_rows)}
    group_of = torch.tensor([place[row] for row in own], device=ids.device)
    cache = _cache_in(inputs)
    assert cache is not None  # checked by `_is_prefill`
    cache.batch_select_indices(group_of)
    outputs.logits = outputs.logits[group_of]
    return outputs
