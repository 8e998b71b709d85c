"""Methods in groups, by their effect on perception. A method's options decide its group."""

from collections.abc import Mapping

from cppo.methods.blocks import SHAPING_SINKS, Method
from cppo.methods.catalogue import METHODS
from cppo.methods.own import ABLATIONS, OURS

GROUPS: Mapping[str, str] = {
    "baselines": "RL alone, without any view of the image",
    "losses": "A loss added to the RL loss: how the policy changes with the image, or over its tokens",
    "advantages": "Advantages shaped token by token; no added loss",
    "rollouts": "Rollouts or prompts that see another image",
    "rewards": "Rewards for perception; prompts must ask for the form that they check",
    "ablations": "CPPO with one part changed",
    "ours": "Ours",
}
"""What the methods of each group do, in display order."""


def group_of(method: Method) -> str:
    """The group of a method, a key of `GROUPS`."""
    if method.name in ABLATIONS:
        return "ablations"
    if method.name in OURS:
        return "ours"
    sink = method.options["perception_sink"]
    if method.rewards.keys() - {"accuracy"}:
        return "rewards"
    if method.options.get("rollout_views"):
        return "rollouts"
    if sink == "none":
        return "baselines"
    return "advantages" if sink in SHAPING_SINKS else "losses"


def grouped_methods() -> dict[str, list[Method]]:
    """All methods by group, in the order of `GROUPS` and of the catalogue."""
    grouped: dict[str, list[Method]] = {group: [] for group in GROUPS}
    for method in METHODS.values():
        grouped[group_of(method)].append(method)
    return grouped
