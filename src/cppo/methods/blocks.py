"""The blocks that every method is made of, and the options of `CPPOConfig` that say which one it takes.

1. Views: images that the policy is also scored under (I+, I-), or that rollouts are made from.
2. Score: how much each response token depends on the image.
3. Selector and gate: the tokens, and the rollouts, that the method acts on.
4. Sink: what the divergences or scores go into: a loss of their own, or the advantages.
5. RL: the loss that all this is added to (TRL's options).

A method sets options; it has no code of its own. A block that no published method needed yet is one more function
behind one of these options.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Options = dict[str, Any]

VIEWS = (
    "preserving_views",
    "removing_views",
    "view_brightness",
    "view_contrast",
    "view_saturation",
    "view_perspective_distortion",
    "view_perspective_probability",
    "view_rotation_degrees",
    "view_diffusion_steps",
    "view_noise_rectangles",
    "view_noise_side",
    "view_crop_side",
    "view_patch_side",
    "view_patch_probability",
    "rollout_views",
    "rollout_view_mode",
    "rollout_view_fraction",
    "rollout_view_decay",
)
SCORE = ("perception_score",)
SELECTOR_AND_GATE = (
    "perception_selector",
    "perception_top_fraction",
    "perception_gate",
    "perception_gate_reward",
    "perception_rollouts_per_group",
    "perception_weighting",
)
SINK = (
    "perception_sink",
    "perception_weight",
    "perception_temperature",
    "perception_divergence",
    "perception_preserving_weight",
    "perception_removing_weight",
    "perception_removing_entropy_weight",
    "perception_advantage_floor",
    "perception_weight_threshold",
    "perception_weight_slope",
    "perception_normalization",
    "perception_view_gradients",
    "perception_anchor_gradients",
)
RL = ("rl_weight",)
SHAPING_SINKS = ("advantage", "weights")
"""Values of `perception_sink` that change the advantages and add no loss."""

METHOD_OPTIONS = frozenset((*VIEWS, *SCORE, *SELECTOR_AND_GATE, *SINK, *RL))
"""The options of CPPO's own that belong to a method: a recipe's values for them go when another method is chosen."""


@dataclass(frozen=True)
class Method:
    """A named method.

    Attributes:
        name: what `method` is set to.
        options: what it sets, by option; all others keep their defaults.
        text: what it is, its source, and what was chosen where the source leaves something open.
    """

    name: str
    options: Mapping[str, Any]
    text: str

    @property
    def summary(self) -> str:
        """The first sentence of `text`."""
        return self.text.partition("\n\n")[0].replace("\n", " ")


def declared(name: str, declaration: Callable[[], Options]) -> Method:
    """The method that a declaration stands for; its docstring is the method's text."""
    return Method(name, declaration(), inspect.getdoc(declaration) or "")
