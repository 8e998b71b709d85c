"""The named conditions of an evaluation: images are clean, blank, or perturbed in a known way."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from cppo.data import Record
from cppo.views import (
    CONDITION_NAMES,
    ViewSampler,
    ViewStrengths,
    any_family_view,
    check_families,
    condition_families,
    view_generators,
)

GREY = (127, 127, 127)


@dataclass(frozen=True)
class Condition:
    """How a record's images are shown: unchanged, grey, or under a view family drawn for each image.

    Attributes:
        name: one of CONDITION_NAMES.
        families: drawn from uniformly for each image; empty for `clean` and `blank`.
        strengths: of the training families; held-out families have a fixed strength.
    """

    name: str
    families: tuple[str, ...] = ()
    strengths: ViewStrengths = field(default_factory=ViewStrengths)

    def show(self, record: Record, seed: int) -> tuple[Image.Image, ...]:
        """The record's images under this condition, each with its own size.

        The random draws depend only on (seed, record id, place of the image, name of the condition).
        """
        if self.name == "blank":
            return blank_images(record.images)
        if not self.families:
            return record.images
        return tuple(self._perturbed(image, record.id, seed, place) for place, image in enumerate(record.images))

    def _perturbed(self, image: Image.Image, record_id: str, seed: int, place: int) -> Image.Image:
        rng, _ = view_generators(seed, f"{record_id}/{self.name}", 0, place)
        family = self.families[int(rng.integers(len(self.families)))]
        return any_family_view(family, image, rng, self.strengths).image


CLEAN = Condition("clean")
BLANK = Condition("blank")


def get_condition(name: str, trained: ViewSampler | None = None) -> Condition:
    """The condition of a name.

    - `clean`: unchanged images; `blank`: grey images of the same size;
    - `trained_preserving`, `trained_removing`: I+ and I- as in training, with the families and strengths of `trained`
      (its seed is ignored); the published ones if it is None;
    - `held_out_preserving`, `held_out_removing`: kinds never used in training (`cppo.views.held_out`);
    - the name of a family, also one of the user's own: only that family.

    Raises UserError for any other name.
    """
    trained = ViewSampler(0) if trained is None else trained
    check_families("condition", [name], CONDITION_NAMES)
    families = condition_families(name, trained.preserving_families, trained.removing_families)
    return Condition(name, families, trained.strengths)


def blank_images(images: Sequence[Image.Image]) -> tuple[Image.Image, ...]:
    """Uniform grey images of the same sizes: the image tokens stay, their information is removed."""
    return tuple(Image.new("RGB", image.size, GREY) for image in images)
