"""Batched generation of responses to prompts with images."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig
from trl.data_utils import prepare_multimodal_messages

from cppo.policy import vision_placeholder_ids


def generate_responses(
    model: Any,
    processor: Any,
    prompts: Sequence[list[dict[str, Any]]],
    images: Sequence[Sequence[Any]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """One response to each prompt, as text without special tokens.

    The prompts are laid out as in training (TRL's chat preparation: images before the first user message's text unless
    the message places them), padded on the left. Tokens that stand for an image are never generated.

    Args:
        prompts: B conversations (chat messages).
        images: the B prompts' PIL images, possibly none.
        temperature: 0 for greedy decoding; otherwise plain sampling, without top-p or top-k.
        seed: of the sampling; torch's global random state is left as it was.
    """
    inputs = prompt_inputs(processor, prompts, images)
    rows = generate_tokens(model, processor, inputs, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return processor.batch_decode(rows, skip_special_tokens=True)


@torch.no_grad()
def generate_tokens(
    model: Any, processor: Any, inputs: Any, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """The token ids of one response to each row of `prompt_inputs`, its end-of-sequence token included.

    The other arguments are those of `generate_responses`.
    """
    inputs = inputs.to(model.device)
    config = _generation_config(model, processor, max_new_tokens, temperature)
    with _evaluation_mode(model), torch.random.fork_rng(enabled=temperature > 0):
        if temperature > 0:
            torch.manual_seed(seed)
        output = model.generate(**inputs, generation_config=config)
    return [_until_end(row, set(config.eos_token_id)) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The ids up to the first end-of-sequence token, which stays; what follows it is padding."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


def prompt_inputs(processor: Any, prompts: Sequence[list[dict[str, Any]]], images: Sequence[Sequence[Any]]) -> Any:
    """What the processor makes of prompts with images, up to where the response begins; padded on the left."""
    messages = [
        prepare_multimodal_messages(prompt, list(pictures)) for prompt, pictures in zip(prompts, images, strict=True)
    ]
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
    )


def _generation_config(model: Any, processor: Any, max_new_tokens: int, temperature: float) -> GenerationConfig:
    """Every sampling field is stated: checkpoints ship their own top-p and repetition penalty."""
    tokenizer = processor.tokenizer
    eos = model.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        top_p=1.0,
        top_k=0 if temperature > 0 else 50,
        repetition_penalty=1.0,
        suppress_tokens=vision_placeholder_ids(processor, model.config) or None,
        eos_token_id=sorted(eos_ids),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


@contextmanager
def _evaluation_mode(model: Any) -> Any:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
