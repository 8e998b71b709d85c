"""Views as a pure function of (seed, sample id, epoch, image index), so a resumed run sees the same views."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from cppo.errors import UserError
from cppo.options.ascent import ascends
from cppo.options.views import (
    KNOWN_PRESERVING,
    KNOWN_REMOVING,
    PRESERVING_FAMILIES,
    REMOVING_FAMILIES,
    ViewStrengths,
    pictured,
    view_strengths,
)
from cppo.views.images import load_rgb
from cppo.views.own import check_families
from cppo.views.transforms import drawn_view


@dataclass(frozen=True)
class ViewSampler:
    """Draws the two views of an image. It is stateless, so threads and processes may share it.

    Attributes:
        seed: any whole number.
        preserving_families, removing_families: the families of I+ and I-; each is as likely.
        strengths: see `ViewStrengths`.

    Raises:
        UserError: the seed is not a whole number; a list of families is empty or has an unknown or repeated name. The
            message names the option, `preserving_views` or `removing_views`.
    """

    seed: int
    preserving_families: Sequence[str] = PRESERVING_FAMILIES
    removing_families: Sequence[str] = REMOVING_FAMILIES
    strengths: ViewStrengths = field(default_factory=ViewStrengths)

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise UserError(f"seed = {self.seed!r}: give a whole number")
        for kind, known in (("preserving", KNOWN_PRESERVING), ("removing", KNOWN_REMOVING)):
            families = check_families(f"{kind}_views", getattr(self, f"{kind}_families"), known)
            object.__setattr__(self, f"{kind}_families", families)

    def at(self, progress: float) -> "ViewSampler":
        """The sampler with the strengths after a fraction `progress` of a run (`ViewStrengths.at`)."""
        strengths = self.strengths.at(progress)
        return self if strengths is self.strengths else replace(self, strengths=strengths)

    def views(
        self, image: Image.Image, sample_id: str, epoch: int, image_index: int
    ) -> tuple[Image.Image, Image.Image]:
        """The pair (I+, I-) of one image, each RGB and of the size of `load_rgb(image)`.

        I+ and I- have separate random streams, so the options of one do not change the draws of the other.

        Args:
            image: any PIL image; not changed.
            sample_id: the row's stable id.
            epoch: the pass over the data, a whole number.
            image_index: the index of the image in its row, from 0.

        Raises:
            UserError: the image cannot be read.
        """
        preserving_rng, removing_rng = view_generators(self.seed, sample_id, epoch, image_index)
        rgb = load_rgb(image)
        return (
            drawn_view(self.preserving_families, rgb, preserving_rng, self.strengths),
            drawn_view(self.removing_families, rgb, removing_rng, self.strengths),
        )


def view_sampler(options: Mapping[str, Any]) -> ViewSampler:
    """The view sampler that a run's options describe; for a view of the model's inputs, the sampler of its stand-in
    (`pictured`).

    Raises:
        UserError: a family, also of rollouts, or a strength is invalid.
    """
    if options["rollout_views"] and not ascends(options):
        check_families("rollout_views", options["rollout_views"], KNOWN_PRESERVING)
    removing = pictured(options["removing_views"])
    return ViewSampler(options.get("seed", 42), options["preserving_views"], removing, view_strengths(options))


def view_generators(
    seed: int, sample_id: str, epoch: int, image_index: int
) -> tuple[np.random.Generator, np.random.Generator]:
    """The random streams of I+ and I-: PCG64, seeded with the SHA-256 of the arguments as a JSON list."""
    key = json.dumps([seed, sample_id, epoch, image_index]).encode()
    root = np.random.SeedSequence(int.from_bytes(hashlib.sha256(key).digest(), "little"))
    preserving, removing = root.spawn(2)
    return np.random.Generator(np.random.PCG64(preserving)), np.random.Generator(np.random.PCG64(removing))


def stable_sample_id(prompt: str | list[dict[str, Any]], images: Sequence[Image.Image] | None) -> str:
    """An id for a row without one: 32 hexadecimal digits from its prompt and its pixels under `load_rgb`.

    The same content gets the same id in every process, row order and run. Equal rows share an id.

    Args:
        prompt: text, or chat messages of JSON values.
        images: the row's images; None or an empty list for text only.

    Raises:
        UserError: an image cannot be read, or the messages hold anything except text, numbers and lists.
    """
    try:
        text = json.dumps(prompt, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"prompt: {error}; give text, or chat messages of plain text") from error
    digest = hashlib.sha256(text.encode())
    for image in images or ():
        rgb = load_rgb(image)
        # JSON holds no zero byte, and each size gives the byte count that follows: two rows never run together.
        digest.update(b"\0%dx%d:" % rgb.size)
        digest.update(rgb.tobytes())
    return digest.hexdigest()[:32]
