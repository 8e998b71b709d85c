"""Rate records by a model's sampled answers: accuracy, agreement and uncertainty.

The semantic entropy is that in SENT's curriculum (arXiv 2512.04359). M responses with probabilities P(o | q) are
clustered by final answer, p_k is the share of cluster k in the sum of the probabilities, and SE = -sum_k p_k log p_k.
"""

import math
import time
from collections.abc import Callable, Sequence

from cppo.data import Rating, Record, RecordSource, chat_messages
from cppo.evaluation.batches import shared_out
from cppo.evaluation.generate import Response, ScoringEngine, TransformersEngine, response_stream
from cppo.evaluation.processes import ALONE, Processes
from cppo.rewards import extract_answer, get_accuracy_reward
from cppo.rewards.match import compare_answers
from cppo.rewards.worker import Unfinished

SHOWN_CHARS = 200
"""Limit of an answer's length in a rating."""
BUDGET_SECONDS = 60.0
"""Time limit for comparing one record's answers with each other; the remaining pairs count as different."""


def semantic_entropy(weights: Sequence[float]) -> float:
    """Entropy of clusters in nats: 0 for one cluster, log N for N equal ones.

    weights: of the clusters, not negative, with a positive sum. Raises ValueError for others.
    """
    total = math.fsum(weights)
    if not total > 0 or min(weights) < 0:
        raise ValueError(f"semantic_entropy needs weights with a positive sum, none of them negative, got {weights}")
    return max(0.0, -math.fsum(p * math.log(p) for p in (weight / total for weight in weights) if p))


def answer_clusters(answers: Sequence[str], *, tolerance: float = 0.0, choices: Sequence[str] = ()) -> list[int]:
    """The cluster of each answer: 0, 1, ... in the order of their first answers.

    An answer belongs to the first cluster with an equal first answer; each is compared with the other
    (`cppo.rewards.answers_match`). An empty answer is a cluster by itself.

    Args:
        tolerance: allowed difference of two numbers, as a fraction of one.
        choices: texts of the options of a multiple-choice question.
    """
    deadline = time.monotonic() + BUDGET_SECONDS

    def same(one: str, other: str) -> bool:
        try:
            return compare_answers(one, other, tolerance=tolerance, choices=choices, deadline=deadline)
        except Unfinished:
            return False

    firsts: list[str] = []
    known: dict[str, int] = {}
    clusters = []
    for answer in answers:
        place = known.get(answer)
        if place is None:
            pairs = enumerate(firsts if answer else [])
            place = next((k for k, one in pairs if one and same(answer, one) and same(one, answer)), len(firsts))
            if place == len(firsts):
                firsts.append(answer)
            if answer:
                known[answer] = place
        clusters.append(place)
    return clusters


def rate_records(
    model: object,
    processor: object,
    source: RecordSource,
    *,
    samples: int = 8,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 32,
    max_new_tokens: int = 512,
    seed: int = 0,
    system_prompt: str | None = None,
    tolerance: float = 0.0,
    known: Sequence[Rating] = (),
    keep: Callable[[Rating], object] | None = None,
    processes: Processes = ALONE,
) -> list[Rating]:
    """Let a model answer every record several times, and rate the records by the answers.

    Args:
        model, processor, batch_size, seed, system_prompt, processes: as in `evaluate`; another engine than
            transformers' must be a `ScoringEngine`.
        samples: responses to each record, at least 2.
        temperature: of the sampling, above 0.
        tolerance: allowed difference of two equal numbers, as a fraction of one.
        known: ratings of the first records, from an earlier call with the same arguments.
        keep: called in the first process with each new rating.

    Raises:
        ValueError: no records, fewer than 2 samples, or greedy decoding.
        UserError: another process failed.
    """
    if not len(source) or samples < 2 or not temperature > 0:
        raise ValueError(
            f"rate_records needs records, samples >= 2 and temperature > 0, got {len(source)} records, samples "
            f"{samples}, temperature {temperature}"
        )
    engine = model if isinstance(model, ScoringEngine) else TransformersEngine(model, processor)
    accuracy = get_accuracy_reward(tolerance)

    def answer(batch: range) -> list[tuple[int, Record, list[Response]]]:
        records = [source[index] for index in batch]
        responses = engine.sample(
            [chat_messages(record.prompt, system_prompt) for record in records for _ in range(samples)],
            [record.images for record in records for _ in range(samples)],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            streams=[response_stream(seed, record.id, sample) for record in records for sample in range(samples)],
        )
        return [
            (index, record, responses[row * samples : (row + 1) * samples])
            for row, (index, record) in enumerate(zip(batch, records, strict=True))
        ]

    def rate(answered: Sequence[tuple[int, Record, list[Response]]]) -> list[Rating]:
        return [
            rate_responses(source.content_digest(index), record, responses, accuracy, tolerance)
            for index, record, responses in answered
        ]

    ratings = list(known)
    size = max(1, batch_size // samples)
    for new in shared_out(len(source), size, answer, rate, known=len(known), processes=processes):
        ratings += new
        if keep is not None and processes.is_first:
            for rating in new:
                keep(rating)
    return ratings


def rate_responses(
    row: str,
    record: Record,
    responses: Sequence[Response],
    accuracy: Callable[..., Sequence[float]],
    tolerance: float = 0.0,
) -> Rating:
    """The rating of a record from responses to it.

    row: digest of its content. accuracy: the reward that decides which responses are right.
    """
    count, choices = len(responses), record.choices or ()
    right = accuracy([one.text for one in responses], answer=[record.answer] * count, choices=[record.choices] * count)
    answers = [extract_answer(one.text) or "" for one in responses]
    clusters = answer_clusters(answers, tolerance=tolerance, choices=choices)
    # The probabilities of long responses underflow; their shares do not.
    best = max(one.logp for one in responses)
    weights = [math.exp(one.logp - best) for one in responses]
    total, found = math.fsum(weights), []
    for cluster in range(max(clusters) + 1):
        members = [place for place, own in enumerate(clusters) if own == cluster]
        share = math.fsum(weights[place] for place in members) / total
        found.append((answers[members[0]][:SHOWN_CHARS], len(members), share))
    found.sort(key=lambda one: -one[1])
    return Rating(
        row=row,
        id=record.id,
        accuracy=sum(right) / count,
        confidence=max((size for answer, size, _ in found if answer), default=0) / count,
        semantic_entropy=semantic_entropy([share for *_, share in found]),
        discrete_semantic_entropy=semantic_entropy([size for _, size, _ in found]),
        clusters=len(found),
        answers=tuple(found),
    )
