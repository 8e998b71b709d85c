"""Options of `cppo train` in verl: their names there, and those that verl does not have."""

from typing import Any

from cppo.fields import NO_DEFAULT

ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "model", "rollout"))
CUSTOM = f"{ROLLOUT}.custom.cppo"
"""The place of CPPO's own options in verl's configuration."""
ADDED = (
    f"{CUSTOM}.",
    f"{MODEL}.override_config.",
    f"{ACTOR}.fsdp_config.mixed_precision.",
    f"{ACTOR}.optim.override_optimizer_config.",
    "data.apply_chat_template_kwargs.",
)
"""Prefixes of options that verl accepts but does not list in its configuration."""

SAME = {
    "adam_epsilon": f"{ACTOR}.optim.override_optimizer_config.eps",
    "beta": f"{ACTOR}.kl_loss_coef",
    "dataloader_num_workers": "data.dataloader_num_workers",
    "ddp_timeout": "actor_rollout_ref.nccl_timeout",
    "entropy_coef": f"{ACTOR}.entropy_coeff",
    "freeze_vision_tower": f"{ACTOR}.freeze_vision_tower",
    "full_determinism": f"{ACTOR}.fsdp_config.full_determinism {ROLLOUT}.full_determinism",
    "learning_rate": f"{ACTOR}.optim.lr",
    "max_completion_length": "data.max_response_length",
    "max_grad_norm": f"{ACTOR}.optim.clip_grad",
    "num_generations": f"{ROLLOUT}.n",
    "num_iterations": f"{ACTOR}.ppo_epochs",
    "output_dir": "trainer.default_local_dir",
    "sapo_temperature_neg": f"{ACTOR}.tau_neg",
    "sapo_temperature_pos": f"{ACTOR}.tau_pos",
    "save_total_limit": "trainer.max_actor_ckpt_to_keep",
    "seed": f"{CUSTOM}.seed {ACTOR}.data_loader_seed {ACTOR}.fsdp_config.seed {ROLLOUT}.seed data.seed",
    "shuffle_dataset": "data.shuffle",
    "temperature": f"{ROLLOUT}.temperature",
    "top_p": f"{ROLLOUT}.top_p",
    "trust_remote_code": f"{MODEL}.trust_remote_code",
    "use_liger_kernel": f"{MODEL}.use_liger",
    "vllm_tensor_parallel_size": f"{ROLLOUT}.tensor_model_parallel_size",
    "weight_decay": f"{ACTOR}.optim.weight_decay",
}
"""Options with the same meaning in verl -> verl's names."""

LATER = ("activation_checkpointing", "activation_checkpointing_kwargs")
"""Options that transformers 5.17 lacks and later versions have; without them null applies."""

INSTEAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "activation_checkpointing_kwargs": ((None,), "verl chooses them"),
    "advantage_baseline": (("group",), "verl compares the rollouts of a prompt"),
    "auto_find_batch_size": ((False,), "actor.ppo_max_token_len_per_gpu bounds the tokens of micro-batches"),
    "cast_lm_head_to_fp32": ((False,), "logits are computed in the model's precision"),
    "data_accuracy_band": ((None,), "all rows of its files are trained on"),
    "data_confidence_band": ((None,), "all rows of its files are trained on"),
    "data_order": (("semantic_entropy",), "data.shuffle or data.sampler orders the rows"),
    "data_ratings": ((None,), "all rows of its files are trained on, unsorted"),
    "data_seed": ((None,), "the order of the data follows `seed`"),
    "data_stages": ((1,), "all rows are one stage; data.sampler may be your own curriculum"),
    "disable_dropout": ((False,), "dropout is as in the model"),
    "dynamic_sampling_rounds": ((1,), "CPPO's trainer there replaces no prompts"),
    "eval_delay": ((0,), "verl evaluates from the first multiple of trainer.test_freq"),
    "fp16_full_eval": ((False,), "the rollout engine evaluates, in rollout.dtype"),
    "bf16_full_eval": ((False,), "the rollout engine evaluates, in rollout.dtype"),
    "generation_kwargs": ((None, {}), "rollout.engine_kwargs goes to the rollout engine"),
    "gradient_checkpointing_kwargs": ((None, {}, {"use_reentrant": False}), "verl checkpoints without reentrance"),
    "label_smoothing_factor": ((0.0,), "GRPO's loss does not use it"),
    "liger_kernel_config": ((None, {}), "verl's model.use_liger enables all kernels"),
    "load_best_model_at_end": ((False,), "verl keeps the last checkpoints and selects none"),
    "load_in_4bit": ((False,), "verl trains no quantized weights here"),
    "load_in_8bit": ((False,), "verl trains no quantized weights here"),
    "log_completions": ((False,), "trainer.rollout_data_dir keeps the rollouts"),
    "log_perception_grad_share": ((False,), "verl runs no second backward pass"),
    "lora_dropout": ((0.0,), "adapters train without dropout"),
    "lr_scheduler_kwargs": ((None, {}), "actor.optim.min_lr_ratio and num_cycles shape the cosine"),
    "mask_truncated_completions": ((False,), "truncated responses stay in the loss"),
    "max_tool_calling_iterations": ((None,), "rollout.multi_turn configures tools"),
    "min_p": ((None, 0.0), "rollouts are sampled without it"),
    "multi_objective_aggregation": (("sum_then_normalize",), "rewards are summed, then normalized"),
    "num_generations_eval": ((None, 1), "held-out rows are answered once, greedily"),
    "overwrite": ((False,), "verl adds to the files in output_dir"),
    "neftune_noise_alpha": ((None,), "embeddings get no noise"),
    "off_policy_mask_threshold": ((None,), "algorithm.rollout_correction has its own masks"),
    "optim": ((NO_DEFAULT, "adamw_torch", "adamw_torch_fused"), "torch's AdamW; actor.optim.optimizer names another"),
    "optim_args": ((None,), "actor.optim.override_optimizer_config goes to the optimizer"),
    "optim_target_modules": ((None,), "the optimizer treats all weights alike"),
    "per_device_generation_batch_size": ((None,), "the rollout engine chooses its batches"),
    "perception_memory": (("joint",), "lower actor.ppo_max_token_len_per_gpu for less memory"),
    "push_to_hub": ((False,), "verl uploads nothing"),
    "repetition_penalty": ((1.0,), "rollouts are sampled without it"),
    "require_sharing": ((False,), "verl shares no prompts: each rollout and each view is a separate row"),
    "router_aux_loss_coef": ((None, 0.0), "verl adds no such loss"),
    "scorer": (("kernel",), "verl shares no prompts: each rollout and each view is a separate row"),
    "sync_ref_model": ((False,), "the reference model never changes"),
    "tf32": ((None,), "torch's setting is used"),
    "top_entropy_quantile": ((None, 1.0), "all response tokens are in the policy loss"),
    "torch_compile": ((False,), "verl compiles only the entropy"),
    "torch_compile_backend": ((None,), "verl compiles with torch's default"),
    "torch_compile_mode": ((None,), "verl compiles with torch's default"),
    "train_sampling_strategy": (("random",), "data.shuffle and data.sampler choose the order"),
    "use_adaptive_entropy": ((False,), "actor.entropy_coeff stays constant"),
    "use_cpu": ((False,), "verl trains on GPUs"),
    "use_transformers_continuous_batching": ((False,), "rollouts come from vLLM"),
    "vllm_mode": (("colocate",), "--mode selects where rollouts run; verl starts their servers"),
    "vllm_model_impl": (("vllm",), "rollout.engine_kwargs.vllm goes to vLLM"),
    "vllm_structured_outputs_regex": ((None,), "responses are sampled freely"),
}
"""Options by name: the values that verl uses anyway, and what verl does for all other values."""

NO_MEANING: dict[str, str] = {
    "verl's training loop does not use it": """
        average_tokens_across_devices dataloader_drop_last debug do_eval do_predict do_train enable_jit_checkpoint
        ignore_data_skip include_for_metrics label_names length_column_name local_rank
        pad_to_multiple_of prediction_loss_only remove_unused_columns restore_callback_states_from_checkpoint
        skip_memory_metrics torch_empty_cache_steps use_cache cache_implementation nonfinite_limit dry_run quiet
    """,
    "verl logs every step, and each logger has its own settings": """
        disable_tqdm include_num_input_tokens_seen log_completions_hub_repo log_level log_level_replica
        log_multimodal log_on_each_node log_unique_prompts logging_first_step logging_nan_inf_filter logging_steps
        logging_strategy num_completions_to_print trackio_bucket_id trackio_space_id trackio_static_space_id
    """,
    "the rollout engine answers held-out rows, all at once": """
        batch_eval_metrics eval_accumulation_steps eval_do_concat_batches eval_use_gather_object
        per_device_eval_batch_size probe_items
    """,
    "verl shards and launches by itself (actor.fsdp_config)": """
        accelerator_config ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
        ddp_static_graph deepspeed ds3_gather_for_generation fsdp fsdp_config parallelism_config
    """,
    "verl's data loader has no such setting": """
        dataloader_in_order dataloader_multiprocessing_context dataloader_persistent_workers dataloader_pin_memory
        dataloader_prefetch_factor
    """,
    "it belongs to an option that verl does not have": """
        baseline_init_samples baseline_kl_target baseline_kl_window baseline_memory
        bnb_4bit_quant_type use_bnb_nested_quant entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target
        greater_is_better metric_for_best_model hub_always_push hub_model_id hub_private_repo hub_revision
        hub_strategy hub_token ref_model_mixup_alpha ref_model_sync_steps save_on_each_node
        transformers_continuous_batching_config use_transformers_paged vespo_k_neg vespo_k_pos vespo_lambda_neg
        vespo_lambda_pos vllm_group_port vllm_importance_sampling_cap vllm_importance_sampling_clip_max
        vllm_importance_sampling_clip_min vllm_importance_sampling_mode vllm_server_base_url vllm_server_host
        vllm_server_port vllm_server_timeout
    """,
}
"""Why options have no meaning inside verl -> their names."""

IN_THE_DATA = (
    "columns",
    "system_prompt",
    "prompt_suffix",
    "max_bad_fraction",
    "min_pixels",
    "max_pixels",
    "min_side",
)
"""Options of the rows; `cppo verl-data` applies them when it writes verl's files."""


def without_meaning() -> dict[str, str]:
    """The options that have no meaning inside verl -> the reason."""
    return {name: reason for reason, names in NO_MEANING.items() for name in names.split()}
