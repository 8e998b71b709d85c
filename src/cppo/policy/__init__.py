"""The vision-language model as a scorer of response tokens."""

from cppo.policy.families import unshared_reason, vision_placeholder_ids
from cppo.policy.head import LanguageHead
from cppo.policy.packed import Readout, add_shared_prompt_forward, shared_prompt_scores, unwrapped
from cppo.policy.packing import PackedBatch, PromptGroup, pack, prompt_groups
from cppo.policy.rollout import shared_prefill
from cppo.policy.scorer import ResponseScores, plain_scores
from cppo.policy.vision_inputs import concatenate_rows, slice_rows

__all__ = [
    "LanguageHead",
    "PackedBatch",
    "PromptGroup",
    "Readout",
    "ResponseScores",
    "add_shared_prompt_forward",
    "concatenate_rows",
    "pack",
    "plain_scores",
    "prompt_groups",
    "shared_prefill",
    "shared_prompt_scores",
    "slice_rows",
    "unshared_reason",
    "unwrapped",
    "vision_placeholder_ids",
]
