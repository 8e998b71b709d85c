"""Options of execution: how a method is computed and what is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError
from cppo.fields import method_option


@dataclass
class ExecutionOptions:
    """Options of execution. A recipe keeps them when you choose another method."""

    scorer: Literal["shared", "kernel", "plain"] = method_option(
        "shared",
        "How the policy and the reference are scored. 'shared': each prompt and image once per group. 'kernel': one "
        "row per rollout, as TRL does; models that cannot share use it too. 'plain': one row per rollout with full "
        "logits, in float64 for a float64 model.",
    )
    perception_memory: Literal["joint", "sequential"] = method_option(
        "joint",
        "'joint': one pass for the image and both views. 'sequential': one pass each, recomputed for the backward "
        "pass; peak memory stays near that of one pass (needs scorer='shared').",
    )
    require_sharing: bool = method_option(
        False,
        "Stop with an error where rollouts or updates cannot share prompts and images in a group; without it, a "
        "warning (needs scorer='shared').",
    )
    freeze_vision_tower: bool = method_option(
        False,
        "Freeze the vision tower. The language model and the projector into it (Qwen's merger) are trained.",
    )
    per_device_generation_batch_size: Annotated[int | None, "[1, inf)"] = method_option(
        None,
        "Rollouts that a process generates at a time; fewer need less memory. Default: the whole generation batch, "
        "as in TRL; `cppo train` on a GPU takes as many as fit (see `cppo plan`). Not for vLLM.",
    )
    view_threads: Annotated[int, "[1, inf)"] = method_option(
        2, "Threads that make the views while the rollouts are generated."
    )
    nonfinite: Literal["stop", "skip"] = method_option(
        "stop",
        "What follows a gradient that is not finite. 'stop' ends the run; 'skip' continues with the next step. "
        "Neither applies the gradient.",
    )
    nonfinite_limit: Annotated[int, "[1, inf)"] = method_option(
        5, "nonfinite='skip': number of steps skipped in a row that ends the run."
    )
    log_perception_grad_share: bool = method_option(
        False,
        "Log |g_perception| / (|g_perception| + |g_rl|) each step. Costs one more backward pass and one more copy of "
        "the gradients.",
    )


def check_execution(options: Mapping[str, Any]) -> None:
    """Raise UserError where the options contradict each other or TRL's."""
    scorer = options["scorer"]
    if options["perception_memory"] == "sequential" and scorer != "shared":
        raise UserError(f"perception_memory = 'sequential' needs scorer = 'shared', but scorer = {scorer!r}")
    if options["require_sharing"] and scorer != "shared":
        raise UserError(f"require_sharing = true needs scorer = 'shared', but scorer = {scorer!r}")
    checkpointing = options.get("gradient_checkpointing_kwargs")
    reentrant = isinstance(checkpointing, Mapping) and checkpointing.get("use_reentrant")
    if options["log_perception_grad_share"] and reentrant:
        raise UserError(
            "log_perception_grad_share = true needs a separate gradient, which reentrant checkpointing forbids: set "
            "gradient_checkpointing_kwargs = {use_reentrant: false}"
        )
    if options.get("enable_jit_checkpoint"):
        raise UserError(
            "enable_jit_checkpoint = true saves in the middle of a step under the previous step's number: leave it "
            "false; `cppo train` saves after the step on SIGTERM, SIGHUP and SIGUSR1"
        )
    if options.get("remove_unused_columns"):
        raise UserError(
            "remove_unused_columns = true removes the images and answers that views and rewards need: leave it false"
        )
    if options["per_device_generation_batch_size"] is not None:
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if options.get(name):
                raise UserError(
                    f"per_device_generation_batch_size is for transformers' generate, but {name} = true chooses its "
                    "own batches: set null"
                )
