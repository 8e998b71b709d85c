"""Evaluation: greedy or sampled accuracy of a model on records, with honest intervals."""

from cppo.evaluation.evaluate import EvalResult, ItemResult, blank_images, evaluate
from cppo.evaluation.generate import generate_responses, prompt_inputs
from cppo.evaluation.loading import check_vision_model, load_model, load_processor
from cppo.evaluation.statistics import PairedDifference, paired_bootstrap, wilson_interval

__all__ = [
    "EvalResult",
    "ItemResult",
    "PairedDifference",
    "blank_images",
    "check_vision_model",
    "evaluate",
    "generate_responses",
    "load_model",
    "load_processor",
    "paired_bootstrap",
    "prompt_inputs",
    "wilson_interval",
]
