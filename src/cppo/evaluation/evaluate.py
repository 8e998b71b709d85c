"""Lets a model answer records, and scores the answers."""

from collections.abc import Callable, Sequence
from typing import Any

from cppo.data import Record, chat_messages
from cppo.evaluation.conditions import CLEAN, Condition
from cppo.evaluation.generate import generate_responses, response_stream
from cppo.evaluation.results import EvalResult, ItemResult
from cppo.rewards import format_reward, get_accuracy_reward


def evaluate(
    model: Any,
    processor: Any,
    source: Sequence[Record],
    *,
    condition: Condition = CLEAN,
    samples: int = 1,
    temperature: float | None = None,
    top_p: float = 1.0,
    batch_size: int = 32,
    max_new_tokens: int = 512,
    seed: int = 0,
    system_prompt: str | None = None,
    tolerance: float = 0.0,
    known: Sequence[ItemResult] = (),
    keep: Callable[[Record, ItemResult], Any] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> EvalResult:
    """Let `model` answer every record and score the answers.

    Args:
        condition: how the images are shown (`get_condition`); `BLANK` tells what the model scores without looking.
        samples: responses a record.
        temperature: 0 is greedy decoding; by default that for one sample, 1 for more.
        top_p: of the sampling: the smallest set of most probable tokens that holds it is drawn from.
        batch_size: responses generated together.
        seed: of sampling and perturbations. Sample s of a record draws random numbers that depend on (seed, record id,
            s) alone, so that neither batch size nor the other records change a response but through rounding.
        system_prompt: put before every prompt that brings no system message.
        tolerance: how far a number may lie from the expected one, as a fraction of it.
        known: results of the first records, from an earlier call with the same arguments; these are not asked again.
        keep: called with each record just answered and its result.
        progress: called with the number of records just answered.

    Raises:
        ValueError: no records, samples < 1, or several greedy samples, which would all be the same.
    """
    if not len(source) or samples < 1:
        raise ValueError(f"evaluate needs records and samples >= 1, got {len(source)} records, samples {samples}")
    temperature = (0.0 if samples == 1 else 1.0) if temperature is None else temperature
    if samples > 1 and not temperature:
        raise ValueError(f"{samples} greedy samples are all the same; evaluate needs temperature > 0 for them")
    records_a_batch = max(1, batch_size // samples)
    items = list(known)
    for start in range(len(items), len(source), records_a_batch):
        records = [source[index] for index in range(start, min(start + records_a_batch, len(source)))]
        shown = [condition.show(record, seed) for record in records]
        responses = generate_responses(
            model,
            processor,
            [chat_messages(record.prompt, system_prompt) for record in records for _ in range(samples)],
            [images for images in shown for _ in range(samples)],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            streams=[response_stream(seed, record.id, sample) for record in records for sample in range(samples)],
        )
        for index, record in enumerate(records):
            items.append(score_item(record, responses[index * samples : (index + 1) * samples], tolerance))
            if keep is not None:
                keep(record, items[-1])
        if progress is not None:
            progress(len(records))
    return EvalResult(tuple(items), samples, condition.name)


def score_item(record: Record, responses: Sequence[str], tolerance: float) -> ItemResult:
    """A record's responses with the accuracy and the format reward of each."""
    correct = get_accuracy_reward(tolerance)(
        responses, answer=[record.answer] * len(responses), choices=[record.choices] * len(responses)
    )
    return ItemResult(
        record.id,
        record.answer,
        tuple(responses),
        tuple(correct),
        tuple(format_reward(responses)),
        images=len(record.images),
        choices=record.choices or (),
    )
