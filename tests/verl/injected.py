"""Rollouts made once and injected into both products: the file, its reader, and the trainer's results.

`injected/rollouts.safetensors` holds pixels and tokens, `injected/rollouts.json` the rest. `tests/training/
test_injected_rollouts.py` compares them with the trainer, and rewrites them when it runs as a program.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "injected"
EPOCH = 1
"""The pass over the data of these rollouts, counted from 0."""
SEED = 42
TEMPERATURE = 4.0
"""Sampling temperature. It keeps entropies well above their rounding of 1e-5 nats in both products, where chance would
decide between tokens. At 1 the embedded model is sure of most tokens to 1e-4 nats.
"""
METHODS: dict[str, dict[str, Any]] = {
    "cppo": {},
    "cppo-async": {},
    "cppo-no-gate": {},
    "cppo-all-tokens": {},
    "cppo-positive-only": {},
    "cppo-negative-only": {},
    "cppo-detached-views": {},
    "cppo-score-logp": {},
    "cppo-correct-gate": {"perception_gate_reward": "injected"},
    "papo": {},
    "papo-3b": {},
}
"""Methods that both products run, with additional options."""


@dataclass
class Group:
    """A prompt and its rollouts.

    Attributes:
        text: of the prompt.
        images: before the text.
        sample_id: the row's, if any.
        prompt: token ids, with placeholders of images.
        responses, old_logps: of each rollout, [T].
        rewards, advantages: of each rollout.
    """

    text: str
    images: list[Image.Image]
    sample_id: str | None
    responses: list[Tensor]
    rewards: list[float]
    prompt: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    old_logps: list[Tensor] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)


@dataclass
class Found:
    """The trainer's results for the rollouts under one method.

    Attributes:
        term: the weighted perception loss of all rollouts.
        loss: with GRPO's, over the tokens of all rollouts.
        weights: of each rollout in the perception loss.
        selected: the perception tokens of each rollout, bool [T]; none for gated-out rollouts.
        views: SHA-256 of the pixels of I+ and I- of each image of each prompt with a gated-in rollout.
    """

    term: float
    loss: float
    weights: list[float]
    selected: list[Tensor]
    views: dict[str, list[list[str]]]


def digest(image: Image.Image) -> str:
    """Of an image's size and pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]


def read() -> tuple[list[Group], dict[str, Found]]:
    """The rollouts, and the trainer's results by method."""
    tensors, text = load_file(FOLDER / "rollouts.safetensors"), json.loads((FOLDER / "rollouts.json").read_text())
    groups = [
        Group(
            one["text"],
            [Image.fromarray(pixels.numpy()) for pixels in tensors[f"images/{place}"]] if one["images"] else [],
            one["sample_id"],
            _ragged(tensors[f"responses/{place}"], one["lengths"]),
            one["rewards"],
            tensors[f"prompt/{place}"],
            _ragged(tensors[f"old_logps/{place}"], one["lengths"]),
            one["advantages"],
        )
        for place, one in enumerate(text["groups"])
    ]
    lengths = [length for one in text["groups"] for length in one["lengths"]]
    found = {
        method: Found(**{**one, "selected": _ragged(tensors[f"selected/{method}"].bool(), lengths)})
        for method, one in text["found"].items()
    }
    return groups, found


def write(groups: Sequence[Group], found: dict[str, Found]) -> None:
    """Both files."""
    tensors, rows = {}, []
    for place, group in enumerate(groups):
        if group.images:
            tensors[f"images/{place}"] = torch.stack([_pixels(image) for image in group.images])
        tensors[f"prompt/{place}"] = group.prompt
        tensors[f"responses/{place}"] = torch.cat(group.responses)
        tensors[f"old_logps/{place}"] = torch.cat(group.old_logps)
        rows.append(
            {
                "text": group.text,
                "images": len(group.images),
                "sample_id": group.sample_id,
                "lengths": [len(response) for response in group.responses],
                "rewards": group.rewards,
                "advantages": group.advantages,
            }
        )
    said = {}
    for method, one in found.items():
        tensors[f"selected/{method}"] = torch.cat(one.selected).to(torch.uint8)
        said[method] = {name: value for name, value in vars(one).items() if name != "selected"}
    FOLDER.mkdir(exist_ok=True)
    save_file(tensors, FOLDER / "rollouts.safetensors")
    (FOLDER / "rollouts.json").write_text(json.dumps({"groups": rows, "found": said}, indent=1) + "\n")


def _pixels(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def _ragged(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    return list(values.split(list(lengths)))
