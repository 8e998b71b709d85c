"""Process equal images of a batch once; the rollouts of a group show the same images."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

MADE = {"pixel_values", "image_grid_thw"}
"""A processor's outputs for images in patches: the patches of all images in order, and each image's grid."""


@contextmanager
def images_once(processor: Any) -> Iterator[None]:
    """Context: the image processor gets equal images of a call only once; the results are the same.

    Processors that do not cut images into patches, and images that are not PIL's, are left alone.
    """
    part = getattr(processor, "image_processor", None)
    if part is None or set(part.model_input_names) != MADE:
        yield
        return
    vars(part)["preprocess"] = _once(part.preprocess)
    try:
        yield
    finally:
        del vars(part)["preprocess"]


def _once(preprocess: Callable[..., BatchFeature]) -> Callable[..., BatchFeature]:
    def distinct_only(images: Any, *args: Any, **options: Any) -> BatchFeature:
        flat = list(_flat(images))
        keys = [_key(image) for image in flat if isinstance(image, Image.Image)]
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        places = sorted(first.values())
        if len(keys) < len(flat) or len(places) == len(flat):
            return preprocess(images, *args, **options)
        made = preprocess([flat[place] for place in places], *args, **options)
        pixels, grid = made.get("pixel_values"), made.get("image_grid_thw")
        if made.keys() != MADE or not (isinstance(pixels, torch.Tensor) and isinstance(grid, torch.Tensor)):
            return preprocess(images, *args, **options)
        number = {key: place for place, key in enumerate(keys[place] for place in places)}
        of = [number[key] for key in keys]
        cut = pixels.split(grid.prod(dim=1).tolist())
        return BatchFeature({"pixel_values": torch.cat([cut[place] for place in of]), "image_grid_thw": grid[of]})

    return distinct_only


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, Sequence):
        for image in images:
            yield from _flat(image)
    else:
        yield images


def _key(image: Image.Image) -> tuple[Any, ...]:
    return image.mode, image.size, blake2b(image.tobytes(), digest_size=16).digest()
