"""The names of the conditions of `cppo.evaluation`, here because an option is checked before torch is imported."""

from cppo.views.draws import EVERY_PRESERVING, EVERY_REMOVING

CARD_CONDITIONS = ("clean", "blank", "trained_preserving", "held_out_preserving", "held_out_removing")
"""What the perception card shows; `clean` is what the others are compared with."""
CONDITION_NAMES = (*CARD_CONDITIONS, "trained_removing", *EVERY_PRESERVING, *EVERY_REMOVING)
