"""Options of score, selector and gate: which tokens and rollouts a method acts on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError, choose_one
from cppo.fields import method_option

DETECTORS = ("entropy_shift", "entropy_shift_absolute", "entropy", "k3", "kl", "js", "logp_shift")
"""The scores that an evaluation compares, as in `cppo.perception.DEPENDENCY_SCORES`."""


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
        "Score of a token's dependency on the image. From the image and I-: 'entropy_shift', the rise of the token's "
        "entropy relative to its entropy under I- (published), 'entropy_shift_absolute', the same in nats; 'k3' on "
        "the sampled token; exact 'kl' or 'js'; 'logp_shift', the fall of the sampled token's log-probability; "
        "'logp_difference' (ToR), its change in nats; 'logp_difference_relative', as a fraction. From the image "
        "alone: 'entropy'; 'sampled_surprisal', -log p, and 'sampled_entropy', -p log p, of the sampled token (MSSR); "
        "the cosine of its hidden states and the image's: 'image_cosine' in the last layer, 'image_focus' in the last "
        "layer, with more weight late in the response (VGPO), 'image_cosine_layers' over all layers (PEPO). Fused: "
        "'anchored_entropy' (VEPO); 'robust_dependency', with I+ (ours, after PRPO). Or file.py:function.",
    )
    perception_selector: Annotated[
        str, ("top_positive", "top", "bottom", "band", "band_values", "two_sets", "random", "all")
    ] = method_option(
        "top_positive",
        "Tokens selected in a rollout. 'top_positive': the highest scores among the positive ones (published). "
        "'top', 'bottom': the highest, the lowest of all. 'band', 'band_values': scores between two quantiles, two "
        "values. 'two_sets': two weighted sets (ToR). 'random': as many as 'top_positive'. 'all'. Or "
        "file.py:function.",
    )
    perception_selector_scope: Literal["rollout", "batch"] = method_option(
        "rollout",
        "Tokens that a selector compares. 'rollout': all of one rollout (published). 'batch': all of the "
        "generation batch on all processes where the sink shapes advantages, all of a process's micro-batch in a "
        "loss.",
    )
    perception_band: list[float] = method_option(
        [0.2, 0.8],
        "Selectors 'band' and 'band_values': [low, high], quantiles of the score or values of it (nats for scores in "
        "nats).",
    )
    perception_entropy_fraction: Annotated[float, "(0, 1]"] = method_option(
        0.3, "Selector 'two_sets': fraction of tokens in the first set, the ones of highest entropy."
    )
    perception_nucleus: Annotated[float, "(0, 1]"] = method_option(
        0.95,
        "Selector 'two_sets': probability mass of the most probable tokens that this entropy covers, renormalized; 1 "
        "covers the whole vocabulary.",
    )
    perception_set_weights: Annotated[list[float], "[0, inf)"] = method_option(
        [1.0, 0.5],
        "Selector 'two_sets': weight of the first set; weight of the tokens that are only in the second.",
    )
    perception_top_fraction: Annotated[float, "(0, 1]"] = method_option(
        0.5,
        "Fraction of tokens selected: of a rollout's positive scores ('top_positive') or of all its tokens ('top').",
    )
    perception_top_rounding: Literal["floor", "ceil"] = method_option(
        "floor",
        "Rounding of the number of selected tokens. 'floor': down, but at least one (published). 'ceil': up (VPPO, "
        "asynchronous CPPO).",
    )
    perception_gate: Literal["advantage", "correct", "none"] = method_option(
        "advantage",
        "Rollouts that the perception loss uses. 'advantage': those with a positive advantage (published). "
        "'correct': those that perception_gate_reward accepts. 'none': all.",
    )
    perception_gate_reward: str | None = method_option(
        None, "perception_gate='correct': name of the reward function that decides (value > 0)."
    )
    perception_weighting: Literal["equal", "advantage"] = method_option(
        "equal",
        "Weight of a gated-in rollout in the perception loss. 'equal': the same for all (published). 'advantage': "
        "its advantage (needs perception_gate='advantage' and perception_normalization='rollout').",
    )
    perception_rollouts_per_group: Annotated[int | None, "[1, inf)"] = method_option(
        None,
        "Maximum number of gated-in rollouts per group that are scored under the views, for long responses. They are "
        "drawn by the seed and reweighted, so that the expected loss stays the same (needs "
        "perception_normalization='rollout'). Default: all.",
    )


def check_selection(options: Mapping[str, Any]) -> None:
    """Raise UserError where the options of selector and gate contradict each other or the loss's."""
    low_high, weights = options["perception_band"], options["perception_set_weights"]
    if len(low_high) != 2 or low_high[0] > low_high[1]:
        raise UserError(f"perception_band = {low_high}: give two numbers, [low, high]")
    if options["perception_selector"] == "band" and not 0 <= low_high[0] <= low_high[1] <= 1:
        raise UserError(f"perception_band = {low_high}: perception_selector = 'band' takes quantiles, from 0 to 1")
    if len(weights) != 2 or not any(weights):
        raise UserError(f"perception_set_weights = {weights}: give two weights, at least one above 0")
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
    """Raise UserError where the gate 'correct' needs a reward that is not in `rewards`, names of functions."""
    name = options["perception_gate_reward"]
    if options["perception_gate"] == "correct" and name not in rewards:
        hint = choose_one(name, rewards)
        raise UserError(f"perception_gate_reward = {name!r} is not one of the reward functions; {hint}")
