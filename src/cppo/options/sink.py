"""The sink: the loss of its own that divergences go into, or the shaping of advantages by scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError
from cppo.fields import method_option
from cppo.imports import is_own
from cppo.methods import SHAPING_SINKS, WHOLE_DISTRIBUTIONS

TOKEN_MEANS = ("dapo", "bnpo", "cispo", "vespo")
"""Values of TRL's `loss_type` that are a mean over tokens, not over rollouts."""
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
        "What the perception tokens go into: 'contrast' (published), softplus((w+ d+ - w- d-) / tau); 'divergence', "
        "w+ d+ - w- d-; 'mask_advantage', which they alone keep, in rollouts weighted by their score (VPPO); "
        "'scale_advantage': every token's advantage is weighted by its score (PGPO), 'softmax_advantage' by a softmax "
        "over scores (PEPO), 'factor_advantage' by factors of token and rollout (VGPO); 'add_advantage' adds a bonus "
        "by the score (MSSR); 'covariance_kl' penalizes leaving another policy by the token's covariance (SENT); "
        "file.py:function, a loss term or an advantage shaping; 'none' trains on the RL loss alone.",
    )
    perception_weight: Annotated[float, "[0, inf)"] = method_option(
        0.01, "Weight lambda of the perception loss. 0 leaves it out, with the passes that nothing else needs."
    )
    perception_preserving_weight: Annotated[float, "[0, inf)"] = method_option(
        1.0, "Factor w+ of the divergence from I+; 0 skips its passes."
    )
    perception_removing_weight: Annotated[float, "[0, inf)"] = method_option(
        1.0, "Factor w- of the divergence from I-."
    )
    perception_removing_entropy_weight: Annotated[float, "[0, inf)"] = method_option(
        0.0,
        "Weight of a penalty on the entropy under I-, mean over all response tokens of the rollouts scored (PAPO); "
        "the counterpart under the image is TRL's entropy_coef with a negative value.",
    )
    perception_preserving_entropy_weight: Annotated[float, "[0, inf)"] = method_option(
        0.0, "Weight of the same penalty on the entropy under I+ (DVRP)."
    )
    perception_temperature: Annotated[float, "(0, inf)"] = method_option(
        0.1, "Temperature tau of the contrast, in nats of divergence."
    )
    perception_divergence: Literal["k1", "k3", "kl", "js", "nll"] = method_option(
        "k3",
        "Divergence of anchor and view: 'k3' on the sampled token (published) or 'k1' (asynchronous CPPO), exact 'kl' "
        "or 'js' over the vocabulary, or 'nll', the sampled token's negative log-probability under the view.",
    )
    perception_normalization: Literal["rollout", "token", "microbatch"] = method_option(
        "rollout",
        "'rollout': mean over a rollout's selected tokens, then over the gated-in ones of the step (of the generation "
        "batch, in equal parts, where it serves several steps); 'token': mean over the step's selected tokens (one "
        "more pass to detect them first); 'microbatch' (published): mean over a micro-batch's selected tokens, which "
        "depends on how the batch is cut.",
    )
    perception_view_policy: Literal["current", "rollout"] = method_option(
        "current",
        "The policy that the perception loss scores views with: 'current' (published), in every update, or 'rollout' "
        "(PAPO's code), once for each generation batch before its updates, which is without gradient "
        "(perception_view_gradients=false).",
    )
    perception_view_gradients: bool = method_option(
        True, "Whether the gradient also flows through the policy under the views (published)."
    )
    perception_anchor_gradients: bool = method_option(
        True,
        "Whether the gradient also flows through the policy under the image itself (published). Without, what the "
        "policy says under the image is a fixed target for the views, which RL alone moves.",
    )
    perception_advantage_floor: Annotated[float, "[0, 1]"] = method_option(
        0.9,
        "Sinks 'mask_advantage' and 'factor_advantage': the smallest weight of a rollout's advantage; 1 weights all "
        "alike in the first.",
    )
    perception_advantage_scope: Literal["batch", "minibatch"] = method_option(
        "batch",
        "Sink 'mask_advantage': the rollouts whose scores are compared. 'batch': all of the generation batch; "
        "'minibatch' (VPPO): the least and the largest score are those of a process's rollouts of an optimizer step, "
        "and the mean weight of a micro-batch is 1, which depends on how the batch is cut.",
    )
    perception_advantage_mean: Literal["all", "selected"] = method_option(
        "all",
        "Sinks that shape advantages: whether the RL loss is a mean over 'all' response tokens, or over the 'selected' "
        "ones of the generation batch (VEPO), by a factor of all advantages that fits a mean over tokens (loss_type "
        "'dapo').",
    )
    perception_shaping_weight: Annotated[float, "[0, 1]"] = method_option(
        1.0,
        "Sinks that shape advantages: the part of the shaped ones, beside 1 - it of the rollout's own (PEPO, by a "
        "schedule).",
    )
    perception_weight_threshold: Annotated[float, "(0, 1)"] = method_option(
        0.4, "Sink 'scale_advantage': log(1 + score), scaled to [0, 1] over a rollout's tokens, that has the weight 1."
    )
    perception_weight_slope: Annotated[float, "[0, inf)"] = method_option(
        2.0, "Sink 'scale_advantage': by how much the weight grows from there to the best score."
    )
    perception_bonus_weight: Annotated[float, "[0, inf)"] = method_option(
        0.4, "Sink 'add_advantage': weight of the score in a token's bonus."
    )
    perception_bonus_limit: Annotated[float, "[0, 1]"] = method_option(
        0.5, "Sink 'add_advantage': the largest bonus, as a fraction of the size of the rollout's advantage."
    )
    perception_softmax_gate: Annotated[float, "[0, 1)"] = method_option(
        0.05, "Sink 'softmax_advantage': strength of the gate by score and entropy."
    )
    perception_softmax_temperature: Annotated[float, "(0, inf)"] = method_option(
        1.8, "Sink 'softmax_advantage': temperature of the softmax over a rollout's scores."
    )
    perception_kl_target: Literal["old", "reference"] = method_option(
        "old",
        "Sink 'covariance_kl': the policy that is not to be left: that which made the rollouts (SENT's code), or the "
        "reference (its paper; needs beta > 0).",
    )
    perception_kl_weights: Annotated[list[float], "[0, inf)"] = method_option(
        [2.0, 0.5], "Sink 'covariance_kl': weights of the tokens of high and of low covariance."
    )
    perception_covariance_fraction: Annotated[float, "(0, 0.5]"] = method_option(
        0.0002,
        "Sink 'covariance_kl': fraction of the selected tokens that have the high weight, and as many the low one; at "
        "least one each (SENT's code).",
    )
    perception_covariance_threshold: float | None = method_option(
        None,
        "Sink 'covariance_kl': the covariance above which a token has the high weight, and all others the low one "
        "(SENT's paper). Without it the fraction decides.",
    )


def check_sink(options: Mapping[str, Any], shapes_advantages: bool | None) -> None:
    """Hold the sink's options against each other and against the other blocks'. Raises UserError.

    shapes_advantages: whether the sink does; of one of the user's own, which is not imported yet, None. The rules that
    depend on it wait then.
    """
    if not (options["perception_view_gradients"] or options["perception_anchor_gradients"]):
        raise UserError(
            "perception_view_gradients and perception_anchor_gradients are both false: nothing is left to train; "
            "perception_sink = 'none' leaves the perception term out"
        )
    sink = options["perception_sink"]
    shapes = sink in SHAPING_SINKS if shapes_advantages is None else shapes_advantages
    if shapes_advantages is None and is_own(sink):
        return
    if shapes:
        _check_shaping(options)
    elif sink != "none" and options["perception_selector"] == "two_sets":
        raise UserError(
            f"perception_selector = 'two_sets' weights tokens, which perception_sink = {sink!r} has no use for: choose "
            "'mask_advantage'"
        )
    entropy_weight = next((name for name in ENTROPY_WEIGHTS if options[name]), None)
    if entropy_weight and options["perception_normalization"] == "token" and options["perception_selector"] != "all":
        raise UserError(
            f"{entropy_weight} averages over all response tokens: perception_normalization = 'token' counts them with "
            "perception_selector = 'all' alone"
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
            "perception_divergence = 'k1' has no gradient but that of the policy under the views, since the anchor "
            "cancels: set perception_view_gradients = true"
        )
    if sink == "covariance_kl":
        _check_split(options)
    compares = options["perception_preserving_weight"] or options["perception_removing_weight"]
    if adds_loss and options["perception_weight"] and not (compares or entropy_weight):
        raise UserError(
            "perception_preserving_weight and perception_removing_weight are both 0: nothing of the views is in the "
            "loss; perception_sink = 'none' leaves the perception term out"
        )
    if adds_loss and options["perception_weight"] and options["perception_divergence"] == "nll":
        if not options["perception_view_gradients"]:
            raise UserError(
                "perception_divergence = 'nll' trains the policy under the views: set perception_view_gradients = true"
            )
        if sink == "divergence" and options["perception_removing_weight"]:
            raise UserError(
                "perception_divergence = 'nll' has no upper bound for perception_sink = 'divergence' to push against: "
                "set perception_removing_weight = 0 or perception_sink = 'contrast'"
            )
    trains = adds_loss and (options["perception_weight"] or entropy_weight)
    if not options["rl_weight"] and not trains:
        raise UserError("rl_weight = 0 leaves nothing to train on: perception_sink or perception_weight adds no loss")
    # Without steps_per_generation TRL takes as many as it accumulates.
    steps, accumulation = options.get("steps_per_generation"), options.get("gradient_accumulation_steps") or 1
    if options["perception_normalization"] == "token" and steps is not None and steps % accumulation:
        raise UserError(
            f"perception_normalization = 'token' needs the rollouts of a whole step at once, but steps_per_generation "
            f"= {steps} is not a multiple of gradient_accumulation_steps = {accumulation}"
        )


def _check_split(options: Mapping[str, Any]) -> None:
    """Options of the sink that looks at no view. Raises UserError."""
    if len(options["perception_kl_weights"]) != 2:
        raise UserError(f"perception_kl_weights = {options['perception_kl_weights']}: give two weights, [high, low]")
    for name in ENTROPY_WEIGHTS:
        if options[name]:
            raise UserError(f"{name} is of a view, but perception_sink = 'covariance_kl' looks at none: set 0")
    if options["perception_kl_target"] == "reference" and not options.get("beta", 1.0):
        raise UserError("perception_kl_target = 'reference' needs a reference, which TRL keeps for beta > 0: set beta")
    if options["perception_normalization"] == "token" and options["perception_selector"] != "all":
        raise UserError(
            "perception_sink = 'covariance_kl' averages over all response tokens: perception_normalization = 'token' "
            "counts them with perception_selector = 'all' alone"
        )


def _check_rollout_policy(options: Mapping[str, Any]) -> None:
    """Options beside scores under the views that are taken once, when the rollouts are made. Raises UserError."""
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
                f"{name} = {options[name]!r} compares whole distributions, and perception_view_policy = 'rollout' "
                "keeps none: choose one on the sampled token, such as 'k3', or perception_view_policy = 'current'"
            )


def _check_shaping(options: Mapping[str, Any]) -> None:
    """Options of losses and selectors beside a sink that shapes the advantages instead. Raises UserError."""
    sink = options["perception_sink"]
    if options["perception_rollouts_per_group"] is not None:
        raise UserError(f"perception_rollouts_per_group bounds a loss, but perception_sink = {sink!r} adds none")
    if options["perception_weighting"] != "equal":
        raise UserError(
            f"perception_weighting weights a loss, but perception_sink = {sink!r} adds none: choose 'equal'"
        )
    for name in ENTROPY_WEIGHTS:
        if options[name]:
            raise UserError(f"{name} is part of a loss, but perception_sink = {sink!r} adds none: set 0")
    if options["perception_gate"] != "none":
        raise UserError(
            f"perception_gate = {options['perception_gate']!r} would leave the other rollouts their advantage at every "
            f"token: perception_sink = {sink!r} needs perception_gate = 'none'"
        )
    loss_type = options.get("loss_type", "dapo")
    if options["perception_advantage_mean"] == "selected" and loss_type not in TOKEN_MEANS:
        raise UserError(
            f"perception_advantage_mean = 'selected' fits a mean over tokens, not loss_type = {loss_type!r}: choose "
            f"one of {', '.join(TOKEN_MEANS)}"
        )
    selector = options["perception_selector"]
    if sink == "mask_advantage" and selector in ("random", "all"):
        raise UserError(
            f"perception_selector = {selector!r} needs no scores, by which perception_sink = 'mask_advantage' weights "
            "tokens and rollouts: choose 'top' or 'top_positive'"
        )
    if sink in SHAPING_SINKS and sink != "mask_advantage" and selector != "all":
        raise UserError(
            f"perception_selector = {selector!r}: perception_sink = {sink!r} weights every token: choose 'all'"
        )
