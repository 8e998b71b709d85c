"""Which prompts a step trains on, and what their rewards are held against."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError
from cppo.fields import method_option


@dataclass
class PromptOptions:
    """Options of prompts and baselines."""

    advantage_baseline: Literal["group", "prompt"] = method_option(
        "group",
        "What a reward is held against: 'group', the mean of the prompt's rollouts (TRL's), or 'prompt', the share of "
        "right answers that the prompt is known for (MSSR), with num_generations = 1 too.",
    )
    baseline_init_samples: Annotated[int, "[0, inf)"] = method_option(
        1,
        "Baseline 'prompt': responses to each prompt of the data before the first step, from which the baselines "
        "begin; with 0 each begins at 0.5.",
    )
    baseline_memory: Annotated[list[float], "[0, 1)"] = method_option(
        [0.875, 0.96],
        "Baseline 'prompt': the smallest and largest factor by which a prompt's counts shrink each time it is seen.",
    )
    baseline_kl_target: Annotated[float, "(0, inf)"] = method_option(
        0.01,
        "Baseline 'prompt': the KL to the reference, in nats a token, beyond which counts shrink by the smallest "
        "factor. Without a reference (beta = 0) they shrink by the mean of both.",
    )
    baseline_kl_window: Annotated[int, "[1, inf)"] = method_option(
        10, "Baseline 'prompt': generation batches whose mean KL decides."
    )
    dynamic_sampling_rounds: Annotated[int, "[1, inf)"] = method_option(
        1,
        "Rounds of generation in a step, at most: prompts whose rollouts all earn the same give way to others, drawn "
        "at random from the data (DAPO's dynamic sampling); what is left of them after the last round is trained on. "
        "1: none is drawn again.",
    )


def check_prompts(options: Mapping[str, Any]) -> None:
    """Hold the options of prompts against each other and against TRL's. Raises UserError."""
    by_prompt = options["advantage_baseline"] == "prompt"
    if options.get("num_generations") == 1 and not by_prompt:
        raise UserError(
            "num_generations = 1 leaves a reward nothing to be held against in its group: give at least 2, or set "
            "advantage_baseline = 'prompt'"
        )
    memory = options["baseline_memory"]
    if len(memory) != 2 or memory[0] > memory[1]:
        raise UserError(f"baseline_memory = {memory}: give two factors, [smallest, largest]")
    if options["dynamic_sampling_rounds"] > 1 and options["trained_answers"]:
        raise UserError(
            "trained_answers trains on what a reward asked last, which dynamic_sampling_rounds asks about other "
            "prompts too: set dynamic_sampling_rounds = 1"
        )
    if not by_prompt:
        return
    if options.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        raise UserError(
            "advantage_baseline = 'prompt' takes the sum of the rewards: set multi_objective_aggregation = "
            "'sum_then_normalize'"
        )
    if options["dynamic_sampling_rounds"] > 1:
        raise UserError(
            "dynamic_sampling_rounds looks for groups of unequal rewards, but advantage_baseline = 'prompt' compares "
            "with earlier ones: set dynamic_sampling_rounds = 1"
        )
