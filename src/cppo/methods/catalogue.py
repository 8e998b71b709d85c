"""Every method by name, and what choosing one does to options."""

from collections.abc import Container, Mapping
from typing import Any

from cppo.errors import UserError, choose_one
from cppo.methods.blocks import EXECUTION_OPTIONS, Method, Options, declared
from cppo.methods.own import ABLATIONS, OF_CPPO, OURS
from cppo.methods.published import PUBLISHED, cppo

DEFAULT_METHOD = "cppo"
"""What `CPPOConfig.method` is where nothing is said."""
METHODS: Mapping[str, Method] = {
    **{name: declared(name, declaration) for name, declaration in PUBLISHED.items()},
    **{name: Method(name, {**cppo(), **changes}, text + OF_CPPO) for name, (changes, text) in ABLATIONS.items()},
    **{name: declared(name, declaration) for name, declaration in OURS.items()},
}
"""Every method by name: published ones, CPPO's ablations, then ours."""


def get_method(name: str) -> Method:
    """The method of that name. Raises UserError that lists the names."""
    if name not in METHODS:
        raise UserError(f"method = {name!r}: {choose_one(name, METHODS)}")
    return METHODS[name]


def with_method(options: Mapping[str, Any], name: str) -> Options:
    """`options` with what the method sets where they say nothing. Raises UserError for an unknown method."""
    return {**get_method(name).options, **options}


def without_method(options: Mapping[str, Any], own: Container[str]) -> Options:
    """`options` without those that belong to a method (of CPPO's `own`), those that their own method sets, and its
    name.
    """
    name = options.get("method", DEFAULT_METHOD)
    set_by_it = METHODS[name].options if isinstance(name, str) and name in METHODS else {}
    return {
        option: value
        for option, value in options.items()
        if option in EXECUTION_OPTIONS or (option not in own and option not in set_by_it)
    }
