"""Batched generation of responses to prompts with images: the interface, and its transformers engine."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Required, TypedDict, Unpack, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from trl import prepare_multimodal_messages

from cppo.errors import UserError, first_line
from cppo.policy import only_special_tokens, unwrapped, vision_placeholder_ids

Prompts = Sequence[list[dict[str, Any]]]
"""B conversations, each a list of chat messages."""
Images = Sequence[Sequence[Any]]
"""The PIL images of B prompts; a prompt may have none."""


class Sampling(TypedDict, total=False):
    """Settings of generation.

    Attributes:
        max_new_tokens: the longest response.
        temperature: 0, the default, for greedy decoding; otherwise sampling, without top-k.
        top_p: sample from the smallest set of most probable tokens with at least this probability; 1 by default.
        streams: random streams, one per prompt (`response_stream`). A response depends on its prompt and its stream
            only. Greedy decoding needs none.
    """

    max_new_tokens: Required[int]
    temperature: float
    top_p: float
    streams: Sequence[np.random.Generator]


@runtime_checkable
class Engine(Protocol):
    """Answers a batch of prompts in an evaluation with one response each. `evaluate` sets all of `Sampling`."""

    def answer(self, prompts: Prompts, images: Images, **sampling: Unpack[Sampling]) -> list[str]: ...


class Response(NamedTuple):
    """A sampled response.

    Attributes:
        text: without special tokens.
        logp: log-probability of its tokens with the end token, in nats: at temperature 1 and without top_p, however it
            was sampled.
    """

    text: str
    logp: float


@runtime_checkable
class ScoringEngine(Engine, Protocol):
    """An engine that also returns the probabilities of its sampled responses."""

    def sample(self, prompts: Prompts, images: Images, **sampling: Unpack[Sampling]) -> list[Response]: ...


@dataclass(frozen=True)
class TransformersEngine:
    """A transformers model and its processor, on the model's device."""

    model: Any
    processor: Any

    def answer(self, prompts: Prompts, images: Images, **sampling: Unpack[Sampling]) -> list[str]:
        """`generate_responses`. Raises UserError if the batch does not fit into memory."""
        with _fits(len(prompts)):
            return generate_responses(self.model, self.processor, prompts, images, **sampling)

    def sample(self, prompts: Prompts, images: Images, **sampling: Unpack[Sampling]) -> list[Response]:
        """`sample_responses`. Raises UserError if the batch does not fit into memory."""
        with _fits(len(prompts)):
            return sample_responses(self.model, self.processor, prompts, images, **sampling)


@contextmanager
def _fits(count: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a batch of {count} responses does not fit into the memory ({first_line(error)}); "
            "give a smaller --batch_size"
        ) from error


def generate_responses(
    model: Any, processor: Any, prompts: Prompts, images: Images, **sampling: Unpack[Sampling]
) -> list[str]:
    """One response to each prompt, as text without special tokens.

    Prompts have the layout of training (TRL's chat preparation: images before the first user message's text unless the
    message places them), padded on the left. Image placeholder tokens are never generated.
    """
    rows = generate_tokens(model, processor, prompt_inputs(processor, prompts, images), **sampling)
    return processor.batch_decode(rows, skip_special_tokens=True)


def sample_responses(
    model: Any, processor: Any, prompts: Prompts, images: Images, **sampling: Unpack[Sampling]
) -> list[Response]:
    """As `generate_responses`, with the log-probability of each response; the temperature must be above 0."""
    draw = _draw(keep_logps=True, **sampling)
    assert draw is not None
    rows = _generate(model, processor, prompt_inputs(processor, prompts, images), sampling["max_new_tokens"], draw)
    texts, logps = processor.batch_decode(rows, skip_special_tokens=True), torch.stack(draw.logps, dim=1)
    sums = [logps[place, : len(row)].sum().item() for place, row in enumerate(rows)]
    return [Response(*one) for one in zip(texts, sums, strict=True)]


def generate_tokens(model: Any, processor: Any, inputs: Any, **sampling: Unpack[Sampling]) -> list[list[int]]:
    """The token ids of one response to each row of `prompt_inputs`, with its end-of-sequence token."""
    return _generate(model, processor, inputs, sampling["max_new_tokens"], _draw(**sampling))


def _draw(
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    streams: Sequence[np.random.Generator] = (),
    keep_logps: bool = False,
) -> "DrawnToken | None":
    """None for greedy decoding."""
    if not temperature:
        return None
    return DrawnToken(streams, max_new_tokens, temperature, top_p, keep_logps=keep_logps)


@torch.no_grad()
def _generate(
    model: Any, processor: Any, inputs: Any, max_new_tokens: int, draw: "DrawnToken | None"
) -> list[list[int]]:
    inputs = inputs.to(model.device)
    config = _generation_config(model, processor, max_new_tokens)
    processors = LogitsProcessorList([] if draw is None else [draw])
    with evaluation_mode(model), only_special_tokens(unwrapped(model)):
        output = model.generate(**inputs, generation_config=config, logits_processor=processors)
    return [_until_end(row, set(config.eos_token_id)) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def response_stream(seed: int, record_id: str, sample: int) -> np.random.Generator:
    """The random generator of one response: PCG64, seeded with the SHA-256 of the arguments as a JSON list."""
    key = json.dumps([seed, record_id, sample]).encode()
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(key).digest(), "little")))


class DrawnToken(LogitsProcessor):
    """Keeps one token a row, drawn with one uniform number from the row's stream; greedy search then takes it.

    The sampling of `generate` draws all rows from one global stream: a response would change with its batch.
    """

    def __init__(
        self,
        streams: Sequence[np.random.Generator],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        *,
        keep_logps: bool = False,
    ) -> None:
        """keep_logps: whether `logps` is filled, at the cost of another softmax a token."""
        self._uniforms = torch.tensor(np.stack([stream.random(max_new_tokens) for stream in streams]))
        self._temperature, self._top_p = temperature, top_p
        self._step = 0
        self._keep_logps = keep_logps
        self.logps: list[Tensor] = []
        """Log-probabilities of each step's tokens, [B], float64, in nats, at temperature 1 and without top_p."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        probabilities = torch.softmax(scores.double() / self._temperature, dim=-1)
        if self._top_p < 1:
            probabilities = nucleus(probabilities, self._top_p)
        uniforms = self._uniforms[:, self._step, None].to(scores.device)
        self._step += 1
        token = inverse_cumulative(probabilities, uniforms)
        if self._keep_logps:
            self.logps.append(torch.log_softmax(scores.double(), dim=-1).gather(-1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [B, V], 0 outside the smallest set of most probable tokens with at least `top_p`; not rescaled."""
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return probabilities.scatter(-1, tokens, ordered.masked_fill(outside, 0.0))


def inverse_cumulative(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first tokens [B, 1] whose cumulative share of the weights [B, V] exceeds `uniforms` [B, 1] in [0, 1)."""
    cumulative = weights.cumsum(dim=-1)
    passed = (cumulative <= uniforms * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
    return passed.clamp(max=weights.shape[-1] - 1)


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    """The ids up to and with the first end-of-sequence token; padding follows."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


def prompt_inputs(processor: Any, prompts: Prompts, images: Images) -> Any:
    """The processor's outputs for prompts with images, up to the start of the response; padded on the left."""
    messages = [_messages(prompt, pictures) for prompt, pictures in zip(prompts, images, strict=True)]
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",  # in `processor_kwargs` SmolVLM's processor would undo it
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def prompt_text(processor: Any, prompt: list[dict[str, Any]], images: Sequence[Any]) -> str:
    """The chat text of one row of `prompt_inputs`, with one placeholder an image."""
    return processor.apply_chat_template(_messages(prompt, images), add_generation_prompt=True, tokenize=False)


def _messages(prompt: list[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    return prepare_multimodal_messages(prompt, list(images))


def end_token_ids(processor: Any, config: GenerationConfig) -> list[int]:
    """The tokens that end a response: the tokenizer's own, and those in a checkpoint's generation configuration."""
    eos = config.eos_token_id
    return sorted({processor.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})


def _generation_config(model: Any, processor: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy search with the end tokens of tokenizer and checkpoint; image placeholders are banned."""
    tokenizer = processor.tokenizer
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        suppress_tokens=vision_placeholder_ids(processor, model.config) or None,
        eos_token_id=end_token_ids(processor, unwrapped(model).generation_config),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


@contextmanager
def evaluation_mode(model: Any) -> Any:
    """Evaluation mode inside the context; the former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
