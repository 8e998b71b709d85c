"""The user's own scores, selectors and sinks: load them, register them beside the packaged ones, and try them before a
run.

The options `perception_score`, `perception_selector` and `perception_sink` name one as `file.py:function` or
`module:function`. A configuration that names a function registers it in `cppo.perception`. Every error, in the trial or
in the run, is one line that names option, file and function.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cppo.errors import UserError
from cppo.imports import failure, is_own, load_function
from cppo.options import check_combinations, cppo_fields
from cppo.perception import (
    EXACT_DIVERGENCES,
    SCORES,
    SELECTORS,
    SHAPINGS,
    SIMILARITIES,
    TERMS,
    VIEWS,
    ResponseScores,
    ViewScores,
    detect,
    entropy_from_logits,
    needed,
    needs_of,
    scored_views,
    shapes_advantages,
    view_divergence,
    views_of,
    with_divergences,
)
from cppo.values import check_value

LENGTHS = (6, 4, 1, 0)
"""Lengths of the trial responses; the middle of the longest has a tool's token, which the mask excludes."""
VOCABULARY, WIDTH = 11, 5
LOGITS = "logits"
"""The need that comes alone: a score of both policies' logits takes nothing else."""


@dataclass(frozen=True)
class Hook:
    """One kind of function.

    Attributes:
        kind: its name in messages.
        registry: where it is looked up.
        needs: what it may declare by `needs`.
        call: its arguments, for messages.
        shape: of its result, from its arguments.
        dtype: "floating-point" or "bool".
    """

    kind: str
    registry: dict[str, Any]
    needs: frozenset[str]
    call: str
    shape: Callable[..., torch.Size]
    dtype: str = "floating-point"

    def guarded(self, function: Callable[..., Any], what: str) -> Callable[..., Tensor]:
        """The function, guarded: an exception, or a result of another kind, becomes one line after `what`."""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Tensor:
            try:
                found = function(*arguments, **named)
            except (Exception, SystemExit) as error:  # user code may raise anything, also `sys.exit`
                raise UserError(f"{failure(error, what)}; {self._called(function, error)}") from error
            shape = self.shape(*arguments)
            returned = f"a {type(found).__name__}"
            if isinstance(found, Tensor):
                is_kind = found.dtype == torch.bool if self.dtype == "bool" else found.is_floating_point()
                if is_kind and found.shape == shape:
                    return found
                returned = f"{str(found.dtype).removeprefix('torch.')} values of shape {tuple(found.shape)}"
            wanted = f"a {self.dtype} tensor of shape {tuple(shape)}, one value per token"
            raise UserError(f"{what} must return {wanted}; it returned {returned}")

        return call

    def _called(self, function: Callable[..., Any], error: BaseException) -> str:
        """How the function is called, and the inputs that it took without a declaration, as far as its error shows."""
        if LOGITS in needs_of(function):
            return f"with needs('{LOGITS}') a score is called as function(logits, removing_logits)"
        code = getattr(inspect.unwrap(function), "__code__", None)
        taken = (
            {*code.co_names, *code.co_varnames, *code.co_consts} & (self.needs - needs_of(function)) if code else set()
        )
        lacking = sorted(name for name in taken if "NoneType" in str(error) or f"'{name}'" in str(error))
        if lacking:
            return f"declare needs({', '.join(map(repr, lacking))})"
        return f"a {self.kind} is called as function({self.call}), with the inputs that it declares by needs(...)"


def _score_shape(anchor: ResponseScores | Tensor, *_: ResponseScores | Tensor) -> torch.Size:
    return anchor.shape[:-1] if isinstance(anchor, Tensor) else anchor.logps.shape


FROM_LOGITS = frozenset({LOGITS, *EXACT_DIVERGENCES})
OF_TOKENS = SIMILARITIES | {"hidden_states"}
SCORE = Hook("score", SCORES, FROM_LOGITS | OF_TOKENS | {"response_mask"}, "anchor, removing", _score_shape)
SELECTOR = Hook(
    "selector",
    SELECTORS,
    frozenset({"draws", "entropies", "nucleus_entropies", "options"}),
    "score, response_mask, top_fraction, rounding=..., draws=...",
    lambda score, *_: score.shape,
    "bool",
)
TERM = Hook(
    "loss term",
    TERMS,
    frozenset({"hidden_states", "advantages", "old_logps", "reference_logps", "response_mean"}),
    "scores, options",
    lambda scores, _: scores.response_mask.shape,
)
SHAPING = Hook(
    "advantage shaping",
    SHAPINGS,
    frozenset({"hidden_states", "rollout_weights", "group_weights"}),
    "scores, advantages, options",
    lambda scores, *_: scores.response_mask.shape,
)
HOOKS = {"perception_score": (SCORE,), "perception_selector": (SELECTOR,), "perception_sink": (TERM, SHAPING)}


def check_options(options: Any) -> None:
    """Convert CPPO's own options of a configuration to their types, check all, and try the user's functions.

    Raises UserError that names the option.
    """
    for name, declared in cppo_fields().items():
        setattr(options, name, check_value(declared, getattr(options, name), where=name))
    register_own(vars(options))
    check_combinations(vars(options), shapes_advantages=options.perception_sink in SHAPINGS)
    try_own(options)


def register_own(options: Mapping[str, Any]) -> None:
    """Register the user's own functions that the options name; they replace earlier ones.

    Raises UserError where one cannot be imported, is not a function, or needs an input that its kind does not get.
    """
    for option, hooks in HOOKS.items():
        name = options[option]
        if is_own(name):
            what = f"{option} {name!r}"
            function = load_function(name, what)
            hook = hooks[-1] if shapes_advantages(function) else hooks[0]
            unknown = ", ".join(sorted(map(str, needs_of(function) - hook.needs)))
            if unknown:
                known = ", ".join(sorted(hook.needs))
                raise UserError(f"{what} needs {unknown}, which a {hook.kind} does not get; it may need {known}")
            if LOGITS in needs_of(function) and len(needs_of(function)) > 1:
                others = ", ".join(sorted(needs_of(function) - {LOGITS}))
                raise UserError(
                    f"{what}: needs('{LOGITS}') comes alone: compute {others} from the logits, or drop {LOGITS}"
                )
            strange = [view for view in views_of(function, ()) if view not in VIEWS]
            if strange or (LOGITS in needs_of(function) and views_of(function) != ("removing",)):
                raise UserError(
                    f"{what} is declared under{views_of(function)}: give 'removing' or 'preserving', or none; with "
                    "needs('logits') it compares 'removing'"
                )
            for other in hooks:
                other.registry.pop(name, None)
            hook.registry[name] = hook.guarded(function, what)


def try_own(options: Any) -> None:
    """Call the user's own functions of a configuration with trial tensors.

    Raises UserError where one fails, changes its input, or its result has another shape or dtype, is not finite, or
    differs between two calls. A result must not depend on values outside the response mask. A selector must stay inside
    the mask; a loss term must have a gradient.
    """
    own = {option: getattr(options, option) for option in HOOKS if is_own(getattr(options, option))}
    if not own:
        return
    unknown = needed(options) & (FROM_LOGITS | {"hidden_states", "nucleus_entropies"})
    if unknown and options.perception_sink in TERMS and options.perception_view_policy == "rollout":
        raise UserError(
            f"{' and '.join(own.values())}: perception_view_policy = 'rollout' keeps only log-probabilities and "
            f"entropies, but {', '.join(sorted(unknown))} is needed: set perception_view_policy = 'current'"
        )
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    mask[0, 2] = 0
    inside = mask.bool()
    made, other = (_made_up(options, mask, noise) for noise in (0.0, 1.0))
    for option, name in own.items():
        what = f"{option} {name!r}"
        if option == "perception_score":
            _tried(what, _score, [(SCORES[name], scores) for scores in (made, other)], inside)
        elif option == "perception_selector":
            kept = _tried(what, functools.partial(_select, SELECTORS[name], options), [(made,), (other,)], inside)
            if (kept & ~inside).any():
                raise UserError(f"{what} selects tokens outside response_mask: return its selection & response_mask")
        elif name in SHAPINGS or options.perception_weight:
            found = [_as_scored(detect(scores, options), options) for scores in (made, other)]
            if name in TERMS:
                _try_term(what, TERMS[name], found, options)
            else:
                advantages = torch.linspace(-1.0, 1.0, len(mask))
                _tried(what, SHAPINGS[name], [(scores, advantages, options) for scores in found], inside)


def _made_up(options: Any, mask: Tensor, noise: float) -> ViewScores:
    """Scores of trial rollouts under the image and both views, with logits; `noise` is added outside the mask."""
    generator = torch.Generator().manual_seed(0)
    outside = noise * (1 - mask)

    def policy() -> ResponseScores:
        logits = torch.randn((*mask.shape, VOCABULARY), generator=generator)
        hidden = torch.randn((*mask.shape, WIDTH), generator=generator) + outside[..., None]
        logps, entropies = logits.log_softmax(-1)[..., 0] + outside, entropy_from_logits(logits) + outside
        logits = logits + outside[..., None] * torch.arange(VOCABULARY)
        kept = hidden if "hidden_states" in needed(options) else None
        near = {name: hidden.tanh()[..., place] for place, name in enumerate(sorted(SIMILARITIES))}
        return ResponseScores(logps, entropies, logits, None, kept, similarities=near)

    anchor, removing, preserving = (policy() for _ in range(3))
    score, draws = (torch.rand(mask.shape, generator=generator) for _ in range(2))
    advantages, others = torch.linspace(-1.0, 1.0, len(mask)), anchor.logps - draws - outside
    return ViewScores(
        *(anchor, removing, preserving, mask, draws, score + outside),
        advantages=advantages,
        old_logps=others,
        reference_logps=others,
    )


@torch.no_grad()
def _score(score: Callable[..., Tensor], scores: ViewScores) -> Tensor:
    """The score from the inputs that it declares and no others, as from the packed scorer."""
    anchor, needed = scores.anchor, needs_of(score)
    views = [getattr(scores, name) for name in views_of(score)]
    if LOGITS in needed:
        return score(*(one.logits.flatten(0, 1) for one in (anchor, *views))).view_as(anchor.logps)
    near = {name: values for name, values in anchor.similarities.items() if name in needed}
    given = []
    for view in views:
        exact = {name: view_divergence(name, anchor, view) for name in EXACT_DIVERGENCES if name in needed}
        given.append(replace(view, logits=None, exact=exact, similarities={}))
    mask = {"response_mask": scores.response_mask.bool()} if "response_mask" in needed else {}
    return score(replace(anchor, logits=None, similarities=near), *given, **mask)


@torch.no_grad()
def _select(selector: Callable[..., Tensor], options: Any, scores: ViewScores) -> Tensor:
    """A selector's result from the inputs that it declares and no others."""
    given = {"entropies": scores.anchor.entropies, "nucleus_entropies": scores.anchor.entropies, "options": options}
    more = {name: value for name, value in given.items() if name in needs_of(selector)}
    draws = scores.draws if "draws" in needs_of(selector) else None
    mask, fraction = scores.response_mask.bool(), options.perception_top_fraction
    return selector(scores.score, mask, fraction, rounding=options.perception_top_rounding, draws=draws, **more)


def _as_scored(scores: ViewScores, options: Any) -> ViewScores:
    """A sink's scores under the views that the options use, with what it declares; at least one token is selected."""
    assert scores.token_mask is not None
    chosen = scores.token_mask if scores.token_mask.any() else scores.response_mask.bool()
    views = scored_views(options)
    removing = scores.removing if "removing" in views else None
    preserving = scores.preserving if "preserving" in views else None
    undeclared: dict[str, Any] = {
        name: None for name in ("advantages", "old_logps", "reference_logps") if name not in needed(options)
    }
    return replace(scores, removing=removing, preserving=preserving, token_mask=chosen, **undeclared)


def _try_term(what: str, term: Callable[..., Tensor], found: Sequence[ViewScores], options: Any) -> None:
    leaves: list[Tensor] = []
    arguments = []
    for scores in found:
        views = (scores.removing, scores.preserving) if options.perception_view_gradients else ()
        for one in (scores.anchor, *views):
            kept = () if one is None else (one.logps, one.entropies, one.logits, one.hidden_states)
            leaves += [values.requires_grad_() for values in kept if values is not None]
        compared = with_divergences(scores, options)
        known = replace(
            compared,
            anchor=replace(compared.anchor, logits=None),
            removing=compared.removing and replace(compared.removing, logits=None),
            preserving=compared.preserving and replace(compared.preserving, logits=None),
        )
        arguments.append((known, options))
    chosen = found[0].token_mask
    assert chosen is not None
    loss = _tried(what, term, arguments, chosen)[chosen].sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
    reached = [gradient for gradient in gradients if gradient is not None]
    if not reached:
        raise UserError(
            f"{what} has no gradient, so it trains nothing: compute the loss from the scores' tensors without "
            "detaching them, and from a view with gradients"
        )
    if not all(gradient.isfinite().all() for gradient in reached):
        raise UserError(f"{what} has a gradient that is not finite for ordinary scores: avoid 0 / 0 and log 0")


def _tried(what: str, function: Callable[..., Tensor], arguments: Sequence[tuple[Any, ...]], where: Tensor) -> Tensor:
    """A function's result for the first of the arguments; the others differ from it only outside `where`.

    Raises UserError where the function changes its input, or where the result is not finite, changes between calls, or
    differs for the other arguments.
    """
    given = list(_tensors(arguments))
    before = [tensor.detach().clone() for tensor in given]
    first, again, other = (function(*arguments[place]) for place in (0, 0, 1))
    if not all(map(torch.equal, before, given)):
        raise UserError(f"{what} changes a tensor that it is given, which the loss needs as it is: change a clone()")
    if not first[where].isfinite().all():
        raise UserError(f"{what} returns values that are not finite for ordinary scores: avoid 0 / 0 and log 0")
    if not torch.equal(first[where], again[where]):
        raise UserError(
            f"{what} returns other values for the same tensors: draw nothing at random, and keep no state (a selector "
            'may declare needs("draws"))'
        )
    if not torch.equal(first[where], other[where]):
        raise UserError(
            f"{what} depends on values outside the response, which may be anything: let no token's value depend on "
            "them, or fill them by response_mask first"
        )
    return first


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested sequences, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(list(vars(value).values()))
