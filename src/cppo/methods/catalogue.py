"""Every method by name, and what choosing one does to options."""

from collections.abc import Mapping
from typing import Any

from cppo.errors import UserError, choose_one
from cppo.methods.blocks import Method, Options, declared
from cppo.methods.own import ABLATIONS, OF_CPPO, OURS
from cppo.methods.published import PUBLISHED, cppo
from cppo.methods.rewarded import REWARDED
from cppo.methods.reweighting import REWEIGHTING

DEFAULT_METHOD = "cppo"
"""The default of `CPPOConfig.method`."""
METHODS: Mapping[str, Method] = {
    **{name: declared(name, declaration) for name, declaration in {**PUBLISHED, **REWARDED, **REWEIGHTING}.items()},
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
