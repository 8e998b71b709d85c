"""Which options of `CPPOConfig` go together. Imports no torch: the command line checks them before it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import gcd, lcm
from typing import Any

from cppo.errors import UserError, choose_one
from cppo.methods import SHAPING_SINKS, WHOLE_DISTRIBUTIONS
from cppo.views import KNOWN_PRESERVING, ViewSampler, ViewStrengths, check_families

ENTROPY_WEIGHTS = ("perception_removing_entropy_weight", "perception_preserving_entropy_weight")


def check_combinations(options: Mapping[str, Any]) -> None:
    """Hold options against each other, each of which is valid alone.

    Args:
        options: every field of CPPO's own with its value, and those of TRL's that are known.

    Raises:
        UserError: two do not fit; the message names the field to change.
    """
    normalization, scorer = options["perception_normalization"], options["scorer"]
    if options["perception_gate"] == "correct" and not options["perception_gate_reward"]:
        raise UserError(
            "perception_gate = 'correct' needs perception_gate_reward, the name of the reward function that decides"
        )
    if options["perception_memory"] == "sequential" and scorer != "shared":
        raise UserError(f"perception_memory = 'sequential' needs scorer = 'shared', but scorer = {scorer!r}")
    if options["require_sharing"] and scorer != "shared":
        raise UserError(f"require_sharing = true needs scorer = 'shared', but scorer = {scorer!r}")
    if not (options["perception_view_gradients"] or options["perception_anchor_gradients"]):
        raise UserError(
            "perception_view_gradients and perception_anchor_gradients are both false: nothing is left to train; "
            "perception_sink = 'none' leaves the perception term out"
        )
    checkpointing = options.get("gradient_checkpointing_kwargs")
    reentrant = isinstance(checkpointing, Mapping) and checkpointing.get("use_reentrant")
    if options["log_perception_grad_share"] and reentrant:
        raise UserError(
            "log_perception_grad_share = true takes a gradient of its own, which reentrant checkpointing forbids: set "
            "gradient_checkpointing_kwargs = {use_reentrant: false}"
        )
    if options.get("enable_jit_checkpoint"):
        raise UserError(
            "enable_jit_checkpoint = true saves in the middle of a step under the number of the last one: leave it "
            "false; `cppo train` saves after the step on SIGTERM, SIGHUP and SIGUSR1"
        )
    if options.get("remove_unused_columns"):
        raise UserError("remove_unused_columns = true takes images and answers from views and rewards: leave it false")
    _check_method(options)
    if options["per_device_generation_batch_size"] is not None:
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if options.get(name):
                raise UserError(
                    f"per_device_generation_batch_size is for transformers' generate, but {name} = true, which chooses "
                    "its own batches: set null"
                )
    bound = options["perception_rollouts_per_group"]
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
    # Without steps_per_generation TRL takes as many as it accumulates.
    steps, accumulation = options.get("steps_per_generation"), options.get("gradient_accumulation_steps") or 1
    if normalization == "token" and steps is not None and steps % accumulation:
        raise UserError(
            f"perception_normalization = 'token' needs the rollouts of a whole step at once, but steps_per_generation "
            f"= {steps} is not a multiple of gradient_accumulation_steps = {accumulation}"
        )
    view_sampler(options)


def check_gate_reward(options: Mapping[str, Any], rewards: Sequence[str]) -> None:
    """Whether the reward by which the gate `correct` decides is one of `rewards`, the names of the reward functions.

    Raises UserError if it is not.
    """
    name = options["perception_gate_reward"]
    if options["perception_gate"] == "correct" and name not in rewards:
        hint = choose_one(name, rewards)
        raise UserError(f"perception_gate_reward = {name!r} is none of the reward functions; {hint}")


def check_group_sizes(options: Mapping[str, Any], processes: int) -> None:
    """Whether batches of rollouts are made of whole groups, as TRL demands.

    Args:
        options: TRL's, defaults included.
        processes: how many train together.

    Raises:
        UserError: one is not; the message names the field to change, and a value that does.
    """
    group = options["num_generations"] or 1
    steps = options["steps_per_generation"] or options["gradient_accumulation_steps"]
    rules = [("per_device_train_batch_size", group, processes * steps)]
    if options["generation_batch_size"]:
        rules = [("generation_batch_size", lcm(group, options["per_device_train_batch_size"] * processes), 1)]
    if options["eval_strategy"] != "no":
        rules.append(("per_device_eval_batch_size", options["num_generations_eval"] or group, processes))
    for name, rollouts, batches in rules:
        size, unit = options[name], rollouts // gcd(rollouts, batches)
        if size % unit:
            raise UserError(
                f"{name} = {size}: {batches} x {size} rollouts must be a multiple of {rollouts}, so that groups of "
                f"num_generations are whole; give {name} = {max(size // unit, 1) * unit}, for instance"
            )


def _check_method(options: Mapping[str, Any]) -> None:
    """Options of the blocks that exclude each other. Raises UserError."""
    sink, mode = options["perception_sink"], options["rollout_view_mode"]
    if sink in SHAPING_SINKS:
        _check_shaping(options)
    entropy_weight = next((name for name in ENTROPY_WEIGHTS if options[name]), None)
    if entropy_weight and options["perception_normalization"] == "token" and options["perception_selector"] != "all":
        raise UserError(
            f"{entropy_weight} averages over all response tokens: perception_normalization = 'token' counts them with "
            "perception_selector = 'all' alone"
        )
    adds_loss, by_rollout = sink in ("contrast", "divergence"), options["perception_view_policy"] == "rollout"
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
    if options["entropy_estimator"] == "sampled" and (options.get("top_entropy_quantile") or 1.0) < 1.0:
        raise UserError(
            "top_entropy_quantile chooses tokens by their exact entropy: set entropy_estimator = 'exact', not 'sampled'"
        )
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
    if options["rollout_views"]:
        check_families("rollout_views", options["rollout_views"], KNOWN_PRESERVING)
        group_size = options.get("num_generations") or 1
        if mode == "mix" and group_size > 1 and not round(options["rollout_view_fraction"] * group_size):
            raise UserError(
                f"rollout_view_fraction = {options['rollout_view_fraction']:g} of num_generations = {group_size} is no "
                f"rollout at all: give at least {1 / group_size:g}"
            )
        if mode == "mix" and options.get("use_vllm") and options.get("vllm_mode") == "server":
            raise UserError(
                "rollout_view_mode = 'mix' gives the rollouts of a group different images, but with vllm_mode = "
                "'server' TRL sends one for all: choose 'colocate'"
            )
        corrects = options.get("use_vllm") and options.get("vllm_importance_sampling_correction") is not False
        if mode == "mix" and corrects:
            raise UserError(
                "rollout_view_mode = 'mix' scores rollouts under another image than they were sampled from: with vLLM "
                "set vllm_importance_sampling_correction = false"
            )
    noised = {*options["rollout_views"], *options["preserving_views"]}
    if options["view_diffusion_decay"] is not None and "diffusion_noise" not in noised:
        raise UserError(
            "view_diffusion_decay fades out diffusion noise: add diffusion_noise to rollout_views or preserving_views"
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
    selector = options["perception_selector"]
    if sink == "advantage" and selector in ("random", "all"):
        raise UserError(
            f"perception_selector = {selector!r} needs no scores, by which perception_sink = 'advantage' weights "
            "tokens and rollouts: choose 'top' or 'top_positive'"
        )
    if sink == "weights" and selector != "all":
        raise UserError(
            f"perception_selector = {selector!r}: perception_sink = 'weights' weights every token: choose 'all'"
        )


def view_sampler(options: Mapping[str, Any]) -> ViewSampler:
    """The sampler of views that the options describe.

    Raises:
        UserError: a family or a strength is not valid.
    """
    strengths = ViewStrengths(**{part.name: options[f"view_{part.name}"] for part in fields(ViewStrengths)})
    return ViewSampler(options.get("seed", 42), options["preserving_views"], options["removing_views"], strengths)
