"""Quality of each dependency score as a detector of perception tokens, under each information-removing view.

Greedy answers to generated items with known perception tokens are scored under the image and under I-. The figures are
AUPRC, and precision and recall of the published rule: the top half of the tokens with a positive score. Their intervals
are a percentile bootstrap over whole items. `published` draws I- as CPPO does, from noise rectangles and crops; every
other row draws from one family; the last takes the larger score of two draws, for one more pass. Writes a Markdown
table and, on request, JSON.

    python benchmarks/detectors.py --model start=micro --model trained=runs/micro --json detectors.json
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from cppo.data import Record, load_records
from cppo.evaluation import load_model
from cppo.evaluation.dependency import score_dependency
from cppo.evaluation.detectors import detector_quality, token_truth
from cppo.perception import DEPENDENCY_SCORES, select_perception_tokens
from cppo.views import KNOWN_REMOVING, REMOVING_FAMILIES, ViewSampler

TASKS = ("digits?noise=150", "shapes?noise=90", "chart?noise=90")
VIEWS = {"published": REMOVING_FAMILIES, **{family: (family,) for family in KNOWN_REMOVING}}
AGAIN = "static again"
LARGER = "static, larger of two"
BATCH = 25
TOP_FRACTION = 0.5


def view_samplers(seed: int) -> dict[str, ViewSampler]:
    """Samplers of I- by name: each of `VIEWS`, and the second draw of `LARGER`."""
    samplers = {name: ViewSampler(seed, removing_families=families) for name, families in VIEWS.items()}
    return {**samplers, AGAIN: ViewSampler(seed + 1, removing_families=VIEWS["static"])}


def scored_items(
    model: Any, processor: Any, records: Sequence[Record], samplers: dict[str, ViewSampler], max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Per record, its tokens' truth, and their scores and selection under each I-: lists over tokens."""
    for start in range(0, len(records), BATCH):
        part = [records[place] for place in range(start, min(start + BATCH, len(records)))]
        scored = score_dependency(model, processor, part, samplers, max_new_tokens=max_new_tokens)
        items: list[dict[str, Any]] = [
            {"truth": token_truth(processor, ids, one)} for ids, one in zip(scored.rows, part, strict=True)
        ]
        by_view = dict(scored.scores)
        again = by_view.pop(AGAIN)
        by_view[LARGER] = {score: torch.maximum(values, again[score]) for score, values in by_view["static"].items()}
        for view, scores in by_view.items():
            for score, values in scores.items():
                selected = select_perception_tokens(values, scored.mask, TOP_FRACTION)
                for row, item in enumerate(items):
                    kept = scored.mask[row]
                    item[view, score] = values[row, kept].tolist(), selected[row, kept].tolist()
        yield from items


def quality(items: Sequence[dict[str, Any]], view: str, score: str, resamples: int) -> dict[str, Any]:
    """AUPRC, precision and recall of a score over all items' tokens, with their intervals."""
    values = [np.array(item[view, score][0]) for item in items]
    selected = [np.array(item[view, score][1], dtype=bool) for item in items]
    truths = [np.array(item["truth"], dtype=bool) for item in items]
    found = detector_quality(*(np.concatenate(parts).tolist() for parts in (values, selected, truths)))
    assert found is not None
    counts = np.array([[(s & t).sum(), s.sum(), t.sum()] for s, t in zip(selected, truths, strict=True)])
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(resamples):
        drawn = rng.integers(len(items), size=len(items))
        both, kept, true = counts[drawn].sum(axis=0)
        areas = average_precision_score(*(np.concatenate([parts[one] for one in drawn]) for parts in (truths, values)))
        draws.append((areas, both / kept if kept else np.nan, both / true))
    low, high = np.nanquantile(draws, [0.025, 0.975], axis=0).tolist()
    auprc, precision, recall = zip(low, high, strict=True)
    return {
        "auprc": found.auprc,
        "auprc_ci95": auprc,
        "precision": found.precision,
        "precision_ci95": precision,
        "recall": found.recall,
        "recall_ci95": recall,
        "chance": found.base_rate,
        "tokens": found.tokens,
    }


def table(cells: Sequence[dict[str, Any]]) -> str:
    """A Markdown table per task and model: one row per view, one column per score, AUPRC with its interval."""
    lines = []
    for task, label in dict.fromkeys((cell["task"], cell["model"]) for cell in cells):
        own = [cell for cell in cells if (cell["task"], cell["model"]) == (task, label)]
        lines += [f"\n`{task}`, {label}: AUPRC (chance {own[0]['chance']:.3f})\n"]
        lines += ["| I- | " + " | ".join(DEPENDENCY_SCORES) + " |", "|---" * (len(DEPENDENCY_SCORES) + 1) + "|"]
        for view in dict.fromkeys(cell["view"] for cell in own):
            by_score = {cell["score"]: cell for cell in own if cell["view"] == view}
            shown = [
                "{:.3f} [{:.3f}, {:.3f}]".format(by_score[score]["auprc"], *by_score[score]["auprc_ci95"])
                for score in DEPENDENCY_SCORES
            ]
            lines.append(f"| {view} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="LABEL=NAME|DIR", help="may be repeated")
    parser.add_argument("--task", action="append", metavar="TASK", help=f"default: {', '.join(TASKS)}")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--seed", type=int, default=4001, help="for the items and the views")
    parser.add_argument("--resamples", type=int, default=200, help="of the bootstrap over items")
    parser.add_argument("--max_new_tokens", type=int, default=80)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    samplers = view_samplers(args.seed)
    cells = []
    for entry in args.model:
        label, _, name = entry.partition("=")
        model, processor = load_model(name, device="cpu", dtype=None)
        for task in args.task or TASKS:
            records = load_records(f"tasks:{task}&seed={args.seed}", split="test", limit=args.items)
            items = list(scored_items(model, processor, records, samplers, args.max_new_tokens))
            cells += [
                {
                    "model": label,
                    "task": task,
                    "view": view,
                    "score": score,
                    **quality(items, view, score, args.resamples),
                }
                for view in (*VIEWS, LARGER)
                for score in DEPENDENCY_SCORES
            ]
    print(table(cells))
    if args.json:
        result = {
            "arguments": vars(args),
            "versions": {package: version(package) for package in ("torch", "transformers", "scikit-learn")},
            "threads": torch.get_num_threads(),
            "cells": cells,
        }
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
