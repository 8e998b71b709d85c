"""Let a model answer records, in one or several processes, and score the answers."""

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

    The batches of records are distributed over the processes. A second thread scores a batch while the next is
    answered.

    Args:
        model: a transformers model, or another `Engine`.
        processor: the transformers model's; None with another engine.
        condition: how the images are shown (`get_condition`); `BLANK` gives the score without seeing.
        samples: responses a record.
        temperature: 0 is greedy decoding; by default 0 for one sample, 1 for more.
        top_p: sample from the smallest set of most probable tokens with at least this probability.
        batch_size: responses generated together.
        seed: of sampling and perturbations. The random numbers of sample s depend only on (seed, record id, s). Batch
            size and other records change a response by rounding only.
        system_prompt: added before every prompt without a system message.
        tolerance: allowed error of a number, as a fraction of the expected number.
        known: results of the first records, from an earlier call with the same arguments. They are kept. A batch with
            other records too is answered again as a whole, so that its padding is the same.
        keep: called in the first process with each newly answered record, without its images, and its result.
        progress: called in the first process with the number of newly answered records.
        right: maps a record's id and responses to 1.0 (right) or 0.0 each; by default the accuracy reward with
            `tolerance`.
        processes: the processes that call this function together. Each gets the whole result, which does not depend on
            their number.

    Raises:
        ValueError: no records, samples < 1, or several greedy samples, which would be identical.
        UserError: another process failed.
    """
    if not len(source) or samples < 1:
        raise ValueError(f"evaluate needs records and samples >= 1, got {len(source)} records, samples {samples}")
    temperature = (0.0 if samples == 1 else 1.0) if temperature is None else temperature
    if samples > 1 and not temperature:
        raise ValueError(f"{samples} greedy samples would be identical; evaluate needs temperature > 0 for them")
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
    """A record's responses with their format rewards, and their `right` or accuracy rewards.

    opened: the part of the form that the chat template opens (`ChatForm`).
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
