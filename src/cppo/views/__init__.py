"""Perturbed views of an image: I+ keeps what the answer needs, I- removes it (CPPO, arXiv 2601.00501).

Every view is RGB, has the size of the anchor image, and is a pure function of the image and a Generator. The held-out
families are only for evaluation.
"""

from cppo.options.views import (
    KNOWN_PRESERVING,
    KNOWN_REMOVING,
    PRESERVING_FAMILIES,
    REMOVING_FAMILIES,
    ViewStrengths,
)
from cppo.views.draws import (
    CARD_CONDITIONS,
    CONDITION_NAMES,
    EVERY_PRESERVING,
    EVERY_REMOVING,
    any_family_view,
    condition_families,
    family_draws,
)
from cppo.views.held_out import HELD_OUT_PRESERVING, HELD_OUT_REMOVING, held_out_view
from cppo.views.images import image_data_uri, load_rgb
from cppo.views.own import check_families
from cppo.views.room import PixelRoom
from cppo.views.sampler import ViewSampler, stable_sample_id, view_generators, view_sampler
from cppo.views.transforms import View, drawn_view, family_view, preserving_view, removing_view

__all__ = [
    "CARD_CONDITIONS",
    "CONDITION_NAMES",
    "EVERY_PRESERVING",
    "EVERY_REMOVING",
    "HELD_OUT_PRESERVING",
    "HELD_OUT_REMOVING",
    "KNOWN_PRESERVING",
    "KNOWN_REMOVING",
    "PRESERVING_FAMILIES",
    "REMOVING_FAMILIES",
    "PixelRoom",
    "View",
    "ViewSampler",
    "ViewStrengths",
    "any_family_view",
    "check_families",
    "condition_families",
    "drawn_view",
    "family_draws",
    "family_view",
    "held_out_view",
    "image_data_uri",
    "load_rgb",
    "preserving_view",
    "removing_view",
    "stable_sample_id",
    "view_generators",
    "view_sampler",
]
