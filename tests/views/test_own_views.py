"""Views of one's own: bit-equal to a packaged family of the same code, and one clear line for every mistake."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cppo.errors import UserError
from cppo.recipes import schema
from cppo.training.option_rules import view_sampler
from cppo.views import ViewSampler, check_families, preserving_view

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
    # Among several families, one of one's own is drawn as often as any other.
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


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("smaller", r"must return a PIL image of \(14, 9\) pixels, not one of \(2, 2\)"),
        ("pixels", r"must return a PIL image of \(14, 9\) pixels, not ndarray"),
        ("broken", "failed in own.py line 21: TypeError"),
    ],
)
def test_mistakes_of_a_draw(own, function, words):
    with pytest.raises(UserError, match=words):
        preserving_view(picture(), np.random.default_rng(0), families=[f"own.py:{function}"])


def test_files_of_the_same_name_in_other_folders_are_others(own, tmp_path, monkeypatch):
    view = preserving_view(picture(), np.random.default_rng(0), families=["own.py:mirrored"])
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    Path("own.py").write_text("def mirrored(image, rng):\n    return image\n")
    other = preserving_view(picture(), np.random.default_rng(0), families=["own.py:mirrored"])
    assert other.tobytes() == picture().tobytes() != view.tobytes()
