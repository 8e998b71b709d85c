"""The blocks of every method, and the options of `CPPOConfig` that configure each block.

1. Views: perturbed images that the policy is also scored under (I+, I-), or that rollouts are made from
   (`preserving_views`, `removing_views`, `rollout_view*`, `view_draws`, and the strengths `view_*`).
2. Score: how much each response token depends on the image (`perception_score`).
3. Selector and gate: the tokens and the rollouts that the method acts on (`perception_selector`,
   `perception_top_*`; `perception_gate*`, `perception_rollouts_per_group`, `perception_weighting`).
4. Sink: a loss on the divergences, or a shaping of the advantages by the scores (`perception_sink`, the other
   options `perception_*`). A weight may follow a schedule over the run (`schedules`).
5. RL: the loss that all this is added to (TRL's options, `rl_weight`, `entropy_estimator`).
6. Rewards: the rewards that define a method, with their weights (`Method.rewards`).

A method only sets options; it has no code. A new block is one more function behind one of these options.
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
"""The key of a declaration that maps the method's rewards to their weights."""

WHOLE_DISTRIBUTIONS = ("kl", "js", "anchored_entropy", "robust_dependency")
"""Values of `perception_divergence` and `perception_score` that compare two policies over the whole vocabulary."""


STATUSES: Mapping[str, str] = {
    "as published": "the first sentence names the paper; the text says where code and paper differ",
    "constants ours": "formulas or figures of the paper were not found; the first sentence says `constants ours`",
    "ours": "the first sentence names no paper: a control, an ablation, or a method of ours",
}
"""How near a method is to its source -> how its text says so."""
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


@dataclass(frozen=True)
class Method:
    """A named method.

    Attributes:
        name: the value of the option `method`.
        options: the options that it sets; all others keep their defaults.
        text: what it is, its source, and our choices where the source is silent.
        rewards: the rewards that define it, with their weights; empty for a method that works with any rewards.
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
        """The first arXiv number in `text`; "" without one."""
        found = _ARXIV.search(self.text)
        return found[1] if found else ""

    @property
    def status(self) -> str:
        """How near the method is to its source, a key of `STATUSES`; `text` decides."""
        if "constants ours" in self.summary:
            return "constants ours"
        if not _ARXIV.search(self.summary):
            return "ours"
        return "as published"


def declared(name: str, declaration: Callable[[], Options]) -> Method:
    """The method of a declaration: its docstring is the text, its entry `REWARDS` the rewards."""
    options = dict(declaration())
    rewards = options.pop(REWARDS, {})
    return Method(name, options, inspect.getdoc(declaration) or "", rewards)
