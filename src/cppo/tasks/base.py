"""Shared by the task families: the item, the options, the random streams, and the marked-up response.

A family draws a `Sketch` from a scene generator; `cppo.tasks.make_item` turns it into a `TaskItem`. Nothing here is
global or mutable: an item is a function of (family, options, seed, index, split) alone.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from cppo.errors import UserError, choose_one

IMAGE_SIDE = 64
SPLITS = ("train", "test")
ITEM_OPTIONS = ("seed", "n", "split")
"""Entries of a data spec, beside `TaskOptions`, that choose the items of any family."""
ASKS = ("reason", "name")
TEST_SHARE = 4
"""One generated scene in `TEST_SHARE` belongs to the test split."""


@dataclass(frozen=True)
class TaskItem:
    """One question about one picture.

    Attributes:
        id: names (family, split, seed, index) and every option that is not at its default.
        prompt: the question as plain text, without image placeholder or format instruction.
        image: RGB, 64x64 pixels.
        answer: the content of the box.
        response: the reference response, "<think> ... </think> \\boxed{answer}".
        perception_spans: [start, end) character spans of `response` that are read from the image at that place. Later
            repetitions and computed results are excluded, although they depend on the image too.
    """

    id: str
    prompt: str
    image: Image.Image
    answer: str
    response: str
    perception_spans: tuple[tuple[int, int], ...]

    @property
    def facts(self) -> list[str]:
        """The sentences of `response` with a part that is read from the image, without their full stops."""
        sentences = re.finditer(r"[^.>]+(?=\.)", self.response)
        spans = self.perception_spans
        return [one[0].strip() for one in sentences if any(one.start() <= start < one.end() for start, _ in spans)]


@dataclass(frozen=True)
class TaskOptions:
    """Options of every family.

    Attributes:
        noise: standard deviation of the Gaussian pixel noise, in grey levels, 0 to 255.
        level: difficulty 1, 2 or 3, defined in each family's module.
        prior: probability, 0 to 1, that the wording of a TRAIN question tells its answer's half: the first wording
            means the lower half, the second the upper half. Test items ignore it.
        ask: "reason" for the family's questions, "name" for the warm-up that only lists what is seen.

    Raises:
        UserError: a value is out of range.
    """

    noise: float = 0.0
    level: int = 1
    prior: float = 0.0
    ask: str = "reason"

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 255:
            raise UserError(f"noise={self.noise:g}: give a standard deviation between 0 and 255 grey levels")
        if self.level not in (1, 2, 3):
            raise UserError(f"level={self.level}: give 1, 2 or 3")
        if not 0 <= self.prior <= 1:
            raise UserError(f"prior={self.prior:g}: give a probability between 0 and 1")
        if self.ask not in ASKS:
            raise UserError(f"ask={self.ask}: give {' or '.join(ASKS)}")

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> "TaskOptions":
        """Options from the text of a data spec. Raises UserError for an unknown name or a bad value."""
        kinds: dict[str, type] = {field.name: type(field.default) for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in options.items():
            if name not in kinds:
                raise UserError(f"unknown task option {name!r}; {choose_one(name, (*ITEM_OPTIONS, *kinds))}")
            try:
                values[name] = kinds[name](text)
            except ValueError:
                kind = "a whole number" if kinds[name] is int else "a number"
                raise UserError(f"{name}={text}: give {kind}") from None
        return cls(**values)

    def changed(self) -> str:
        """The options that are not at their default, as "-name=value" each; part of an item's id."""
        changed = [(field.name, getattr(self, field.name)) for field in fields(self)]
        defaults = {field.name: field.default for field in fields(self)}
        return "".join(f"-{name}={value}" for name, value in changed if value != defaults[name])


@dataclass(frozen=True)
class Sketch:
    """A family's drawing: the question, the clean picture, and the reasoning with marked readings.

    Attributes:
        prompt: the question.
        picture: RGB, 64x64 pixels, without noise.
        reasoning: text with every reading from the image in square brackets.
        answer: the content of the box.
    """

    prompt: str
    picture: Image.Image
    reasoning: str
    answer: str


def item_streams(family: str, seed: int, index: int, split: str) -> tuple[np.random.Generator, np.random.Generator]:
    """The random generators of the scene and of the pixel noise.

    They ignore the options, so the same index shows the same scene at any noise.
    """
    digest = hashlib.sha256(f"{family}|{seed}|{index}|{split}".encode()).digest()
    scene, noise = np.random.SeedSequence(int.from_bytes(digest)).spawn(2)
    return np.random.default_rng(scene), np.random.default_rng(noise)


def draw_wording(rng: np.random.Generator, prior: float, split: str) -> tuple[int, bool]:
    """The wording of a question (0 or 1), and whether its answer comes from the lower half.

    Each is a fair coin, so wordings and answers have the same shares in both splits and at every `prior`; only their
    correlation differs.
    """
    wording = int(rng.integers(2))
    tied, lower = rng.random() < prior, rng.random() < 0.5
    return wording, wording == 0 if tied and split == "train" else lower


def draw_from_half(rng: np.random.Generator, domain: Sequence[Any], lower: bool) -> Any:
    """One element of the ordered `domain`'s lower or upper half; uniform if `lower` is a fair coin."""
    place = rng.random() / 2 + (0 if lower else 0.5)
    return domain[int(place * len(domain))]


def scene_split(facts: object) -> str:
    """The split of a scene with these facts, by a hash of the facts: no scene is in both."""
    return "test" if hashlib.sha256(repr(facts).encode()).digest()[0] % TEST_SHARE == 0 else "train"


def pick(rng: np.random.Generator, choices: Sequence[Any] | np.ndarray) -> Any:
    """One element, uniformly (much faster than `rng.choice` on a short sequence)."""
    return choices[int(rng.integers(len(choices)))]


def listed(words: Sequence[object]) -> str:
    """The words as an English list, each marked as read from the image: "[3], [5] and [2]"."""
    texts = [f"[{word}]" for word in words]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def compare_pairs(pairs: Sequence[tuple[int, int]]) -> tuple[int, str, int]:
    """Which of two pairs has the larger sum (0 or 1), the marked reasoning, and the difference (0: a tie)."""
    totals = [sum(pair) for pair in pairs]
    high, low = max(totals), min(totals)
    seen = ", ".join(listed(pair) for pair in pairs)
    sums = " ".join(f"{a} + {b} = {a + b}." for a, b in pairs)
    return totals.index(high), f"I see {seen}. {sums} {high} - {low} = {high - low}.", high - low


def write_response(reasoning: str, answer: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The response text and its perception spans, from reasoning with readings in square brackets."""
    text, spans = "<think> ", []
    for position, part in enumerate(re.split(r"[\[\]]", reasoning)):
        if position % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return f"{text} </think> \\boxed{{{answer}}}", tuple(spans)


def add_noise(picture: Image.Image, noise: float, rng: np.random.Generator) -> Image.Image:
    """The picture with Gaussian pixel noise of this standard deviation, rounded and clipped to 0..255."""
    if not noise:
        return picture
    pixels = np.asarray(picture)
    noisy = np.rint(pixels + noise * rng.standard_normal(pixels.shape, dtype=np.float32))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
