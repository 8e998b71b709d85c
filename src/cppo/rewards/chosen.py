"""The rewards of a run: the given ones, and those that define its method."""

from collections.abc import Sequence
from typing import Any

from cppo.methods import get_method

DEFAULT_REWARDS = ("accuracy", "format")
DEFAULT_WEIGHTS = (0.9, 0.1)
OF_METHOD = "method"
"""The name, among a run's rewards, for the rewards of its method."""


def chosen_rewards(given: Sequence[Any] | None, method: str) -> tuple[list[Any], list[float]]:
    """The rewards of a run and their default weights.

    Args:
        given: names as in the option `rewards`, or functions. "method" means the rewards of the method, or the default
            ones if it has none; None means the same. Every other reward has weight 1.
        method: the method's name.

    Raises:
        UserError: there is no such method.
    """
    own = get_method(method).rewards or dict(zip(DEFAULT_REWARDS, DEFAULT_WEIGHTS, strict=True))
    names: list[Any] = []
    weights: list[float] = []
    for name in given or (OF_METHOD,):
        of_method = isinstance(name, str) and name == OF_METHOD
        names += own if of_method else [name]
        weights += own.values() if of_method else [1.0]
    return names, weights


def trainer_rewards(given: Any, method: str) -> tuple[Any, list[float] | None]:
    """A trainer's rewards; "method" means the method's rewards, as does None if the method has any.

    Returns the weights too if some rewards are the method's, else None. Raises UserError as `chosen_rewards` does.
    """
    own = get_method(method).rewards
    if given is None and own:
        return chosen_rewards(None, method)
    listed = list(given) if isinstance(given, list | tuple) else [given]
    if any(isinstance(one, str) and one == OF_METHOD for one in listed):
        return chosen_rewards(listed, method)
    return given, None
