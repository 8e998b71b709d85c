"""Options of the sink: a loss on the divergences under the views, or a shaping of advantages by the scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError
from cppo.fields import method_option
from cppo.imports import is_own
from cppo.methods import SHAPING_SINKS, WHOLE_DISTRIBUTIONS

TOKEN_MEANS = ("dapo", "bnpo", "cispo", "vespo")
"""Values of TRL's `loss_type` that average over tokens, not over rollouts."""
ENTROPY_WEIGHTS = ("perception_removing_entropy_weight", "perception_preserving_entropy_weight")


@dataclass
class SinkOptions:
    """Options of the sink."""

    perception_sink: Annotated[
        str,
        ("contrast", "divergence", "covariance_kl", *SHAPING_SINKS, "none"),
        {"advantage": "mask_advantage", "weights": "scale_advantage"},
    ] = method_option(
        "contrast",
        "What the selected tokens change. A loss: 'contrast' (published), softplus((w+ d+ - w- d-) / tau); "
        "'divergence', w+ d+ - w- d-; 'covariance_kl', a KL to another policy, weighted by the token's covariance "
        "(SENT). The advantages: 'mask_advantage' keeps them only at selected tokens and weights rollouts by score "
        "(VPPO); 'scale_advantage' weights each token by its score (PGPO), 'softmax_advantage' by a softmax over "
        "scores (PEPO), 'factor_advantage' by factors of token and rollout (VGPO); 'add_advantage' adds a bonus by "
        "score (MSSR). file.py:function: your loss or shaping. 'none': RL loss alone.",
    )
    perception_weight: Annotated[float, "[0, inf)"] = method_option(
        0.01, "Weight lambda of the perception loss. 0 removes the loss and the passes that only it needs."
    )
    perception_preserving_weight: Annotated[float, "[0, inf)"] = method_option(
        1.0, "Weight w+ of the divergence from I+; 0 skips its passes."
    )
    perception_removing_weight: Annotated[float, "[0, inf)"] = method_option(
        1.0, "Weight w- of the divergence from I-."
    )
    perception_removing_entropy_weight: Annotated[float, "[0, inf)"] = method_option(
        0.0,
        "Weight of a penalty on the entropy under I-, averaged over all response tokens of the scored rollouts "
        "(PAPO). For the entropy under the image, use TRL's entropy_coef with a negative value.",
    )
    perception_preserving_entropy_weight: Annotated[float, "[0, inf)"] = method_option(
        0.0, "Weight of the same penalty on the entropy under I+ (DVRP)."
    )
    perception_temperature: Annotated[float, "(0, inf)"] = method_option(
        0.1, "Temperature tau of the contrast, in nats."
    )
    perception_divergence: Literal["k1", "k3", "kl", "js", "nll"] = method_option(
        "k3",
        "Divergence between image and view. On the sampled token: 'k3' (published), 'k1' (asynchronous CPPO). Exact "
        "over the vocabulary: 'kl', 'js'. 'nll': negative log-probability of the sampled token under the view.",
    )
    perception_normalization: Literal["rollout", "token", "microbatch"] = method_option(
        "rollout",
        "Mean in the perception loss. 'rollout': over a rollout's selected tokens, then over the gated-in rollouts "
        "of the step (of the generation batch, split evenly, where it serves several steps). 'token': over the "
        "step's selected tokens; needs one more pass to find them. 'microbatch' (published): over a micro-batch's "
        "selected tokens, so it depends on the micro-batch size.",
    )
    perception_view_policy: Literal["current", "rollout"] = method_option(
        "current",
        "Policy that scores the views in the perception loss. 'current': the policy of each update (published). "
        "'rollout': the policy before the updates, once per generation batch (PAPO's code; needs "
        "perception_view_gradients=false).",
    )
    perception_view_gradients: bool = method_option(
        True, "Whether gradients also flow through the pass under the views (published)."
    )
    perception_anchor_gradients: bool = method_option(
        True,
        "Whether gradients also flow through the pass under the image (published). Without them, the policy under "
        "the image is a fixed target for the views, and only RL changes it.",
    )
    perception_advantage_floor: Annotated[float, "[0, 1]"] = method_option(
        0.9,
        "Sinks 'mask_advantage' and 'factor_advantage': smallest weight of a rollout's advantage. In "
        "'mask_advantage', 1 weights all rollouts equally.",
    )
    perception_advantage_scope: Literal["batch", "minibatch"] = method_option(
        "batch",
        "Sink 'mask_advantage': which rollouts' scores are compared. 'batch': all of the generation batch. "
        "'minibatch' (VPPO): the smallest and largest score come from a process's rollouts of one optimizer step; "
        "the mean weight is 1 in each micro-batch, so it depends on the micro-batch size.",
    )
    perception_advantage_mean: Literal["all", "selected"] = method_option(
        "all",
        "Sinks that shape advantages: tokens in the mean of the RL loss. 'all': all response tokens. 'selected': the "
        "selected tokens of the generation batch (VEPO), by one factor on all advantages; needs a loss_type that "
        "averages over tokens, such as 'dapo'.",
    )
    perception_shaping_weight: Annotated[float, "[0, 1]"] = method_option(
        1.0,
        "Sinks that shape advantages: share of the shaped advantage; the rollout's own advantage has the rest (PEPO, "
        "with a schedule).",
    )
    perception_weight_threshold: Annotated[float, "(0, 1)"] = method_option(
        0.4, "Sink 'scale_advantage': value of log(1 + score), scaled to [0, 1] within a rollout, that has weight 1."
    )
    perception_weight_slope: Annotated[float, "[0, inf)"] = method_option(
        2.0, "Sink 'scale_advantage': growth of the weight from that value to the best score."
    )
    perception_bonus_weight: Annotated[float, "[0, inf)"] = method_option(
        0.4, "Sink 'add_advantage': weight of the score in a token's bonus."
    )
    perception_bonus_limit: Annotated[float, "[0, 1]"] = method_option(
        0.5, "Sink 'add_advantage': largest bonus, as a fraction of the rollout's absolute advantage."
    )
    perception_softmax_gate: Annotated[float, "[0, 1)"] = method_option(
        0.05, "Sink 'softmax_advantage': strength of the gate by score and entropy."
    )
    perception_softmax_temperature: Annotated[float, "(0, inf)"] = method_option(
        1.8, "Sink 'softmax_advantage': temperature of the softmax over a rollout's scores."
    )
    perception_kl_target: Literal["old", "reference"] = method_option(
        "old",
        "Sink 'covariance_kl': policy that the KL is measured to. 'old': the policy that made the rollouts (SENT's "
        "code). 'reference': the reference (SENT's paper; needs beta > 0).",
    )
    perception_kl_weights: Annotated[list[float], "[0, inf)"] = method_option(
        [2.0, 0.5], "Sink 'covariance_kl': weights of tokens with high and with low covariance."
    )
    perception_covariance_fraction: Annotated[float, "(0, 0.5]"] = method_option(
        0.0002,
        "Sink 'covariance_kl': fraction of the selected tokens with the high weight; as many have the low weight, at "
        "least one each (SENT's code).",
    )
    perception_covariance_threshold: float | None = method_option(
        None,
        "Sink 'covariance_kl': covariance above which a token has the high weight; all others have the low weight "
        "(SENT's paper). Default: the fraction decides.",
    )


def check_sink(options: Mapping[str, Any], shapes_advantages: bool | None) -> None:
    """Raise UserError where the sink's options contradict each other or those of other blocks.

    `shapes_advantages` is None for a sink of the user's that is not imported yet; rules that depend on it are then
    skipped.
    """
    if not (options["perception_view_gradients"] or options["perception_anchor_gradients"]):
        raise UserError(
            "perception_view_gradients and perception_anchor_gradients are both false: the perception term trains "
            "nothing; set perception_sink = 'none' to train without it"
        )
    sink = options["perception_sink"]
    shapes = sink in SHAPING_SINKS if shapes_advantages is None else shapes_advantages
    if shapes_advantages is None and is_own(sink):
        return
    if shapes:
        _check_shaping(options)
    elif sink != "none" and options["perception_selector"] == "two_sets":
        raise UserError(
            f"perception_selector = 'two_sets' weights tokens, which perception_sink = {sink!r} does not use: choose "
            "'mask_advantage'"
        )
    entropy_weight = next((name for name in ENTROPY_WEIGHTS if options[name]), None)
    if entropy_weight and options["perception_normalization"] == "token" and options["perception_selector"] != "all":
        raise UserError(
            f"{entropy_weight} averages over all response tokens: perception_normalization = 'token' then needs "
            "perception_selector = 'all'"
        )
    adds_loss, by_rollout = not shapes and sink != "none", options["perception_view_policy"] == "rollout"
    if adds_loss and entropy_weight and not (options["perception_view_gradients"] or by_rollout):
        raise UserError(f"{entropy_weight} trains the policy under the view: set perception_view_gradients = true")
    if adds_loss and by_rollout:
        _check_rollout_policy(options)
    same_weights = options["perception_preserving_weight"] == options["perception_removing_weight"]
    cancels = sink == "contrast" and options["perception_divergence"] == "k1" and same_weights
    if cancels and options["perception_weight"] and not options["perception_view_gradients"]:
        raise UserError(
            "perception_divergence = 'k1' has a gradient only through the views, because the anchor cancels: set "
            "perception_view_gradients = true"
        )
    if sink == "covariance_kl":
        _check_split(options)
    compares = options["perception_preserving_weight"] or options["perception_removing_weight"]
    if adds_loss and options["perception_weight"] and not (compares or entropy_weight):
        raise UserError(
            "perception_preserving_weight and perception_removing_weight are both 0: the loss then has no term of "
            "the views; set perception_sink = 'none' to train without it"
        )
    if adds_loss and options["perception_weight"] and options["perception_divergence"] == "nll":
        if not options["perception_view_gradients"]:
            raise UserError(
                "perception_divergence = 'nll' trains the policy under the views: set perception_view_gradients = true"
            )
        if sink == "divergence" and options["perception_removing_weight"]:
            raise UserError(
                "perception_divergence = 'nll' has no upper bound, and perception_sink = 'divergence' would raise it "
                "forever: set perception_removing_weight = 0 or perception_sink = 'contrast'"
            )
    trains = adds_loss and (options["perception_weight"] or entropy_weight)
    if not options["rl_weight"] and not trains:
        raise UserError("rl_weight = 0 leaves nothing to train: perception_sink or perception_weight adds no loss")
    # Without steps_per_generation, TRL uses gradient_accumulation_steps.
    steps, accumulation = options.get("steps_per_generation"), options.get("gradient_accumulation_steps") or 1
    if options["perception_normalization"] == "token" and steps is not None and steps % accumulation:
        raise UserError(
            f"perception_normalization = 'token' needs the rollouts of a whole step at once, but steps_per_generation "
            f"= {steps} is not a multiple of gradient_accumulation_steps = {accumulation}"
        )


def _check_split(options: Mapping[str, Any]) -> None:
    """Raise UserError for options that contradict the sink `covariance_kl`, which uses no view."""
    if len(options["perception_kl_weights"]) != 2:
        raise UserError(f"perception_kl_weights = {options['perception_kl_weights']}: give two weights, [high, low]")
    for name in ENTROPY_WEIGHTS:
        if options[name]:
            raise UserError(f"{name} needs a view, but perception_sink = 'covariance_kl' uses none: set 0")
    if options["perception_kl_target"] == "reference" and not options.get("beta", 1.0):
        raise UserError("perception_kl_target = 'reference' needs a reference, which TRL loads for beta > 0: set beta")
    if options["perception_normalization"] == "token" and options["perception_selector"] != "all":
        raise UserError(
            "perception_sink = 'covariance_kl' averages over all response tokens: perception_normalization = 'token' "
            "then needs perception_selector = 'all'"
        )


def _check_rollout_policy(options: Mapping[str, Any]) -> None:
    """Raise UserError for options that contradict views scored once, when the rollouts are made."""
    if options["perception_view_gradients"]:
        raise UserError(
            "perception_view_policy = 'rollout' scores views without gradient: set perception_view_gradients = false"
        )
    compared = ["perception_divergence"]
    if options["perception_selector"] != "all":
        compared.append("perception_score")
    for name in compared:
        if options[name] in WHOLE_DISTRIBUTIONS:
            raise UserError(
                f"{name} = {options[name]!r} compares full distributions, but perception_view_policy = 'rollout' "
                "keeps none: choose one on the sampled token, such as 'k3', or perception_view_policy = 'current'"
            )


def _check_shaping(options: Mapping[str, Any]) -> None:
    """Raise UserError for options of losses and selectors that contradict a sink that shapes advantages."""
    sink = options["perception_sink"]
    if options["perception_rollouts_per_group"] is not None:
        raise UserError(f"perception_rollouts_per_group limits a loss, but perception_sink = {sink!r} adds none")
    if options["perception_weighting"] != "equal":
        raise UserError(
            f"perception_weighting weights a loss, but perception_sink = {sink!r} adds none: choose 'equal'"
        )
    for name in ENTROPY_WEIGHTS:
        if options[name]:
            raise UserError(f"{name} is part of a loss, but perception_sink = {sink!r} adds none: set 0")
    if options["perception_gate"] != "none":
        raise UserError(
            f"perception_gate = {options['perception_gate']!r} would leave the advantages of the other rollouts "
            f"unshaped: perception_sink = {sink!r} needs perception_gate = 'none'"
        )
    loss_type = options.get("loss_type", "dapo")
    if options["perception_advantage_mean"] == "selected" and loss_type not in TOKEN_MEANS:
        raise UserError(
            f"perception_advantage_mean = 'selected' needs a mean over tokens, not loss_type = {loss_type!r}: choose "
            f"one of {', '.join(TOKEN_MEANS)}"
        )
    selector = options["perception_selector"]
    if sink == "mask_advantage" and selector in ("random", "all"):
        raise UserError(
            f"perception_selector = {selector!r} uses no scores, but perception_sink = 'mask_advantage' weights "
            "tokens and rollouts by score: choose 'top' or 'top_positive'"
        )
    if sink in SHAPING_SINKS and sink != "mask_advantage" and selector != "all":
        raise UserError(
            f"perception_selector = {selector!r}: perception_sink = {sink!r} weights every token: choose 'all'"
        )
