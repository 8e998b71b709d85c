"""The vision-language model as a scorer of response tokens."""

from cppo.policy.families import (
    takes_images_a_row,
    unshared_reason,
    vision_placeholder_ids,
)
from cppo.policy.loading import adapts_tied_weights, merged, unwrapped
from cppo.policy.packed import LanguageHead, Readout, add_shared_prompt_forward
from cppo.policy.packing import PackedBatch, PromptGroup, pack, prompt_groups
from cppo.policy.rollout import only_special_tokens, shared_generation
from cppo.policy.scorer import plain_scores, shared_prompt_scores
from cppo.policy.vision_inputs import concatenate_rows, slice_rows
from cppo.policy.vision_tower import leave_out_frozen_tower, vision_tower_parameters

__all__ = [
    "LanguageHead",
    "PackedBatch",
    "PromptGroup",
    "Readout",
    "adapts_tied_weights",
    "add_shared_prompt_forward",
    "concatenate_rows",
    "leave_out_frozen_tower",
    "merged",
    "only_special_tokens",
    "pack",
    "plain_scores",
    "prompt_groups",
    "shared_generation",
    "shared_prompt_scores",
    "slice_rows",
    "takes_images_a_row",
    "unshared_reason",
    "unwrapped",
    "vision_placeholder_ids",
    "vision_tower_parameters",
]
