"""Several draws of every family, for eyes to judge; training draws one family an image with `ViewSampler`."""

from collections.abc import Iterator, Sequence

from PIL import Image

from cppo.views.sampler import ViewSampler, view_generators
from cppo.views.transforms import View, family_view


def family_draws(
    images: Sequence[Image.Image], sampler: ViewSampler, sample_id: str, draws: int
) -> Iterator[tuple[View, ...]]:
    """`draws` views of a row's images under each of the sampler's families in turn, I+ first.

    Each depends on (seed, sample id, family, draw, place of the image) alone: another family or draw changes nothing.

    Raises:
        UserError: an image cannot be read.
    """
    for family in (*sampler.preserving_families, *sampler.removing_families):
        for draw in range(draws):
            yield tuple(
                family_view(
                    family,
                    image,
                    view_generators(sampler.seed, f"{sample_id}/{family}", draw, index)[0],
                    sampler.strengths,
                )
                for index, image in enumerate(images)
            )
