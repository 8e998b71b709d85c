"""The options of a method inside verl: those of `CPPOConfig` without TRL's and verl's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cppo.errors import UserError, did_you_mean
from cppo.fields import OptionField, option, option_fields, resolve
from cppo.hooks import check_options
from cppo.methods import get_method
from cppo.options import EXECUTION_OPTIONS, CPPOOptions, cppo_fields
from cppo.options.views import INSIDE_VIEWS, input_views
from cppo.perception import (
    EXACT_DIVERGENCES,
    SCORES,
    SELECTORS,
    SHAPINGS,
    TERMS,
    adds_perception_loss,
    needed,
    needs_of,
    scored_views,
)
from cppo.values import check_value
from cppo.views import view_sampler

WHERE = "actor_rollout_ref.rollout.custom.cppo"
"""The place of the options in verl's configuration."""
NOT_OURS = EXECUTION_OPTIONS - {"view_threads"}
"""Options of how TRL's trainer computes."""
SEEN = "inside verl the loss sees only log-probabilities and entropies of tokens"
ELSE = ": choose another method"


@dataclass
class VerlOptions(CPPOOptions):
    """A method's options inside verl, complete and checked.

    Raises:
        UserError: a value is out of its range, or the method cannot run inside verl.
    """

    seed: int = option(42, "Seed of the views, a whole number.")

    def __post_init__(self) -> None:
        resolve(self, get_method(self.method).options)
        check_options(self)
        view_sampler(vars(self))
        reason = _obstacle(self)
        if reason is not None:
            raise UserError(
                f"{WHERE}: method = {self.method!r} cannot run inside verl: {reason}, or train with `cppo train`"
            )

    @property
    def adds_perception_loss(self) -> bool:
        """Whether a perception loss is added to verl's."""
        return adds_perception_loss(self)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The views that the loss uses, in the order of their rows; empty without a perception loss."""
        return scored_views(self) if self.adds_perception_loss else ()

    @property
    def scores_before_updates(self) -> bool:
        """Whether the policy scores the views once before its updates, so that they add no rows to updates."""
        return self.perception_view_policy == "rollout"


def verl_fields() -> dict[str, OptionField]:
    """The options that a method accepts inside verl, by name."""
    return {"seed": option_fields(VerlOptions)["seed"]} | {
        name: field for name, field in cppo_fields().items() if name not in NOT_OURS
    }


def options_from(mapping: Mapping[str, Any] | None) -> VerlOptions:
    """The options from a mapping of names to values; `method` sets the missing ones.

    Raises:
        UserError: an option is unknown, not a method's, or invalid; or the method cannot run inside verl.
    """
    known, given = verl_fields(), {}
    for name, value in (mapping or {}).items():
        if name in NOT_OURS:
            raise UserError(f"{WHERE}: `{name}` sets how TRL's trainer computes, but verl computes here: leave it out")
        if name not in known:
            hint = did_you_mean(name, known) or "its options are those of a method (see `cppo methods`), and `seed`"
            raise UserError(f"{WHERE}: unknown option `{name}`; {hint}")
        given[name] = check_value(known[name], value, where=f"{WHERE}: {name}")
    return VerlOptions(**given)


def _obstacle(options: VerlOptions) -> str | None:
    """Why the options cannot run inside verl, and what to choose; None if they can."""
    if options.rollout_views:
        return f"rollout_views gives rollouts other images, but verl makes them only from the images in its data{ELSE}"
    for family in input_views(vars(options)).values():
        where = "is inside the model, which" if family in INSIDE_VIEWS else "changes the model's inputs, but"
        return f"removing_views = ['{family}'] {where} verl runs it itself: use a view that is a picture"
    if options.perception_sink in SHAPINGS:
        return (
            f"perception_sink = {options.perception_sink!r} shapes advantages, but verl computes them where no view "
            f"is scored{ELSE}"
        )
    if options.trained_answers is not None:
        asks = f"trained_answers = {options.trained_answers!r} asks the policy"
        return f"{asks}, but verl's reward workers have none{ELSE}"
    if options.schedules:
        changes = f"schedules = {options.schedules} change weights by the step"
        return f"{changes}, but verl's loss does not know the step: leave it out"
    if not options.adds_perception_loss:
        return None
    if options.perception_weight and options.perception_divergence in EXACT_DIVERGENCES:
        return f"perception_divergence = {options.perception_divergence!r} needs logits, but {SEEN}: use 'k3'"
    for name, function in (
        ("perception_sink", TERMS[options.perception_sink]),
        ("perception_score", SCORES[options.perception_score]),
        ("perception_selector", SELECTORS[options.perception_selector]),
    ):
        missing = needs_of(function) & needed(options) - {"response_mask"}
        if missing:
            return f"{name} = {getattr(options, name)!r} needs {', '.join(sorted(missing))}, but {SEEN}{ELSE}"
    if not options.kinds:
        return f"perception_sink = {options.perception_sink!r} uses no view, but CPPO inside verl works on views{ELSE}"
    if options.perception_selector_scope == "batch":
        return "perception_selector_scope = 'batch' would depend on verl's mini-batches: use 'rollout'"
    if options.perception_normalization == "microbatch":
        return "perception_normalization = 'microbatch' would depend on verl's mini-batches: use 'rollout'"
    if options.perception_normalization == "token" and options.perception_selector != "all":
        return (
            "perception_normalization = 'token' needs the selected tokens of a step before its first update, but "
            f"perception_selector = {options.perception_selector!r} finds them only in the update: use 'rollout'"
        )
    if options.perception_rollouts_per_group is not None:
        return (
            "perception_rollouts_per_group draws from whole groups, but verl spreads them over processes: leave it out"
        )
    return None
