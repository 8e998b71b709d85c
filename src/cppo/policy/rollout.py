"""Rollouts whose prefill runs each prompt and image once per group, inside transformers' own `generate`.

`generate` calls the model once on all prompts, then a token at a time. Only that first call is changed: equal rows run
once, and their last logits and keys and values are copied to every row. Sampling, and every call after, stay as they
are, so that one seed draws what it draws without sharing, up to the rounding of another batch size. Dropout that is
active in the prompt is drawn once per group too, as in the packed scorer.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from cppo.errors import UserError
from cppo.policy.families import family_of
from cppo.policy.packing import prompt_groups
from cppo.policy.vision_inputs import (
    PER_TOKEN_KEYS,
    counted_images,
    has_images,
    joined_images,
    model_images,
    slice_rows,
)

ROW_KEYS = ("input_ids", "attention_mask", "position_ids", *PER_TOKEN_KEYS)
"""Inputs whose second-last dimension counts rows."""


SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


@contextmanager
def only_special_tokens(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, `model.generate` takes nothing but special tokens from the checkpoint's generation config.

    What a call leaves open, `generate` takes from there: beams, shortest lengths, penalties, time limits. These are for
    chats, and would change rollouts and measurements unseen.

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
def shared_prefill(model: PreTrainedModel, generation_config: GenerationConfig | None = None) -> Iterator[list[int]]:
    """Within this context, `model.generate` and wrappers of it prefill equal prompts with equal images once.

    Yields a list that gets the number of distinct prompts of each prefill that looked for equal ones.

    What is not understood runs as it is: beams, several sequences per row, a prefill in chunks, videos, image sizes
    that vary without a grid or LLaVA-OneVision's counts, embeddings in place of tokens, a cache of another kind, active
    gradient checkpointing (which has no cache).

    Args:
        model: a transformers vision-language model without wrappers, of a family that `unshared_reason` lets pass.
        generation_config: what `generate` will be given beside the model's own.
    """
    if any(config is not None and _needs_encoded(config) for config in (generation_config, model.generation_config)):
        yield []
        return
    original_forward, prefills = model.forward, list[int]()

    @functools.wraps(original_forward)
    def forward(*args: Any, **inputs: Any) -> Any:
        if args or not _is_prefill(model.config, inputs) or _checkpoints(model):
            return original_forward(*args, **inputs)
        return _prefill(original_forward, model.config, inputs, prefills)

    # `generate` goes by the signature. Were encoded images in it, it would encode those of all rows beforehand.
    signature = inspect.signature(original_forward)
    taken = [parameter for name, parameter in signature.parameters.items() if name != "mm_encoder_outputs"]
    vars(forward)["__signature__"] = signature.replace(parameters=taken)
    with _replaced(model, "forward", forward):
        yield prefills


@contextmanager
def sliced_generation(model: PreTrainedModel, rows: int | None) -> Iterator[None]:
    """Within this context, `model.generate` and wrappers of it make at most `rows` rows at a time (None: all).

    Memory for keys and values is then needed for so many. Greedy answers stay what they are, up to the rounding of
    another batch size; samples are others, since slices draw one after another.

    Args:
        model: a transformers vision-language model without wrappers, of a family that `unshared_reason` lets pass.
        rows: at least 1.
    """
    if rows is None:
        yield
        return
    original: Any = model.generate

    def generate(**inputs: Any) -> Tensor:
        total = len(inputs["input_ids"])
        if total <= rows:
            return cast(Tensor, original(**inputs))
        slices = [_rows_between(model.config, inputs, start, start + rows) for start in range(0, total, rows)]
        answers: list[Tensor] = [original(**one) for one in slices]
        longest = max(answer.shape[1] for answer in answers)
        padding = inputs["generation_config"].pad_token_id
        return torch.cat([pad(answer, (0, longest - answer.shape[1]), value=padding) for answer in answers])

    with _replaced(model, "generate", generate):
        yield


@contextmanager
def _replaced(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within this context, `function` stands in the place of the model's method of that name."""
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
        raise UserError("per_device_generation_batch_size: it is not clear which images belong to which row; set null")
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


def _needs_encoded(config: GenerationConfig) -> bool:
    """Whether `generate` copies or cuts rows, which it does rightly only with images that it encoded itself."""
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    return copies > 1 or config.prefill_chunk_size is not None


def _checkpoints(model: PreTrainedModel) -> bool:
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _is_prefill(config: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether a forward call fills an empty growing cache from tokens and images alone."""
    cache, ids = _cache_in(inputs), inputs.get("input_ids")
    if type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length() or ids is None or len(ids) < 2:
        return False
    # Without positions Qwen's models make them, and remember offsets for the rows of this call.
    if inputs.get("position_ids") is None:
        return False
    asked = any(inputs.get(key) for key in ("output_hidden_states", "output_attentions"))
    others = [value for key, value in inputs.items() if key not in (*ROW_KEYS, *family_of(config).image_inputs)]
    return not asked and not any(isinstance(value, Tensor | Mapping) for value in others)


def _cache_in(inputs: Mapping[str, Any]) -> DynamicCache | None:
    """The cache of keys and values among a call's arguments. Its name differs: transformers 5.24 changed it."""
    return next((value for value in inputs.values() if isinstance(value, DynamicCache)), None)


def _prefill(forward: Callable[..., Any], config: Any, inputs: dict[str, Any], prefills: list[int]) -> Any:
    """One forward pass over the distinct rows of [B, P], its last logits and cache copied to all B rows."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    vision = counted_images(config, inputs)
    if vision is None or (mask is not None and mask.ndim != 2):
        return forward(**inputs)
    groups = prompt_groups(ids, torch.ones_like(ids) if mask is None else mask, 0, vision)
    prefills.append(len(groups))
    if len(groups) == len(ids):
        return forward(**inputs)
    distinct = {key: value for key, value in inputs.items() if key not in family_of(config).image_inputs}
    first = torch.tensor([group.rows[0] for group in groups], device=ids.device)
    for key in ROW_KEYS:
        value = inputs.get(key)
        # Positions may stand in one row for all.
        if value is not None and value.shape[-2] > 1:
            distinct[key] = value.index_select(-2, first)
    outputs = forward(**distinct, **joined_images(config, [group.vision for group in groups]))
    group_of = torch.empty_like(ids[:, 0])
    for number, group in enumerate(groups):
        group_of[group.rows] = number
    cache = _cache_in(inputs)
    assert cache is not None  # `_is_prefill` saw it
    cache.batch_select_indices(group_of)
    outputs.logits = outputs.logits[group_of]
    return outputs
