"""The names of the conditions of `cppo.evaluation`, here because an option is checked before torch is imported."""

from cppo.views.held_out import HELD_OUT_PRESERVING, HELD_OUT_REMOVING
from cppo.views.strengths import PRESERVING_FAMILIES, REMOVING_FAMILIES

CARD_CONDITIONS = ("clean", "blank", "trained_preserving", "held_out_preserving", "held_out_removing")
"""What the perception card shows; `clean` is what the others are compared with."""
CONDITION_NAMES = tuple(
    dict.fromkeys(
        (
            *CARD_CONDITIONS,
            "trained_removing",
            *HELD_OUT_PRESERVING,
            *HELD_OUT_REMOVING,
            *PRESERVING_FAMILIES,
            *REMOVING_FAMILIES,
        )
    )
)
