"""The view that depends on the policy: its strength and its tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError
from cppo.fields import method_option

ENTROPY_ASCENT = "entropy_ascent"
"""The family of `rollout_views` that is no function of image and generator alone."""


@dataclass
class AscentOptions:
    """Options of `entropy_ascent`: gradient steps on the pixels that raise the policy's entropy. Defaults: ours."""

    view_ascent_steps: int = method_option(1, "Entropy ascent: gradient steps on the pixels.")
    view_ascent_step: Annotated[float, "[0, inf)"] = method_option(
        0.1, "Entropy ascent: length of a step, in the processor's normalized pixels."
    )
    view_ascent_bound: Annotated[float, "[0, inf)"] = method_option(
        0.1, "Entropy ascent: how far a normalized pixel moves at most, over all steps."
    )
    view_ascent_direction: Literal["sign", "normalized"] = method_option(
        "sign",
        "Entropy ascent: a step goes by the gradient's sign, or by the gradient over the root of its mean square.",
    )
    view_ascent_band: list[float] = method_option(
        [0.2, 0.8],
        "Entropy ascent: two quantiles of a rollout's entropies, [low, high], between which tokens count.",
    )


def ascends(options: Mapping[str, Any]) -> bool:
    """Whether rollouts are made from a view that depends on the policy."""
    return list(options["rollout_views"] or ()) == [ENTROPY_ASCENT]


def check_ascent(options: Mapping[str, Any]) -> None:
    """Hold the options against each other and against TRL's. Raises UserError."""
    band = options["view_ascent_band"]
    if len(band) != 2 or not 0 <= band[0] <= band[1] <= 1:
        raise UserError(f"view_ascent_band = {band}: give two quantiles, [low, high], 0 <= low <= high <= 1")
    if ENTROPY_ASCENT not in (options["rollout_views"] or ()):
        return
    if not ascends(options):
        raise UserError(f"rollout_views: {ENTROPY_ASCENT} depends on the policy, and stands alone in its list")
    what = f"rollout_views = ['{ENTROPY_ASCENT}']"
    if options["rollout_view_mode"] != "mix":
        raise UserError(f"{what} needs clean rollouts in each group: set rollout_view_mode = 'mix'")
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if options.get(name):
            raise UserError(
                f"{what} steps between two generations of a batch, which {name} = true makes elsewhere: set it false"
            )
