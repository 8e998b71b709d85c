"""Evaluation: greedy or sampled accuracy of a model on records, with honest intervals."""

from cppo.evaluation.evaluate import EvalResult, ItemResult, blank_images, evaluate
from cppo.evaluation.generate import generate_responses, prompt_inputs
from cppo.evaluation.loading import check_vision_model, load_model, load_processor
from cppo.evaluation.prompt_length import LongRow, long_rows, prompt_lengths, without_long_rows
from cppo.evaluation.statistics import PairedDifference, paired_bootstrap, wilson_interval

__all__ = [
    "EvalResult",
    "ItemResult",
    "LongRow",
    "PairedDifference",
    "blank_images",
    "check_vision_model",
    "evaluate",
    "generate_responses",
    "load_model",
    "load_processor",
    "long_rows",
    "paired_bootstrap",
    "prompt_inputs",
    "prompt_lengths",
    "wilson_interval",
    "without_long_rows",
]
