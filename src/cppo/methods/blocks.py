"""The blocks that every method is made of, and the options of `CPPOConfig` that say which one it takes.

1. Views: images that the policy is also scored under (I+, I-), or that rollouts are made from (`preserving_views`,
   `removing_views`, `rollout_view*`, how often they are drawn (`view_draws`), and the strengths `view_*`).
2. Score: how much each response token depends on the image (`perception_score`).
3. Selector and gate: the tokens, and the rollouts, that the method acts on (`perception_selector`,
   `perception_top_*`; `perception_gate*`, `perception_rollouts_per_group`, `perception_weighting`).
4. Sink: what the divergences or scores go into, a loss of their own or the advantages (`perception_sink`, the other
   options `perception_*`).
   A weight may follow a schedule over the run (`schedules`).
5. RL: the loss that all this is added to (TRL's options, `rl_weight`, `entropy_estimator`).
6. Rewards: those that a method is defined by, with their weights (`Method.rewards`).

A method sets options; it has no code of its own. A block that no published method needed yet is one more function
behind one of these options.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]

SHAPING_SINKS = ("mask_advantage", "scale_advantage", "add_advantage", "factor_advantage", "softmax_advantage")
"""Values of `perception_sink` that change the advantages and add no loss."""

REWARDS = "rewards"
"""The entry of a declaration that names rewards with their weights."""

WHOLE_DISTRIBUTIONS = ("kl", "js", "anchored_entropy", "robust_dependency")
"""Values of `perception_divergence` and `perception_score` that are taken over the whole vocabulary of two policies."""


STATUSES: Mapping[str, str] = {
    "as published": "names the paper in its first sentence; what follows says where code and paper differ",
    "stand-in view": "the same, but a view takes the place of the paper's; its text says so after `Stand-in:`",
    "constants ours": "formulas or figures of the paper were not found; its first sentence says `constants ours`",
    "ours": "names no paper in its first sentence: a control, an ablation, or a method of ours",
}
"""How near a method is to its source, and by what in its text."""
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


@dataclass(frozen=True)
class Method:
    """A named method.

    Attributes:
        name: what `method` is set to.
        options: what it sets, by option; all others keep their defaults.
        text: what it is, its source, and what was chosen where the source leaves something open.
        rewards: the weight of each reward that it is defined by; none where any rewards serve it.
    """

    name: str
    options: Mapping[str, Any]
    text: str
    rewards: Mapping[str, float] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first sentence of `text`."""
        return self.text.partition("\n\n")[0].replace("\n", " ")

    @property
    def paper(self) -> str:
        """The arXiv number that `text` names first; "" without one."""
        found = _ARXIV.search(self.text)
        return found[1] if found else ""

    @property
    def status(self) -> str:
        """How near it is to its source, one of `STATUSES`; it follows from `text`."""
        if "constants ours" in self.summary:
            return "constants ours"
        if not _ARXIV.search(self.summary):
            return "ours"
        return "stand-in view" if "Stand-in:" in self.text else "as published"


def declared(name: str, declaration: Callable[[], Options]) -> Method:
    """The method that a declaration stands for: its docstring is the text, its entry `REWARDS` the rewards."""
    options = dict(declaration())
    rewards = options.pop(REWARDS, {})
    return Method(name, options, inspect.getdoc(declaration) or "", rewards)
