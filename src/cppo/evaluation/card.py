"""The perception card: how much a model's answers depend on the image, measured under several conditions."""

from collections.abc import Mapping
from dataclasses import dataclass

from cppo.evaluation.results import EvalResult, ItemResult, Rate
from cppo.evaluation.statistics import PairedDifference, paired_bootstrap
from cppo.rewards import answers_match, extract_answer


@dataclass(frozen=True)
class CardRow:
    """One condition, over the items that have an image.

    Attributes:
        condition: its name.
        n: number of items.
        accuracy: avg@N under the condition.
        change: accuracy under the condition minus accuracy under `clean`, paired by item.
        consistency: share of final answers equal to the answer under `clean` (`same_answers`).
    """

    condition: str
    n: int
    accuracy: Rate
    change: PairedDifference
    consistency: Rate


def perception_card(results: Mapping[str, EvalResult], *, tolerance: float = 0.0, seed: int = 0) -> tuple[CardRow, ...]:
    """One row a condition, including `clean`, from results on the same records; items without an image are left out.

    Args:
        results: by condition; `clean` is required.
        tolerance: for numbers, as in `evaluate`.
        seed: of the paired bootstrap.

    Raises:
        ValueError: `clean` is missing, results have different records or samples, or no item has an image.
    """
    if "clean" not in results:
        raise ValueError(f"a perception card needs the condition 'clean', got {', '.join(results)}")
    clean = results["clean"]
    shown = [place for place, item in enumerate(clean.items) if item.images]
    if not shown:
        raise ValueError("a perception card needs items with images")
    anchors = [clean.items[place] for place in shown]
    rows = []
    for name, result in results.items():
        if result.samples != clean.samples or [i.id for i in result.items] != [i.id for i in clean.items]:
            raise ValueError(f"condition {name!r} and 'clean' have different records or samples")
        items = [result.items[place] for place in shown]
        accuracies = [item.accuracy for item in items]
        rows.append(
            CardRow(
                condition=name,
                n=len(items),
                accuracy=Rate.of(accuracies),
                change=paired_bootstrap([item.accuracy for item in anchors], accuracies, seed=seed),
                consistency=Rate.of(
                    [same_answers(item, anchor, tolerance) for item, anchor in zip(items, anchors, strict=True)]
                ),
            )
        )
    return tuple(rows)


def same_answers(item: ItemResult, anchor: ItemResult, tolerance: float = 0.0) -> float:
    r"""Share of an item's samples with the same final answer as the same sample of `anchor`.

    Answers are compared as the rewards do. The final answer is the last `\boxed{...}`; a response without one agrees
    with none. Correctness does not matter. Sample s uses the same random numbers under every condition.
    """
    pairs = [
        (extract_answer(given), extract_answer(expected))
        for given, expected in zip(item.responses, anchor.responses, strict=True)
    ]
    same = [
        bool(given and expected) and answers_match(str(given), str(expected), tolerance=tolerance, choices=item.choices)
        for given, expected in pairs
    ]
    return sum(same) / len(same)
