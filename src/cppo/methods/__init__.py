"""Named methods: each combines views, score, selector, gate and sink. Imports no torch."""

from cppo.methods.blocks import SHAPING_SINKS, STATUSES, WHOLE_DISTRIBUTIONS, Method, Options
from cppo.methods.catalogue import DEFAULT_METHOD, METHODS, get_method, with_method
from cppo.methods.groups import GROUPS, group_of, grouped_methods

__all__ = [
    "DEFAULT_METHOD",
    "GROUPS",
    "METHODS",
    "SHAPING_SINKS",
    "STATUSES",
    "WHOLE_DISTRIBUTIONS",
    "Method",
    "Options",
    "get_method",
    "group_of",
    "grouped_methods",
    "with_method",
]
