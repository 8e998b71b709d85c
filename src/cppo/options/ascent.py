"""Options of `entropy_ascent`, the view that depends on the policy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError
from cppo.fields import method_option

ENTROPY_ASCENT = "entropy_ascent"
"""The one family of `rollout_views` that needs the policy; the others need only the image and a generator."""


@dataclass
class AscentOptions:
    """Options of `entropy_ascent`: gradient steps on the pixels that raise the policy's entropy. Defaults: ours."""

    view_ascent_steps: int = method_option(1, "Entropy ascent: number of gradient steps on the pixels.")
    view_ascent_step: Annotated[float, "[0, inf)"] = method_option(
        0.1, "Entropy ascent: step length, in the processor's normalized pixel units."
    )
    view_ascent_bound: Annotated[float, "[0, inf)"] = method_option(
        0.1, "Entropy ascent: largest total change of a pixel, in normalized pixel units."
    )
    view_ascent_direction: Literal["sign", "normalized"] = method_option(
        "sign",
        "Entropy ascent: what a step follows: 'sign', the gradient's sign; 'normalized', the gradient over its root "
        "mean square.",
    )
    view_ascent_band: list[float] = method_option(
        [0.2, 0.8],
        "Entropy ascent: [low, high] quantiles of a rollout's token entropies. Only tokens between them count.",
    )


def ascends(options: Mapping[str, Any]) -> bool:
    """Whether rollouts are made from a view that depends on the policy."""
    return list(options["rollout_views"] or ()) == [ENTROPY_ASCENT]


def check_ascent(options: Mapping[str, Any]) -> None:
    """Raise UserError where the options contradict each other or TRL's."""
    band = options["view_ascent_band"]
    if len(band) != 2 or not 0 <= band[0] <= band[1] <= 1:
        raise UserError(f"view_ascent_band = {band}: give two quantiles, [low, high], 0 <= low <= high <= 1")
    if ENTROPY_ASCENT not in (options["rollout_views"] or ()):
        return
    if not ascends(options):
        raise UserError(
            f"rollout_views: {ENTROPY_ASCENT} depends on the policy and must be the only family in the list"
        )
    what = f"rollout_views = ['{ENTROPY_ASCENT}']"
    if options["rollout_view_mode"] != "mix":
        raise UserError(f"{what} needs clean rollouts in each group: set rollout_view_mode = 'mix'")
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if options.get(name):
            raise UserError(
                f"{what} changes images between two generations of a batch, which {name} = true does not allow: set "
                "it false"
            )
    group = options.get("num_generations") or 1
    rows = [options.get(name) or 0 for name in ("per_device_train_batch_size", "steps_per_generation")]
    if rows[0] * rows[1] % group:
        raise UserError(
            f"{what} needs whole groups in each process, which makes {rows[0]} x {rows[1]} rollouts at once: let "
            f"per_device_train_batch_size x steps_per_generation be a multiple of num_generations = {group}"
        )
