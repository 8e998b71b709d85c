"""The RL loss that a method adds to: CPPO's own options of it, and rules for TRL's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError
from cppo.fields import method_option


@dataclass
class RLOptions:
    """Options of the RL loss that TRL does not have."""

    rl_weight: Annotated[float, "[0, inf)"] = method_option(
        1.0, "Weight of the RL loss, KL to the reference included; 0 trains on the perception term alone."
    )
    entropy_estimator: Literal["exact", "sampled"] = method_option(
        "exact",
        "Entropy in the loss, that of `entropy_coef` and of the two weights above: 'exact' over the vocabulary, or "
        "'sampled', -log pi of the sampled token (PAPO, VPPO), whose gradient on-policy is zero on average. The logged "
        "`entropy` is the same.",
    )
    trained_answers: str | None = method_option(
        None,
        "Name of the reward function whose answers from the policy, such as description_reward's, are trained as "
        "rollouts of their own, with their own advantages.",
    )
    trained_answers_weight: Annotated[float, "(0, 1)"] = method_option(
        0.5, "Share of the answers of `trained_answers` in the policy loss; the rollouts have the rest."
    )


def check_rl(options: Mapping[str, Any]) -> None:
    """Hold TRL's options against ours. Raises UserError."""
    if options["entropy_estimator"] == "sampled" and (options.get("top_entropy_quantile") or 1.0) < 1.0:
        raise UserError(
            "top_entropy_quantile chooses tokens by their exact entropy: set entropy_estimator = 'exact', not 'sampled'"
        )
