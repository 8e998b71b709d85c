"""Evaluation: greedy or sampled accuracy of a model on records, with confidence intervals."""

from cppo.evaluation.card import CardRow, perception_card, same_answers
from cppo.evaluation.conditions import BLANK, CLEAN, Condition, blank_images, get_condition
from cppo.evaluation.evaluate import evaluate
from cppo.evaluation.generate import (
    Engine,
    Response,
    ScoringEngine,
    TransformersEngine,
    generate_responses,
    prompt_inputs,
)
from cppo.evaluation.loading import check_vision_model, load_model, load_processor, placement
from cppo.evaluation.processes import ALONE, Processes, join_processes
from cppo.evaluation.rating import answer_clusters, rate_records, semantic_entropy
from cppo.evaluation.readable import LongRow, check_marks, long_rows, marked_rows, prompt_lengths
from cppo.evaluation.results import EvalResult, ItemResult, Rate
from cppo.evaluation.statistics import (
    MeanInterval,
    PairedDifference,
    bootstrap_interval,
    mean_interval,
    paired_bootstrap,
    pass_at_k,
    t_interval,
)
from cppo.views import CARD_CONDITIONS, CONDITION_NAMES

__all__ = [
    "ALONE",
    "BLANK",
    "CARD_CONDITIONS",
    "CLEAN",
    "CONDITION_NAMES",
    "CardRow",
    "Condition",
    "Engine",
    "EvalResult",
    "ItemResult",
    "LongRow",
    "MeanInterval",
    "PairedDifference",
    "Processes",
    "Rate",
    "Response",
    "ScoringEngine",
    "TransformersEngine",
    "answer_clusters",
    "blank_images",
    "bootstrap_interval",
    "check_marks",
    "check_vision_model",
    "evaluate",
    "generate_responses",
    "get_condition",
    "join_processes",
    "load_model",
    "load_processor",
    "long_rows",
    "marked_rows",
    "mean_interval",
    "paired_bootstrap",
    "pass_at_k",
    "perception_card",
    "placement",
    "prompt_inputs",
    "prompt_lengths",
    "rate_records",
    "same_answers",
    "semantic_entropy",
    "t_interval",
]
