"""Rules that convert a recipe to verl's options, part by part."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from cppo.assets import resolve_model
from cppo.errors import UserError
from cppo.methods import with_method
from cppo.options import EXECUTION_OPTIONS, check_gate_reward, cppo_fields, schema
from cppo.rewards import check_rewards, chosen_rewards, reward_columns
from cppo.verl.batches import DEFAULT_PROMPT_TOKENS, Cluster, Values, batches, batches_of, updates_of_a_batch
from cppo.verl.counterparts import ACTOR, CUSTOM, MODEL, ROLLOUT
from cppo.verl.data import REWARD_COLUMNS
from cppo.verl.options import options_from
from cppo.verl.reward import load_rewards
from cppo.verl.vision_base import lost_base

LOSSES = {
    "dapo": ("vanilla", "token-mean"),
    "bnpo": ("vanilla", "token-mean"),
    "grpo": ("vanilla", "seq-mean-token-mean"),
    "dr_grpo": ("vanilla", "seq-mean-token-sum-norm"),
    "sapo": ("sapo", "seq-mean-token-mean"),
    "cispo": ("cispo", "token-mean"),
}
"""TRL's loss types -> verl's loss mode and aggregation."""
ENDLESS = 10**9
"""More steps and epochs than any run has."""
UNCLIPPED = 1e9
"""verl's clip of the ratio for negative advantages; verl's ratios end at exp(20)."""
LOGGERS = ("clearml", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""Loggers with the same name in verl and TRL."""


def _perception(values: Values, cluster: Cluster) -> dict[str, Any]:
    """CPPO's own options, without those that the method sets."""
    of_method = {**schema("train").defaults, **with_method({}, values["method"])}
    own = {name: values[name] for name in cppo_fields() if name not in EXECUTION_OPTIONS or name == "view_threads"}
    given = {name: value for name, value in own.items() if name == "method" or value != of_method[name]}
    custom = {**given, "seed": values["seed"]}
    options_from(custom)
    return {f"{CUSTOM}.{name}": value for name, value in custom.items()}


def _rewards(values: Values, cluster: Cluster) -> dict[str, Any]:
    names, weights = chosen_rewards(values["rewards"], values["method"])
    weights = values["reward_weights"] or weights
    for spec in check_rewards(names, weights):
        if spec.needs_trl:
            raise UserError(f"rewards: {spec.text!r} is TRL's, which is not installed beside verl: leave it out")
    loaded = load_rewards(tuple(names), tuple(weights))
    check_gate_reward(values, [name for name, _, _ in loaded])
    for name, function, _ in loaded:
        columns = {column: needs for column, needs in reward_columns(function).items() if column not in REWARD_COLUMNS}
        needed = [column for column, needs in columns.items() if needs]
        if needed:
            raise UserError(
                f"rewards: {name} needs {', '.join(needed)}, but `cppo verl-data` writes only "
                f"{', '.join(REWARD_COLUMNS)} of a row for rewards: leave it out, or train with `cppo train`"
            )
        if columns:
            values.instead["rewards"] = f"{name} is called without {', '.join(columns)}"
    given = "reward.custom_reward_function.reward_kwargs"
    return {f"{given}.rewards": names, f"{given}.weights": list(weights)}


def _data(values: Values, cluster: Cluster) -> dict[str, Any]:
    folder, held_out = values["output_dir"], values["eval_data"]
    train = f"{folder}/train.parquet"
    longest = values["max_prompt_tokens"]
    if longest is None:
        values.instead["max_prompt_tokens"] = (
            f"verl needs a limit; a prompt of more than {DEFAULT_PROMPT_TOKENS} tokens stops the run: raise "
            "data.max_prompt_length, or skip longer rows with data.filter_overlong_prompts=true"
        )
    return {
        "data.train_files": train,
        "data.val_files": f"{folder}/test.parquet" if held_out else train,
        "data.max_prompt_length": longest or DEFAULT_PROMPT_TOKENS,
        "data.filter_overlong_prompts": longest is not None,
        **{
            f"data.apply_chat_template_kwargs.{name}": value for name, value in _mapping(values, "chat_template_kwargs")
        },
    }


def _loss(values: Values, cluster: Cluster) -> dict[str, Any]:
    kind, low, beta = values["loss_type"], values["epsilon"], values["beta"]
    high = low if values["epsilon_high"] is None else values["epsilon_high"]
    mode, mean = LOSSES.get(kind, LOSSES["dapo"])
    if kind not in LOSSES:
        values.instead["loss_type"] = "verl has no such loss; dapo's is used"
    elif kind == "bnpo":
        values.instead["loss_type"] = "a mean over the tokens of a step, not of a micro-batch, as with dapo"
    if values["importance_sampling_level"] == "sequence":
        if mode != "vanilla" or values["delta"] is not None:
            values.instead["importance_sampling_level"] = "verl's ratio of a sequence has only PPO's clip"
        mode = "gspo"
    if kind == "cispo":  # TRL bounds the ratio by epsilon_high itself, and not from below
        low, high = 1.0, high - 1
    found = {
        f"{ACTOR}.policy_loss.loss_mode": mode,
        f"{ACTOR}.loss_agg_mode": mean,
        f"{ACTOR}.clip_ratio": low,
        f"{ACTOR}.clip_ratio_low": low,
        f"{ACTOR}.clip_ratio_high": high,
        f"{ACTOR}.clip_ratio_c": UNCLIPPED if values["delta"] is None else values["delta"],
        f"{ACTOR}.use_kl_loss": beta != 0,
        f"{ACTOR}.kl_loss_type": "k3+" if values["use_bias_correction_kl"] else "low_var_kl",
        "algorithm.norm_adv_by_std_in_grpo": str(values["scale_rewards"]).lower() not in ("none", "false"),
    }
    if kind == "dr_grpo":
        found[f"{ACTOR}.loss_scale_factor"] = values["max_completion_length"]
    if values["scale_rewards"] == "batch":
        values.instead["scale_rewards"] = "advantages are divided by their group's standard deviation"
    if beta and values["use_bias_correction_kl"] and updates_of_a_batch(values, cluster) > 1:
        values.instead["use_bias_correction_kl"] = (
            "the gradient of KL is that of on-policy rollouts, in later updates too"
        )
    return found


def _optimizer(values: Values, cluster: Cluster) -> dict[str, Any]:
    schedule, warmup = values["lr_scheduler_type"], values["warmup_steps"]
    optim = f"{ACTOR}.optim"
    if schedule not in ("constant", "constant_with_warmup", "cosine"):
        values.instead["lr_scheduler_type"] = "verl has constant and cosine schedules; constant is used"
    found: dict[str, Any] = {
        f"{optim}.lr_scheduler_type": "cosine" if schedule == "cosine" else "constant",
        f"{optim}.betas": [values["adam_beta1"], values["adam_beta2"]],
    }
    if schedule != "constant" and 0 < warmup < 1:
        found[f"{optim}.lr_warmup_steps_ratio"] = warmup
    elif schedule != "constant" and warmup:
        found[f"{optim}.lr_warmup_steps"] = batches_of(values, cluster, "warmup_steps")
    if values["nonfinite"] == "stop":
        values.instead["nonfinite"] = "a step with a gradient that is not finite is skipped, and the run continues"
    return found


def _model(values: Values, cluster: Cluster) -> dict[str, Any]:
    half = "float16" if values["fp16"] else "bfloat16" if values["bf16"] is not False else "float32"
    short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    # the later name of gradient_checkpointing in transformers
    checkpointing, later = values["gradient_checkpointing"], values["activation_checkpointing"]
    found = {
        f"{MODEL}.path": resolve_model(values["model"]),
        f"{MODEL}.enable_gradient_checkpointing": checkpointing if later is None else later,
        f"{ACTOR}.strategy": "fsdp2",
        f"{ACTOR}.entropy_from_logits_with_chunking": True,
        f"{ROLLOUT}.dtype": half,
    }
    loss = lost_base(found[f"{MODEL}.path"])
    if loss is not None:
        values.instead["model"] = loss
    precision = f"{ACTOR}.fsdp_config.mixed_precision"
    if half != "bfloat16":
        found[f"{ACTOR}.fsdp_config.dtype"] = half
        found |= {f"{precision}.{part}_dtype": short[half] for part in ("param", "reduce", "buffer")}
    for name, value in _mapping(values, "model_init_kwargs"):
        if name in ("dtype", "torch_dtype") and str(value) in short:
            found[f"{ACTOR}.fsdp_config.model_dtype"] = short[str(value)]
        elif name == "attn_implementation":
            found[f"{MODEL}.override_config.{name}"] = value
        elif name == "trust_remote_code":
            found[f"{MODEL}.{name}"] = value
        else:
            values.instead["model_init_kwargs"] = "verl uses only its dtype, attn_implementation and trust_remote_code"
    return found | _adapter(values)


def _adapter(values: Values) -> dict[str, Any]:
    rank, alpha, targets = (values[name] for name in ("lora_r", "lora_alpha", "lora_target_modules"))
    if not values["use_peft"]:
        return {}
    found = {
        f"{MODEL}.lora_rank": rank,
        f"{MODEL}.lora_alpha": alpha,
        f"{MODEL}.target_modules": targets or "all-linear",
        f"{ROLLOUT}.load_format": "safetensors",  # the base weights are never sent to the rollout engine
    }
    if targets is None:
        found[f"{MODEL}.exclude_modules"] = ".*(visual|vision).*"
    return found


def _rollouts(values: Values, cluster: Cluster) -> dict[str, Any]:
    found = {
        f"{ROLLOUT}.name": "vllm",
        f"{ROLLOUT}.top_k": values["top_k"] or -1,
    }
    of_vllm = {
        f"{ROLLOUT}.gpu_memory_utilization": values["vllm_gpu_memory_utilization"],
        f"{ROLLOUT}.max_model_len": values["vllm_max_model_length"],
        f"{ROLLOUT}.free_cache_engine": values["vllm_enable_sleep_mode"],
    }
    corrects = values["vllm_importance_sampling_correction"]
    if not values["use_vllm"]:
        values.instead["use_vllm"] = "vLLM makes the rollouts; rollout.name=sglang is the other engine"
        return found
    if corrects:
        values.instead["vllm_importance_sampling_correction"] = (
            "rollouts are not reweighted; algorithm.rollout_correction.rollout_is=token does it"
        )
    return found | of_vllm


def _lasting(values: Values, cluster: Cluster) -> dict[str, Any]:
    """Duration of the run, and what it saves where."""
    folder, loggers, resume = values["output_dir"], values["report_to"], values["resume_from_checkpoint"]
    epochs, steps, strategy = values["num_train_epochs"], values["max_steps"], values["save_strategy"]
    loggers = [name for name in ([loggers] if isinstance(loggers, str) else loggers or []) if name != "none"]
    if set(loggers) - set(LOGGERS):
        values.instead["report_to"] = f"verl's loggers are console, {', '.join(LOGGERS)}"
    found = {
        "trainer.project_name": "cppo" if values["project"] == "huggingface" else values["project"],
        "trainer.experiment_name": values["run_name"] or folder.rstrip("/").rpartition("/")[2],
        "trainer.logger": ["console", *(name for name in loggers if name in LOGGERS)],
        "trainer.total_epochs": math.ceil(epochs) if steps < 1 else ENDLESS,
        "trainer.save_freq": batches_of(values, cluster, "save_steps") if strategy == "steps" else -1,
        "trainer.resume_mode": "auto" if resume in (True, "auto") else "resume_path" if resume else "disable",
    }
    if steps >= 1:
        found["trainer.total_training_steps"] = batches_of(values, cluster, "max_steps")
    elif epochs != math.ceil(epochs):
        values.instead["num_train_epochs"] = f"verl counts whole epochs: {math.ceil(epochs)}"
    if strategy not in ("steps", "no"):
        values.instead["save_strategy"] = "nothing is saved: give save_steps"
    # `cppo eval` reads verl's hf_model, a resume everything else.
    contents = ["model"] if values["save_only_model"] else ["model", "optimizer", "extra"]
    found[f"{ACTOR}.checkpoint.save_contents"] = [*contents, "hf_model"]
    if found["trainer.resume_mode"] == "resume_path":
        found["trainer.resume_from_path"] = resume
    return found


def _evaluation(values: Values, cluster: Cluster) -> dict[str, Any]:
    """verl answers all held-out rows greedily each time, and always at the end."""
    final, strategy, probes = values["final_eval_samples"], values["eval_strategy"], values["probe_steps"]
    every, limit, at_start = (values[name] for name in ("eval_steps", "eval_limit", "eval_on_start"))
    if not values["eval_data"] and (final or probes or at_start or strategy != "no"):
        raise UserError("evaluation needs `eval_data`: give held-out data")
    between = "eval_steps" if strategy == "steps" and every else "probe_steps" if probes else None
    if strategy == "epoch":
        values.instead["eval_strategy"] = "held-out rows are answered every trainer.test_freq batches"
    if final:
        values.instead["final_eval_samples"] = "held-out rows are answered before and after, but not with a blank image"
    found = {
        "trainer.val_before_train": bool(final) or at_start,
        "trainer.test_freq": batches_of(values, cluster, between) if between else ENDLESS if final else -1,
    }
    if values["eval_data"]:
        found["data.val_max_samples"] = final or limit or -1
    return found


def _mapping(values: Values, name: str) -> Iterator[tuple[str, Any]]:
    value = values[name] or {}
    if not isinstance(value, Mapping):
        raise UserError(f"{name}: expected a mapping such as {{key: value}}, got {value!r}")
    yield from value.items()


RULES = (_perception, _rewards, _data, batches, _loss, _optimizer, _model, _rollouts, _lasting, _evaluation)
"""All rules: (options, cluster) -> verl's options."""
