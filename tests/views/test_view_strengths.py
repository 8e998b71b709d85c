"""Bad families and strengths are refused in one line that names the field."""

import math

import numpy as np
import pytest
from PIL import Image

from cppo.errors import UserError
from cppo.views import ViewStrengths, preserving_view, removing_view

PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize("view", [preserving_view, removing_view])
@pytest.mark.parametrize(
    ("families", "message"),
    [
        ([], "empty"),
        (["blur"], "'blur' is unknown"),
        ("rotation", "not a list"),
        (None, "not a list"),
        ([3], "3 is not a name; choose from"),
    ],
)
def test_bad_families(view, families, message):
    with pytest.raises(UserError, match=message):
        view(PICTURE, np.random.default_rng(0), families=families)


def test_families_of_the_other_kind_and_repeated_ones_are_refused():
    with pytest.raises(UserError, match="families: 'crop' is unknown; choose one of color_jitter"):
        preserving_view(PICTURE, np.random.default_rng(0), families=["crop"])
    with pytest.raises(UserError, match="families: 'rotation' is unknown"):
        removing_view(PICTURE, np.random.default_rng(0), families=["rotation"])
    with pytest.raises(UserError, match="twice"):
        removing_view(PICTURE, np.random.default_rng(0), families=["crop", "crop"])


def test_published_strengths_are_the_defaults():
    assert ViewStrengths() == ViewStrengths(
        brightness=(0.2, 1.3),
        contrast=(0.2, 1.8),
        saturation=(0.2, 1.8),
        perspective_distortion=0.2,
        perspective_probability=0.5,
        rotation_degrees=10,
        noise_rectangles=50,
        noise_side=(0.05, 0.15),
        crop_side=(0.6, 0.7),
    )
    assert ViewStrengths(brightness=[1, 1]).brightness == (1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("brightness", (1.3, 0.2)),
        ("contrast", (-0.1, 1)),
        ("saturation", (0.5,)),
        ("saturation", 0.5),
        ("brightness", ("a", "b")),
        ("contrast", (0.2, math.inf)),
        ("contrast", (math.nan, 1)),
        ("perspective_distortion", 0.7),
        ("perspective_distortion", -0.1),
        ("perspective_probability", 1.1),
        ("perspective_probability", "half"),
        ("rotation_degrees", -1),
        ("rotation_degrees", 181),
        ("noise_rectangles", 0),
        ("noise_rectangles", 2.5),
        ("noise_rectangles", True),
        ("noise_side", (0, 0.1)),
        ("noise_side", (0.1, 1.1)),
        ("crop_side", (0.7, 0.6)),
        ("crop_side", None),
    ],
)
def test_bad_strengths_name_the_field_in_one_line(name, value):
    with pytest.raises(UserError, match=f"view_{name} = ") as caught:
        ViewStrengths(**{name: value})
    assert "give" in str(caught.value)
    assert "\n" not in str(caught.value)
