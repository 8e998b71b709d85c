"""The blocks that every method is made of, and the options of `CPPOConfig` that say which one it takes.

1. Views: images that the policy is also scored under (I+, I-), or that rollouts are made from (`preserving_views`,
   `removing_views`, `rollout_view*`, how often they are drawn (`view_draws`), and the strengths `view_*`).
2. Score: how much each response token depends on the image (`perception_score`).
3. Selector and gate: the tokens, and the rollouts, that the method acts on (`perception_selector`,
   `perception_top_*`; `perception_gate*`, `perception_rollouts_per_group`, `perception_weighting`).
4. Sink: what the divergences or scores go into, a loss of their own or the advantages (`perception_sink`, the other
   options `perception_*`).
5. RL: the loss that all this is added to (TRL's options, `rl_weight`, `entropy_estimator`).

A method sets options; it has no code of its own. A block that no published method needed yet is one more function
behind one of these options.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Options = dict[str, Any]

SHAPING_SINKS = ("mask_advantage", "scale_advantage")
"""Values of `perception_sink` that change the advantages and add no loss."""

WHOLE_DISTRIBUTIONS = ("kl", "js")
"""Values of `perception_divergence` and `perception_score` that are taken over the whole vocabulary."""


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
