"""Rollouts made once and injected into both products: the file, how it is read, and what the trainer said of them.

`injected/rollouts.safetensors` holds pixels and tokens, `injected/rollouts.json` the rest. `tests/training/
test_injected_rollouts.py` holds them against the trainer, and writes them anew when it is run as a program.
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
"""The pass over the data that the rollouts belong to, counted from 0."""
SEED = 42
TEMPERATURE = 4.0
"""Of sampling. It keeps entropies well above their rounding, of 1e-5 nats in both products, at which tokens are told
apart by chance: at 1 the embedded model is sure of most tokens to 1e-4 nats."""
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
"""Methods that both products run, and options beside."""


@dataclass
class Group:
    """A prompt and its rollouts.

    Attributes:
        text: of the prompt.
        images: before it.
        sample_id: if the row brings one.
        prompt: token ids, placeholders of images included.
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
    """What the trainer says of the rollouts under one method.

    Attributes:
        term: the perception loss of all rollouts, its weight applied.
        loss: with GRPO's, over the tokens of all rollouts.
        weights: of each rollout in the perception loss.
        selected: the perception tokens of each rollout, bool [T]; none of those that are gated out.
        views: SHA-256 of the pixels of I+ and I- of each image of each prompt that a gated-in rollout has.
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
    """The rollouts, and what the trainer said of them by method."""
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
