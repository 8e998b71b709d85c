"""Which definition of a view, score, sink or method a cell ran with: its options do not say this.

A part of the code is written as its kind and name: `view crop`, `score k3`, `method papo`. A change that makes a part
compute something else from the same options adds a sentence to `CHANGES`. No torch.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from cppo.imports import is_own
from cppo.options import schema
from cppo.options.selection import DETECTORS
from cppo.views import condition_families

CHANGES: Mapping[str, tuple[str, ...]] = {
    "view color_jitter": ("Brightness, contrast and saturation come in random order.",),
    "view perspective": ("Corners move by whole pixels, and the far ones start a pixel further in.",),
    "view rotation": ("A pixel is the nearest one, not the mean of four.",),
    "view noise_rectangles": ("Sides are cut off to whole pixels, not rounded, and noise ends at 254.",),
    "view crop": ("One fraction serves both sides, cut off to whole pixels, and the resize is bilinear.",),
    "score entropy_shift": ("A rise of the entropy below 1e-5 nats counts as none.",),
    "score entropy_shift_absolute": ("A rise of the entropy below 1e-5 nats counts as none.",),
    "sink scale_advantage": ("Scores are compressed by log(1 + score) before they are scaled.",),
    "method papo": ("The masked image is scored once, without gradient; sampled entropies, dual clip, token means.",),
    "method papo-dapo": ("The masked image is scored once, without gradient; sampled entropies, dual clip.",),
    "method vppo": ("A view a rollout, tokens rounded up, weights by mini-batch, sampled entropies, dual clip.",),
    "method pgpo": ("DAPO's clip.", "The attention to the image is masked, not pixels."),
    "method tor": ("The image is removed from the prompt; before, it was black.",),
    "method mssr": ("One rollout per prompt; before, as many as the recipe says.",),
    "method dvrp": ("Entropy penalties on both views, and noise that fades out from 500 steps.",),
    "method noisyrollout": ("Noise by the batch that begins, a frozen vision tower, an entropy bonus.",),
}
"""What changed in each later definition of a part, one sentence a definition.

Other parts have definition 1, as has every part of a result without numbers.
"""
BLOCKS = ("score", "divergence", "selector", "gate", "sink")
"""Kinds of parts that the option `perception_KIND` names."""


def definition(part: str) -> int:
    """The number of the code's present definition."""
    return 1 + len(CHANGES.get(part, ()))


def present_part(part: str) -> str:
    """The present name of a part of an earlier result: `sink weights` is `sink scale_advantage`."""
    kind, _, name = part.partition(" ")
    option = schema("train").own.get(f"perception_{kind}")
    return f"{kind} {option.former.get(name, name)}" if option else part


def training_definitions(options: Mapping[str, Any], method: str) -> dict[str, int]:
    """Definition numbers of the parts that a run uses.

    Args:
        options: every option of CPPO with its value.
        method: the method's name.
    """
    views = [*(options["rollout_views"] or ())]
    parts = {f"method {method}"}
    if options["perception_sink"] != "none":
        views += [*options["preserving_views"], *options["removing_views"]]
        named = {kind: options[f"perception_{kind}"] for kind in BLOCKS}
        parts |= {f"{kind} {name}" for kind, name in named.items() if not is_own(name)}
    return _numbers({*parts, *_views(views)})


def evaluation_definitions(evaluation: Mapping[str, Any]) -> dict[str, int]:
    """Definition numbers of the parts that a study's evaluation uses: views of its conditions, and judged scores.

    Args:
        evaluation: an entry of `Study.evaluations`.
    """
    trained = {**schema("train").defaults, **evaluation}
    trained_views = trained["preserving_views"], trained["removing_views"]
    parts = {part for name in evaluation["conditions"] for part in _views(condition_families(name, *trained_views))}
    if evaluation["detector_items"]:
        parts |= {*_views(trained["removing_views"]), *(f"score {name}" for name in DETECTORS)}
    return _numbers(parts)


def _views(families: Iterable[str]) -> set[str]:
    """The parts of view families; the contents of their file identify the user's own."""
    return {f"view {family}" for family in families if not is_own(family)}


def _numbers(parts: Iterable[str]) -> dict[str, int]:
    return {part: definition(part) for part in sorted(parts)}
