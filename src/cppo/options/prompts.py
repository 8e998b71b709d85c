"""Options of prompts and baselines: which prompts a step trains on, and the baseline of their rewards."""

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
        "Baseline that is subtracted from a reward. 'group': the mean of the prompt's rollouts (TRL). 'prompt': a "
        "running estimate of the prompt's success rate (MSSR), which also works with num_generations = 1.",
    )
    baseline_init_samples: Annotated[int, "[0, inf)"] = method_option(
        1,
        "Baseline 'prompt': responses per prompt before the first step, to initialize the estimates; with 0 each "
        "starts at 0.5.",
    )
    baseline_memory: Annotated[list[float], "[0, 1)"] = method_option(
        [0.875, 0.96],
        "Baseline 'prompt': [smallest, largest] factor that shrinks a prompt's counts at each visit.",
    )
    baseline_kl_target: Annotated[float, "(0, inf)"] = method_option(
        0.01,
        "Baseline 'prompt': KL to the reference, nats per token, above which counts shrink by the smallest factor. "
        "With beta = 0 there is no reference, and counts shrink by the mean of both factors.",
    )
    baseline_kl_window: Annotated[int, "[1, inf)"] = method_option(
        10, "Baseline 'prompt': number of generation batches that the KL is averaged over."
    )
    dynamic_sampling_rounds: Annotated[int, "[1, inf)"] = method_option(
        1,
        "Maximum rounds of generation per step (DAPO's dynamic sampling). Prompts with equal rewards in all rollouts "
        "are replaced by random others; those left after the last round are trained on. 1 replaces none.",
    )
    data_stages: Annotated[int, "[1, inf)"] = method_option(
        1,
        "Number of stages of the data: the rows, in their order, are cut into equal parts, and the run trains on one "
        "part after the other, each shuffled. `data_ratings` sorts the rows by semantic entropy first (SENT).",
    )


def check_prompts(options: Mapping[str, Any]) -> None:
    """Raise UserError where the options of prompts contradict each other or TRL's."""
    by_prompt = options["advantage_baseline"] == "prompt"
    if options.get("num_generations") == 1 and not by_prompt:
        raise UserError(
            "num_generations = 1 leaves no other rollout of the prompt to compare a reward with: give at least 2, or "
            "set advantage_baseline = 'prompt'"
        )
    memory = options["baseline_memory"]
    if len(memory) != 2 or memory[0] > memory[1]:
        raise UserError(f"baseline_memory = {memory}: give two factors, [smallest, largest]")
    if options["dynamic_sampling_rounds"] > 1 and options["trained_answers"]:
        raise UserError(
            "trained_answers trains on the last answers that a reward asked for, but dynamic_sampling_rounds asks "
            "about other prompts too: set dynamic_sampling_rounds = 1"
        )
    if not by_prompt:
        return
    if options.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        raise UserError(
            "advantage_baseline = 'prompt' uses the sum of the rewards: set multi_objective_aggregation = "
            "'sum_then_normalize'"
        )
    if options["dynamic_sampling_rounds"] > 1:
        raise UserError(
            "dynamic_sampling_rounds looks for groups of unequal rewards, but advantage_baseline = 'prompt' compares "
            "with earlier rewards: set dynamic_sampling_rounds = 1"
        )
