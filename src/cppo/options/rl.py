"""Options of the RL loss that TRL lacks, and rules for TRL's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cppo.errors import UserError
from cppo.fields import method_option


@dataclass
class RLOptions:
    """Options of the RL loss that TRL lacks."""

    rl_weight: Annotated[float, "[0, inf)"] = method_option(
        1.0, "Weight of the RL loss, including its KL to the reference; 0 trains on the perception loss alone."
    )
    entropy_estimator: Literal["exact", "sampled"] = method_option(
        "exact",
        "Entropy in `entropy_coef` and the two perception entropy weights. 'exact': over the vocabulary. 'sampled': "
        "-log pi of the sampled token (PAPO, VPPO); its on-policy gradient is zero on average. The logged `entropy` "
        "is the same estimate.",
    )
    trained_answers: str | None = method_option(
        None,
        "Name of a reward function that asks the policy questions, such as description_reward. The policy's answers "
        "are trained as rollouts with their own advantages.",
    )
    trained_answers_weight: Annotated[float, "(0, 1)"] = method_option(
        0.5, "Share of the `trained_answers` in the policy loss; the rollouts have the rest."
    )


def check_rl(options: Mapping[str, Any]) -> None:
    """Raise UserError where TRL's options contradict CPPO's."""
    if options["entropy_estimator"] == "sampled" and (options.get("top_entropy_quantile") or 1.0) < 1.0:
        raise UserError(
            "top_entropy_quantile selects tokens by exact entropy: set entropy_estimator = 'exact', not 'sampled'"
        )
