"""Views of any family by name, evaluation families too, and several draws of each to look at."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from cppo.options.views import KNOWN_PRESERVING, KNOWN_REMOVING, ViewStrengths
from cppo.views.held_out import HELD_OUT_PRESERVING, HELD_OUT_REMOVING, held_out_view
from cppo.views.sampler import ViewSampler, view_generators
from cppo.views.transforms import View, family_view

EVERY_PRESERVING = (*KNOWN_PRESERVING, *HELD_OUT_PRESERVING)
EVERY_REMOVING = (*KNOWN_REMOVING, *HELD_OUT_REMOVING)
"""The families for training and those held out for evaluation."""
CARD_CONDITIONS = ("clean", "blank", "trained_preserving", "held_out_preserving", "held_out_removing")
"""Conditions of `cppo.evaluation` that the perception card shows, each compared with `clean`."""
CONDITION_NAMES = (*CARD_CONDITIONS, "trained_removing", *EVERY_PRESERVING, *EVERY_REMOVING)
"""All conditions; listed here because options are checked before torch is imported."""


def condition_families(name: str, preserving: Sequence[str], removing: Sequence[str]) -> tuple[str, ...]:
    """The families that a condition draws from: none for `clean` and `blank`; a family's name selects that family.

    Args:
        preserving, removing: the conditions `trained_preserving` and `trained_removing`.
    """
    groups = {
        "clean": (),
        "blank": (),
        "trained_preserving": preserving,
        "trained_removing": removing,
        "held_out_preserving": HELD_OUT_PRESERVING,
        "held_out_removing": HELD_OUT_REMOVING,
    }
    return tuple(groups.get(name, (name,)))


def any_family_view(family: str, image: Image.Image, rng: np.random.Generator, strengths: ViewStrengths) -> View:
    """One draw of a family of `EVERY_PRESERVING` or `EVERY_REMOVING`; held-out families have only one strength.

    Raises UserError where the image cannot be read.
    """
    if family in HELD_OUT_PRESERVING or family in HELD_OUT_REMOVING:
        return held_out_view(family, image, rng)
    return family_view(family, image, rng, strengths)


def family_draws(
    images: Sequence[Image.Image],
    sampler: ViewSampler,
    sample_id: str,
    draws: int,
    families: Sequence[str] | None = None,
) -> Iterator[tuple[View, ...]]:
    """`draws` views of a row's images under each family in turn; training draws one family per image (`ViewSampler`).

    Each view depends only on (seed, sample id, family, draw, image index), not on other families or draws.

    Args:
        families: default: the sampler's, I+ first.

    Raises:
        UserError: an image cannot be read.
    """
    for family in families or (*sampler.preserving_families, *sampler.removing_families):
        for draw in range(draws):
            yield tuple(
                any_family_view(
                    family,
                    image,
                    view_generators(sampler.seed, f"{sample_id}/{family}", draw, index)[0],
                    sampler.strengths,
                )
                for index, image in enumerate(images)
            )
