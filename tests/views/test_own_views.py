"""The user's own views: bit-equal to a packaged family of the same code, and one clear line for every mistake."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cppo.data import Record
from cppo.errors import UserError
from cppo.evaluation import get_condition
from cppo.options import schema
from cppo.views import ViewSampler, check_families, preserving_view, view_sampler

OWN = """
import numpy as np
from PIL import Image, ImageOps

LIMIT = 3

def noise(image, rng):
    return Image.fromarray(rng.integers(0, 256, size=(image.height, image.width, 3), dtype=np.uint8))

def mirrored(image, rng):
    image.paste("black", (0, 0, 1, 1))
    return ImageOps.mirror(image).convert("L")

def smaller(image, rng):
    return image.resize((2, 2))

def pixels(image, rng):
    return np.asarray(image)

def broken(image, rng):
    return image[0]

def alone(image):
    return image

def global_noise(image, rng):
    return Image.fromarray(np.random.randint(0, 256, (image.height, image.width, 3), dtype=np.uint8))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)


def picture():
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, size=(9, 14, 3), dtype=np.uint8))


def test_the_same_code_draws_the_same_view(own):
    samplers = [ViewSampler(5, ["rotation"], [family]) for family in ("static", "own.py:noise")]
    packaged, ours = (sampler.views(picture(), "id", 2, 1) for sampler in samplers)
    assert [view.tobytes() for view in ours] == [view.tobytes() for view in packaged]
    # Among several families, the user's own is drawn as often as any other.
    mixed = [ViewSampler(5, ["rotation"], ["crop", family]) for family in ("static", "own.py:noise")]
    drawn = [[sampler.views(picture(), str(n), 0, 0)[1].tobytes() for n in range(12)] for sampler in mixed]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 12


def test_a_view_is_rgb_and_changes_no_image(own):
    image = picture()
    before = image.tobytes()
    view = preserving_view(image, np.random.default_rng(0), families=["own.py:mirrored"])
    assert (view.mode, view.size) == ("RGB", image.size)
    assert view.getpixel((13, 0)) == (0, 0, 0)
    assert image.tobytes() == before


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gone.py:f", "there is no file gone.py"),
        ("nothing_like_this.views:f", "there is no module nothing_like_this"),
        ("own.py:", "write module:function or file.py:function"),
        ("own.py:gone", "own.py has no gone"),
        ("own.py:LIMIT", "is of type int, not a function"),
        ("bad.py:f", "cannot be imported: SyntaxError"),
        ("own.py:smaller", "must return a PIL image of (64, 48) pixels, not one of (2, 2)"),
        ("own.py:pixels", "must return a PIL image of (64, 48) pixels, not ndarray"),
        ("own.py:broken", "failed in own.py line 21: TypeError"),
        ("own.py:alone", "view 'own.py:alone' failed: TypeError: alone() takes 1 positional argument"),
        (
            "own.py:global_noise",
            "draws two different views from the same generator state",
        ),
        (str.upper, "is not a name; choose from"),
    ],
)
def test_mistakes_are_found_before_a_run(own, family, words):
    Path("bad.py").write_text("def f(:")
    for check in (
        lambda: check_families("preserving_views", [family], ("crop",)),
        lambda: view_sampler({**schema("train").defaults, "removing_views": [family]}),
    ):
        with pytest.raises(UserError) as caught:
            check()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_draw_that_fails_later_is_one_line_too(own):
    Path("late.py").write_text("def late(image, rng):\n    return image if image.width == 64 else image.size\n")
    with pytest.raises(UserError, match=r"'late.py:late' must return a PIL image of \(14, 9\) pixels, not tuple"):
        preserving_view(picture(), np.random.default_rng(0), families=["late.py:late"])


def test_a_condition_of_the_card(own):
    shown = get_condition("own.py:mirrored").show(Record("id", "?", (picture(),), "1"), 0)
    assert shown[0].getpixel((13, 0)) == (0, 0, 0)
    with pytest.raises(UserError, match=r"own.py has no gone"):
        get_condition("own.py:gone")


def test_files_of_the_same_name_in_other_folders_are_others(own, tmp_path, monkeypatch):
    view = preserving_view(picture(), np.random.default_rng(0), families=["own.py:mirrored"])
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    Path("own.py").write_text("def mirrored(image, rng):\n    return image\n")
    other = preserving_view(picture(), np.random.default_rng(0), families=["own.py:mirrored"])
    assert other.tobytes() == picture().tobytes() != view.tobytes()
