"""What the method acts on: the score of a token, the selector of tokens, the gate of rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError, choose_one
from cppo.fields import method_option


@dataclass
class SelectionOptions:
    """Options of score, selector and gate."""

    perception_score: Annotated[
        str, ("entropy_shift", "entropy_shift_absolute", "entropy", "k3", "kl", "js", "logp_shift")
    ] = method_option(
        "entropy_shift",
        "How a token's dependency on the image is scored: rise of its entropy under I-, relative to that entropy "
        "(published) or in nats ('entropy_shift_absolute'), its entropy under the image alone, 'k3' on the sampled "
        "token or exact 'kl' or 'js' of anchor and I-, fall of the sampled token's log-probability ('logp_shift'), or "
        "file.py:function.",
    )
    perception_selector: Annotated[str, ("top_positive", "top", "random", "all")] = method_option(
        "top_positive",
        "Tokens selected in a rollout: the best-scored of those with a positive score (published), of all, random "
        "ones, as many as 'top_positive' selects, all, or those that file.py:function selects.",
    )
    perception_top_fraction: Annotated[float, "(0, 1]"] = method_option(
        0.5,
        "Fraction of a rollout's tokens with a positive dependency score ('top_positive'), or of all its tokens "
        "('top'), that are selected.",
    )
    perception_top_rounding: Literal["floor", "ceil"] = method_option(
        "floor",
        "How that number of tokens is rounded: down, but to at least one (published), or up (VPPO, asynchronous CPPO).",
    )
    perception_gate: Literal["advantage", "correct", "none"] = method_option(
        "advantage",
        "Rollouts that the perception loss learns from: those with a positive advantage (published), those that "
        "`perception_gate_reward` calls correct, or all.",
    )
    perception_gate_reward: str | None = method_option(
        None, "Name of the reward function that decides for perception_gate='correct' (value > 0)."
    )
    perception_weighting: Literal["equal", "advantage"] = method_option(
        "equal",
        "How much each gated-in rollout counts in the perception loss: all alike (published), or by its advantage "
        "(needs perception_gate='advantage' and perception_normalization='rollout').",
    )
    perception_rollouts_per_group: Annotated[int | None, "[1, inf)"] = method_option(
        None,
        "At most so many gated-in rollouts of a group are scored under the views, drawn by the seed and weighted so "
        "that the loss keeps its expectation: for long responses (needs perception_normalization='rollout'). Without "
        "it all are.",
    )


def check_selection(options: Mapping[str, Any]) -> None:
    """Hold the options of the gate against each other and against the loss's. Raises UserError."""
    if options["perception_gate"] == "correct" and not options["perception_gate_reward"]:
        raise UserError(
            "perception_gate = 'correct' needs perception_gate_reward, the name of the reward function that decides"
        )
    bound = options["perception_rollouts_per_group"]
    normalization = options["perception_normalization"]
    if bound is not None and normalization != "rollout":
        raise UserError(
            f"perception_rollouts_per_group = {bound} needs perception_normalization = 'rollout': "
            f"{normalization!r} divides by the selected tokens of all rollouts"
        )
    if options["perception_weighting"] == "advantage":
        for name, needed in (("perception_gate", "advantage"), ("perception_normalization", "rollout")):
            if options[name] != needed:
                raise UserError(
                    f"perception_weighting = 'advantage' needs {name} = {needed!r}, but {name} = {options[name]!r}"
                )


def check_gate_reward(options: Mapping[str, Any], rewards: Sequence[str]) -> None:
    """Whether the reward by which the gate `correct` decides is one of `rewards`, the names of the reward functions.

    Raises UserError if it is not.
    """
    name = options["perception_gate_reward"]
    if options["perception_gate"] == "correct" and name not in rewards:
        hint = choose_one(name, rewards)
        raise UserError(f"perception_gate_reward = {name!r} is none of the reward functions; {hint}")
