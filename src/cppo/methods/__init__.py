"""Named methods: which views, score, selection, gate and sink a method combines. Imports no torch."""

from cppo.methods.blocks import SHAPING_SINKS, WHOLE_DISTRIBUTIONS, Method, Options
from cppo.methods.catalogue import DEFAULT_METHOD, METHODS, get_method, with_method

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "SHAPING_SINKS",
    "WHOLE_DISTRIBUTIONS",
    "Method",
    "Options",
    "get_method",
    "with_method",
]
