"""How a method is computed, and what is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError
from cppo.fields import method_option


@dataclass
class ExecutionOptions:
    """Options of execution: a recipe keeps its values for them when another method is chosen."""

    scorer: Literal["shared", "kernel", "plain"] = method_option(
        "shared",
        "'shared': each prompt and image once per group, for policy and reference; 'kernel': a row for each rollout, "
        "as TRL does, and what 'shared' falls back to where a model cannot share; 'plain': a row each with whole "
        "logits, in float64 for a float64 model.",
    )
    perception_memory: Literal["joint", "sequential"] = method_option(
        "joint",
        "'joint': one pass for the image and both views; 'sequential': a pass each, computed again for the backward "
        "pass, so that memory peaks near one pass (needs scorer='shared').",
    )
    require_sharing: bool = method_option(
        False,
        "Stop with an error where rollouts or updates would not share prompts and images over a group, instead of "
        "warning that they cost more (needs scorer='shared').",
    )
    freeze_vision_tower: bool = method_option(
        False,
        "Keep the vision tower's weights as they are; the projector into the language model (Qwen's merger too) and "
        "the language model are trained.",
    )
    per_device_generation_batch_size: Annotated[int | None, "[1, inf)"] = method_option(
        None,
        "Rollouts that a process generates at a time, for less memory; without it all of a generation batch, as TRL "
        "does, and for `cppo train` on a GPU as many as fit by `cppo plan`. Not with vLLM, which needs none.",
    )
    view_threads: Annotated[int, "[1, inf)"] = method_option(
        2, "Threads that make the views while the rollouts are being generated."
    )
    nonfinite: Literal["stop", "skip"] = method_option(
        "stop",
        "A step whose gradient is not finite is never taken. 'stop' ends the run there; 'skip' goes on with the next "
        "step.",
    )
    nonfinite_limit: Annotated[int, "[1, inf)"] = method_option(
        5, "Steps in a row that nonfinite='skip' skips before it ends the run."
    )
    log_perception_grad_share: bool = method_option(
        False,
        "Log |g_perception| / (|g_perception| + |g_rl|) each step, for one more backward pass and one more copy of the "
        "gradients.",
    )


def check_execution(options: Mapping[str, Any]) -> None:
    """Hold the options of execution against each other and against TRL's. Raises UserError."""
    scorer = options["scorer"]
    if options["perception_memory"] == "sequential" and scorer != "shared":
        raise UserError(f"perception_memory = 'sequential' needs scorer = 'shared', but scorer = {scorer!r}")
    if options["require_sharing"] and scorer != "shared":
        raise UserError(f"require_sharing = true needs scorer = 'shared', but scorer = {scorer!r}")
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
    if options["per_device_generation_batch_size"] is not None:
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if options.get(name):
                raise UserError(
                    f"per_device_generation_batch_size is for transformers' generate, but {name} = true, which chooses "
                    "its own batches: set null"
                )
