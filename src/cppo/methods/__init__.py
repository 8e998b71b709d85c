"""Named methods: which views, score, selection, gate and sink a method combines. Imports no torch."""

from cppo.methods.blocks import EXECUTION_OPTIONS, SHAPING_SINKS, WHOLE_DISTRIBUTIONS, Method, Options
from cppo.methods.catalogue import DEFAULT_METHOD, METHODS, get_method, with_method, without_method

__all__ = [
    "DEFAULT_METHOD",
    "EXECUTION_OPTIONS",
    "METHODS",
    "SHAPING_SINKS",
    "WHOLE_DISTRIBUTIONS",
    "Method",
    "Options",
    "get_method",
    "with_method",
    "without_method",
]
