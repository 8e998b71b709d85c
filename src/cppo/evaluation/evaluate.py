"""Lets a model answer records, alone or in several processes, and scores the answers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cppo.data import Record, chat_messages
from cppo.evaluation.batches import shared_out
from cppo.evaluation.conditions import CLEAN, Condition
from cppo.evaluation.generate import Engine, TransformersEngine, response_stream
from cppo.evaluation.processes import ALONE, Processes
from cppo.evaluation.results import EvalResult, ItemResult
from cppo.evaluation.sharded import ShardedEngine
from cppo.rewards import ChatForm, format_reward, get_accuracy_reward


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
    processes: Processes = ALONE,
    right: Callable[[str, Sequence[str]], Sequence[float]] | None = None,
) -> EvalResult:
    """Let `model` answer every record and score the answers.

    The records are cut into batches, and the batches are dealt to the processes. Batches are scored in a second thread
    while the next ones are answered.

    Args:
        model: a transformers model, or another `Engine`.
        processor: the transformers model's; None beside another engine.
        condition: how the images are shown (`get_condition`); `BLANK` tells what the model scores without looking.
        samples: responses a record.
        temperature: 0 is greedy decoding; by default that for one sample, 1 for more.
        top_p: of the sampling: the smallest set of most probable tokens that holds it is drawn from.
        batch_size: responses generated together.
        seed: of sampling and perturbations. Sample s of a record draws random numbers that depend on (seed, record id,
            s) alone, so that neither batch size nor the other records change a response but through rounding.
        system_prompt: put before every prompt that brings no system message.
        tolerance: how far a number may lie from the expected one, as a fraction of it.
        known: results of the first records, from an earlier call with the same arguments. They are kept; a batch that
            holds other records too is answered again as a whole, so that it is padded as before.
        keep: called in the first process with each record just answered, without its images, and its result.
        progress: called in the first process with the number of records just answered.
        right: from a record's id and its responses, 1.0 for each right one and 0.0 for the others; by default the
            accuracy reward with `tolerance`.
        processes: those that call this function together. Each gets the whole result, which their number does not
            change.

    Raises:
        ValueError: no records, samples < 1, or several greedy samples, which would all be the same.
        UserError: another process failed.
    """
    if not len(source) or samples < 1:
        raise ValueError(f"evaluate needs records and samples >= 1, got {len(source)} records, samples {samples}")
    temperature = (0.0 if samples == 1 else 1.0) if temperature is None else temperature
    if samples > 1 and not temperature:
        raise ValueError(f"{samples} greedy samples are all the same; evaluate needs temperature > 0 for them")
    engine = model if isinstance(model, Engine) else TransformersEngine(model, processor)
    used = getattr(engine, "processor", None)
    opened = ChatForm.of(used).opened if used is not None else ""
    if processes.sharded:
        engine = ShardedEngine(engine, processes)

    def answer(batch: range) -> list[tuple[Record, list[str]]]:
        records = [source[index] for index in batch]
        shown = [condition.show(record, seed) for record in records]
        responses = engine.answer(
            [chat_messages(record.prompt, system_prompt) for record in records for _ in range(samples)],
            [images for images in shown for _ in range(samples)],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            streams=[response_stream(seed, record.id, sample) for record in records for sample in range(samples)],
        )
        return [(record, responses[row * samples : (row + 1) * samples]) for row, record in enumerate(records)]

    def score(answered: Sequence[tuple[Record, list[str]]]) -> list[tuple[Record, ItemResult]]:
        return [
            (replace(record, images=()), score_item(record, texts, tolerance, right, opened))
            for record, texts in answered
        ]

    items = list(known)
    size = max(1, batch_size // samples)
    for new in shared_out(len(source), size, answer, score, known=len(known), processes=processes):
        items += [item for _, item in new]
        if keep is not None and processes.is_first:
            for record, item in new:
                keep(record, item)
        if progress is not None and processes.is_first:
            progress(len(new))
    return EvalResult(tuple(items), samples, condition.name)


def score_item(
    record: Record,
    responses: Sequence[str],
    tolerance: float,
    right: Callable[[str, Sequence[str]], Sequence[float]] | None = None,
    opened: str = "",
) -> ItemResult:
    """A record's responses with the format reward of each, and `right` or the accuracy reward.

    opened: what the chat template opens of the form (`ChatForm`).
    """
    if right is not None:
        correct = right(record.id, responses)
    else:
        correct = get_accuracy_reward(tolerance)(
            responses, answer=[record.answer] * len(responses), choices=[record.choices] * len(responses)
        )
    return ItemResult(
        record.id,
        record.answer,
        tuple(responses),
        tuple(correct),
        tuple(format_reward(responses, prompt_opens=[opened] * len(responses))),
        images=len(record.images),
        choices=record.choices or (),
    )
