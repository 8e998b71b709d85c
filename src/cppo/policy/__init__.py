"""The vision-language model as a scorer of response tokens."""

from cppo.policy.dependency import DEPENDENCY_SCORES, DIVERGENCES, dependency_score, view_divergence
from cppo.policy.families import (
    takes_images_a_row,
    unshared_reason,
    vision_placeholder_ids,
    vision_tower_parameters,
)
from cppo.policy.head import LanguageHead
from cppo.policy.loading import adapts_tied_weights, merged, unwrapped
from cppo.policy.packed import Readout, add_shared_prompt_forward, shared_prompt_scores
from cppo.policy.packing import PackedBatch, PromptGroup, pack, prompt_groups
from cppo.policy.rollout import only_special_tokens, shared_prefill, sliced_generation
from cppo.policy.scorer import ResponseScores, plain_scores
from cppo.policy.vision_inputs import concatenate_rows, slice_rows

__all__ = [
    "DEPENDENCY_SCORES",
    "DIVERGENCES",
    "LanguageHead",
    "PackedBatch",
    "PromptGroup",
    "Readout",
    "ResponseScores",
    "adapts_tied_weights",
    "add_shared_prompt_forward",
    "concatenate_rows",
    "dependency_score",
    "merged",
    "only_special_tokens",
    "pack",
    "plain_scores",
    "prompt_groups",
    "shared_prefill",
    "shared_prompt_scores",
    "slice_rows",
    "sliced_generation",
    "takes_images_a_row",
    "unshared_reason",
    "unwrapped",
    "view_divergence",
    "vision_placeholder_ids",
    "vision_tower_parameters",
]
