"""Methods side by side: blocks, extra passes and models of each, from its options."""

import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from cppo.imports import import_object
from cppo.methods import Method
from cppo.options import schema
from cppo.options.ascent import ascends
from cppo.perception import SCORES, SHAPINGS, TERMS, VIEWS, scored_views, views_of
from cppo.rewards import PolicyReward, load_reward
from cppo.rewards.spec import parse_reward

SIGNS = {"removing": "I-", "preserving": "I+"}
NONE = "-"
COLUMNS = (
    "method",
    "paper",
    "views",
    "score",
    "selector",
    "sink",
    "reward",
    "extra passes",
    "extra models",
    "status",
)
FIRST = ("method", "paper", "status")
"""Columns in the first line of a method on a terminal."""


def method_row(method: Method) -> dict[str, str]:
    """One line of the table, by `COLUMNS`; "-" for an empty cell."""
    options = _options(method)
    sink, selector = options.perception_sink, options.perception_selector
    scores = sink in SHAPINGS or (sink in TERMS and selector != "all")
    found = {
        "method": method.name,
        "paper": method.paper,
        "views": _views(options),
        "score": options.perception_score if scores else "",
        "selector": selector if sink != "none" else "",
        "sink": sink if sink != "none" else "",
        "reward": ", ".join(f"{name} x {weight:g}" for name, weight in method.rewards.items()),
        "extra passes": "; ".join(f"{kind} {what}" for kind, what in extra_passes(method).items() if what),
        "extra models": ", ".join(_models(method, options)),
        "status": method.status,
    }
    return {column: found[column] or NONE for column in COLUMNS}


def extra_passes(method: Method) -> dict[str, str]:
    """What a method runs beside GRPO's passes, by kind: "with gradient", "without", "generation of"; "" for none.

    A forward pass is named by what the policy sees in it, for every rollout of a step unless said otherwise. Generation
    of rollouts and the update's pass under the image are GRPO's own.
    """
    options = _options(method)
    with_gradient, without = [], []
    views = [SIGNS[view] for view in scored_views(options)]
    gated = "" if options.perception_gate == "none" else ", of gated-in rollouts"
    if options.perception_sink in SHAPINGS:
        without += ["I", *views]
    elif options.perception_sink in TERMS:
        if views and options.perception_view_policy == "current" and options.perception_view_gradients:
            with_gradient.append(" and ".join(views) + gated)
        elif views:
            without.append(" and ".join(views) + gated)
        if options.perception_normalization == "token" and options.perception_selector != "all":
            compared = [SIGNS[view] for view in VIEWS if view in views_of(SCORES[options.perception_score])]
            without.append(" and ".join(["I", *compared]) + gated)
    if ascends(vars(options)):
        times = f" {options.view_ascent_steps} times" if options.view_ascent_steps > 1 else ""
        with_gradient.append(f"I of the clean rollouts{times}, to its pixels")
    generated = []
    if options.advantage_baseline == "prompt" and options.baseline_init_samples:
        answers = f"{options.baseline_init_samples} answer{'s' * (options.baseline_init_samples > 1)}"
        generated.append(f"{answers} to each row before the first step")
    asking = [reward for reward in map(_reward, method.rewards) if isinstance(reward, PolicyReward)]
    if asking:
        generated.append("text-only answers")
    if options.trained_answers:
        with_gradient.append("text-only answers")
    if options.beta:
        without.append("I, of the reference")
    return {
        "with gradient": ", ".join(with_gradient),
        "without": ", ".join(without),
        "generation of": ", ".join(generated),
    }


def as_markdown(columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> str:
    """A Markdown table with the first column as code."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        first, *rest = (row[column] for column in columns)
        lines.append("| " + " | ".join([f"`{first}`", *rest]) + " |")
    return "\n".join(lines)


def as_text(rows: Sequence[Mapping[str, str]], width: int = 100) -> str:
    """The table for a terminal: a paragraph a method, since ten columns do not fit side by side."""
    lines = []
    for row in rows:
        lines.append(f"{row['method']}  (paper {row['paper']}, {row['status']})")
        told = [f"{name}: {row[name]}" for name in COLUMNS if row[name] != NONE and name not in FIRST]
        lines += textwrap.wrap(" | ".join(told), width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _options(method: Method) -> Any:
    """All options of the method, set or default: our own, and TRL's that matter here."""
    return SimpleNamespace(**{"beta": 0.0, **schema("train").defaults, **method.options})


def _reward(spec: str) -> Any:
    return load_reward(parse_reward(spec))


def _views(options: Any) -> str:
    """Families of each scored view, and of the images for rollouts."""
    families = {"removing": options.removing_views, "preserving": options.preserving_views}
    scored = scored_views(options) if options.perception_sink != "none" else ()
    told = [f"{SIGNS[view]} {', '.join(families[view])}" for view in scored]
    if options.rollout_views:
        told.append(f"rollouts {', '.join(options.rollout_views)}")
    return "; ".join(told)


def _models(method: Method, options: Any) -> Iterator[str]:
    """Models beside the policy, with a judge if a reward has the option `judge`, which may be left out."""
    if options.beta:
        yield "reference"
    for spec in map(parse_reward, method.rewards):
        if "judge" in inspect.signature(import_object(spec.path, "rewards")).parameters:
            yield "judge" if "judge" in (spec.options or {}) else "judge (option)"
