"""What the method acts on: the score of a token, the selector of tokens, the gate of rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError, choose_one
from cppo.fields import method_option

DETECTORS = ("entropy_shift", "entropy_shift_absolute", "entropy", "k3", "kl", "js", "logp_shift")
"""The scores that an evaluation compares, `cppo.perception.DEPENDENCY_SCORES`."""


@dataclass
class SelectionOptions:
    """Options of score, selector and gate."""

    perception_score: Annotated[
        str,
        (
            *DETECTORS,
            *("logp_difference", "logp_difference_relative", "sampled_surprisal", "sampled_entropy"),
            *("image_cosine", "image_cosine_layers", "image_focus", "anchored_entropy", "robust_dependency"),
        ),
    ] = method_option(
        "entropy_shift",
        "How a token's dependency on the image is scored: rise of its entropy under I-, relative to that entropy "
        "(published) or in nats ('entropy_shift_absolute'), its entropy under the image alone, 'k3' on the sampled "
        "token or exact 'kl' or 'js' of anchor and I-, fall of the sampled token's log-probability ('logp_shift') or "
        "its change in nats ('logp_difference', ToR) or as a fraction ('..._relative'). Without a second pass: -log p "
        "or -p log p of the sampled token ('sampled_surprisal', 'sampled_entropy', MSSR), the cosine of its hidden "
        "states with the image's in the last layer ('image_cosine'), weighted late ('image_focus', VGPO) or over all "
        "layers ('image_cosine_layers', PEPO). Fused: 'anchored_entropy' (VEPO), 'robust_dependency' on I- and I+ "
        "(ours, after PRPO). Or file.py:function.",
    )
    perception_selector: Annotated[
        str, ("top_positive", "top", "bottom", "band", "band_values", "two_sets", "random", "all")
    ] = method_option(
        "top_positive",
        "Tokens selected in a rollout: the best-scored of those with a positive score (published), of all, the "
        "worst-scored of all ('bottom'), those between two quantiles of the score ('band') or two values of it "
        "('band_values'), two sets with a weight each ('two_sets', ToR), random ones, as many as 'top_positive' "
        "selects, all, or those that file.py:function selects.",
    )
    perception_selector_scope: Literal["rollout", "batch"] = method_option(
        "rollout",
        "The tokens that a selector compares: a 'rollout''s (published), or those of the 'batch': of the whole "
        "generation batch on all processes where the advantages are shaped, of a process's micro-batch in a loss.",
    )
    perception_band: list[float] = method_option(
        [0.2, 0.8],
        "Selectors 'band' and 'band_values': [low, high], as quantiles of the score or as its values (in nats, where "
        "the score is).",
    )
    perception_entropy_fraction: Annotated[float, "(0, 1]"] = method_option(
        0.3, "Selector 'two_sets': fraction of the tokens of highest entropy that make the first set."
    )
    perception_nucleus: Annotated[float, "(0, 1]"] = method_option(
        0.95,
        "Selector 'two_sets': the probability of the most probable tokens over which that entropy is taken, "
        "renormalized; 1 takes the whole vocabulary.",
    )
    perception_set_weights: Annotated[list[float], "[0, inf)"] = method_option(
        [1.0, 0.5],
        "Selector 'two_sets': weights of the first set, and of the tokens of the second that are not in the first.",
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
    """Hold the options of selector and gate against each other and against the loss's. Raises UserError."""
    low_high, weights = options["perception_band"], options["perception_set_weights"]
    if len(low_high) != 2 or low_high[0] > low_high[1]:
        raise UserError(f"perception_band = {low_high}: give two numbers, [low, high]")
    if options["perception_selector"] == "band" and not 0 <= low_high[0] <= low_high[1] <= 1:
        raise UserError(f"perception_band = {low_high}: perception_selector = 'band' takes quantiles, from 0 to 1")
    if len(weights) != 2 or not any(weights):
        raise UserError(f"perception_set_weights = {weights}: give two weights, of which one at least is above 0")
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
