"""The vision-language model as a scorer of response tokens."""

from cppo.policy.families import vision_placeholder_ids
from cppo.policy.scorer import ResponseScores, plain_scores
from cppo.policy.vision_inputs import concatenate_rows, slice_rows

__all__ = ["ResponseScores", "concatenate_rows", "plain_scores", "slice_rows", "vision_placeholder_ids"]
