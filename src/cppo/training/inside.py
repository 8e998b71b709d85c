"""The checks of views that need the model's inside or the policy's gradient."""

from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled

from cppo.errors import UserError
from cppo.options.ascent import ENTROPY_ASCENT
from cppo.options.views import INSIDE_VIEWS
from cppo.policy import unshared_reason, unwrapped, vision_tower_parameters
from cppo.policy.packed import share_prompts


def admit_ascent(trainer: Any) -> None:
    """Raise UserError where no gradient reaches the pixels, or where processes would wait for each other."""
    if trainer.args.pixel_steps is None:
        return
    what = f"rollout_views = ['{ENTROPY_ASCENT}']"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(f"{what} needs a gradient outside the update, which DeepSpeed and FSDP do not give: use DDP")
    if not any(parameter.requires_grad for parameter in vision_tower_parameters(unwrapped(trainer.model))):
        raise UserError(f"{what} needs a gradient through the vision tower, but nothing in it is trained: train it too")


def admit_inside_views(trainer: Any) -> None:
    """Give the model the attention that its views inside the model need.

    Raises UserError where its attention is of another kind, or where processes would wait for each other.
    """
    args, policy = trainer.args, unwrapped(trainer.model)
    names = [name for name in args.input_views.values() if name in INSIDE_VIEWS]
    reason = unshared_reason(policy.config)
    for name in names:
        if name != "image_removed" and reason is not None:
            raise UserError(f"removing_views = ['{name}'] changes the attention, but {reason}")
    if "values_replaced" in names:
        share_prompts(policy)
    alone = args.separate_view_pass or (args.adds_perception_loss and args.perception_view_policy == "rollout")
    sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
    for name in names:
        if name != "values_replaced" and alone and sharded:
            raise UserError(
                f"removing_views = ['{name}'] scores views without the vision tower, and FSDP and ZeRO-3 would wait "
                "forever: set perception_view_policy = 'current' and perception_view_gradients = true"
            )
