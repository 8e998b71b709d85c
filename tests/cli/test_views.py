"""`cppo views`: every family is shown as it was drawn, with what the model then answers."""

import re
from dataclasses import replace

import numpy as np
import pytest
from browser import GOOD, LOOK, evaluate_in_page, needs_browser
from PIL import Image

from cppo.cli.main import main
from cppo.cli.views import _parser, _records
from cppo.data import load_records
from cppo.evaluation import ItemResult
from cppo.reports.views import (
    FamilySummary,
    ShownItem,
    ShownView,
    _label,
    clean_accuracy,
    draw_grid,
    given_answer,
    parameter_text,
    render_views,
    summarize_families,
    unchanged,
    view_remarks,
)
from cppo.views import View, ViewSampler, ViewStrengths, family_draws


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_draws_are_the_families_in_order_and_depend_on_nothing_else(picture):
    images = [Image.open(picture)]
    sampler = ViewSampler(3)
    drawn = list(family_draws(images, sampler, "row", 2))
    assert [row[0].family for row in drawn] == [
        family for family in ("color_jitter", "perspective", "rotation", "noise_rectangles", "crop") for _ in range(2)
    ]
    alone = list(family_draws(images, ViewSampler(3, removing_families=["crop"]), "row", 3))
    assert alone[-3][0].parameters == drawn[-2][0].parameters
    assert alone[-3][0].image.tobytes() == drawn[-2][0].image.tobytes()
    assert drawn[-1][0].parameters != drawn[-2][0].parameters


def test_what_was_drawn_is_what_was_done(picture):
    image = Image.open(picture).convert("RGB")
    sampler = ViewSampler(0, strengths=ViewStrengths(perspective_probability=0.0))
    by_family = {row[0].family: row[0] for row in family_draws([image], sampler, "row", 1)}
    crop = by_family["crop"]
    left, top, width, height = (int(crop.parameters[name]) for name in ("left", "top", "width", "height"))
    again = image.crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BILINEAR)
    assert again.tobytes() == crop.image.tobytes()
    assert by_family["perspective"].parameters == {"pixels_moved": 0.0}
    turned = image.rotate(by_family["rotation"].parameters["degrees"], Image.Resampling.NEAREST)
    difference = np.abs(np.asarray(turned, int) - np.asarray(by_family["rotation"].image, int))
    assert difference.mean() < 1


def test_a_grid_of_one_image(picture, tmp_path, capsys):
    assert main(["views", "--image", str(picture), "--out", str(tmp_path / "grid.png"), "--draws", "2"]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 2 * 180
        assert grid.height > 6 * 200
    assert "grid.png" in capsys.readouterr().out


def test_a_recipes_strengths_are_taken(picture, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "data: tasks:digits\npreserving_views: [rotation]\nremoving_views: [crop]\nview_crop_side: [0.5, 0.5]\n"
    )
    out = tmp_path / "page.html"
    assert main(["views", "--image", str(picture), "--out", str(out), "--config", str(recipe), "--draws", "1"]) == 0
    page = out.read_text()
    assert "width\u00a030, height\u00a020" in page
    assert "color_jitter" not in page


def test_the_model_answers_under_every_view(tmp_path, capsys):
    out = tmp_path / "page.html"
    command = ["views", "--data", "tasks:digits?noise=25", "--limit", "3", "--draws", "1", "--model", "micro"]
    assert main([*command, "--out", str(out)]) == 0
    page = out.read_text()
    assert page.count('<article class="card item">') == 3
    assert page.count("\u2713 right") + page.count("\u2717 wrong") == 3 * 6
    shares = {
        name: float(share) for name, share in re.findall(r"^(\w+) +([\d.]+) % ans", capsys.readouterr().out, re.M)
    }
    assert set(shares) == {"color_jitter", "perspective", "rotation", "noise_rectangles", "crop"}
    assert load_records("tasks:digits?noise=25", split="test", limit=1)[0].prompt in page


def shown(answers, correct):
    image = Image.new("RGB", (8, 8))
    views = tuple(
        ShownView("crop", "", (image,), answer, right, answer == answers[0])
        for answer, right in zip(answers[1:], correct[1:], strict=True)
    )
    return ShownItem(
        "1", "q <script>alert(1)</script>", "5", ShownView(None, "", (image,), answers[0], correct[0]), views
    )


def answered(response):
    return ItemResult("1", "0.5", (response,), (1.0,), (1.0,), images=1)


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (r"so \boxed{1/2}", r"I think \boxed{0.5}", True),
        (r"so \boxed{1/2}", "so 1/2", False),
        ("A dog  sits.", "A dog sits.", True),
        ("A dog sits.", "A cat sits.", False),
        ("A dog sits.", r"\boxed{dog}", False),
    ],
)
def test_an_answer_stays_the_same_as_the_rewards_compare_or_word_for_word(before, after, same):
    assert unchanged(answered(after), answered(before)) == same


def test_families_can_be_named_those_held_out_too(picture, tmp_path):
    out = tmp_path / "page.html"
    command = ["views", "--image", str(picture), "--out", str(out), "--draws", "1", "--families"]
    assert main([*command, "black_patches", "blur", "shuffle", "crop"]) == 0
    kinds = re.findall(r"<div><b>(I.)</b><br>(\w+)</div>", out.read_text())
    assert kinds == [("I\u2212", "black_patches"), ("I+", "blur"), ("I\u2212", "shuffle"), ("I\u2212", "crop")]
    (drawn,) = family_draws([Image.open(picture)], ViewSampler(0), "row", 1, ["crop"])
    assert drawn[0].parameters == list(family_draws([Image.open(picture)], ViewSampler(0), "row", 1))[-1][0].parameters


@pytest.mark.parametrize(
    ("recipe", "families", "drawn"),
    [
        (
            "method: papo\nview_patch_side: 20\nview_patch_probability: 1.0",
            ["color_jitter", "perspective", "rotation", "black_patches"],
            "patches\u00a06",
        ),
        ("method: noisyrollout", ["diffusion_noise"], "steps\u00a0500"),
        (
            "rollout_views: [rotation]\npreserving_views: [color_jitter]\nremoving_views: [crop]",
            ["rotation", "color_jitter", "crop"],
            "degrees",
        ),
    ],
)
def test_a_recipes_families_are_drawn(recipe, families, drawn, picture, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"data: tasks:digits\n{recipe}\n")
    out = tmp_path / "page.html"
    command = ["views", "--image", str(picture), "--out", str(out), "--config", str(tmp_path / "mine.yaml")]
    assert main([*command, "--draws", "1"]) == 0
    page = out.read_text()
    assert re.findall(r"<div><b>I.</b><br>(\w+)</div>", page) == families
    assert drawn in page


def test_one_image_is_scaled_too(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
    arguments = _parser().parse_all(["--image", str(tmp_path / "large.png"), "--out", "x.png"])
    (record,) = _records(arguments, {"max_pixels": 1024, "prompt_suffix": None})
    assert record.images[0].size == (32, 32)


def test_the_grid_shows_every_parameter():
    image = (Image.new("RGB", (8, 8)),)
    view = ShownView(
        "crop",
        parameter_text(View(image[0], "crop", {"left": 12, "top": 4, "width": 39, "height": 41})),
        image,
        "a long answer " * 4,
        False,
        False,
    )
    lines = _label(view, 30)
    assert lines[:2] == ["left 12, top 4, width 39,", "height 41"]
    assert lines[3] == "wrong, changed"
    assert max(map(len, lines)) <= 30


def test_the_summary_by_hand():
    items = [shown(["5", "5", "4"], [True, True, False]), shown(["3", "3", "3"], [False, False, False])]
    (row,) = summarize_families(items, seed=0)
    assert (row.family, row.kind) == ("crop", "I\u2212")
    assert row.unchanged == pytest.approx(0.75)
    assert row.accuracy == pytest.approx(0.25)
    assert row.change.mean == pytest.approx(-0.25)


def test_a_view_that_does_not_do_what_it_is_for_is_remarked_on():
    def summary(family, kind, share):
        return FamilySummary(family, kind, share, 0.5, None)

    minus = "I\u2212"
    rows = [summary("crop", minus, 0.51), summary("noise_rectangles", minus, 0.49), summary("own", "own", 0.9)]
    rows += [summary("rotation", "I+", 0.49), summary("perspective", "I+", 0.51)]
    first, second = view_remarks(rows)
    assert first.startswith("crop (I-): most answers stay the same")
    assert "removing_views" in first
    assert second.startswith("rotation (I+): most answers change")
    assert "preserving_views" in second
    assert view_remarks([summary("crop", minus, 0.4), summary("rotation", "I+", 0.6)]) == []


def test_the_accuracy_with_the_images_as_they_are():
    items = [shown(["5", "5", "4"], [True, True, False]), shown(["3", "3", "3"], [False, False, False])]
    assert clean_accuracy(items) == 0.5


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(width, tmp_path):
    file = tmp_path / "page.html"
    items = [shown(["5", "4", "5"], [True, False, True])] * 3
    file.write_text(render_views(items, title="x" * 60, strengths="y", seed=0), encoding="utf-8")
    assert evaluate_in_page(file, LOOK, width=width, profile=tmp_path / "profile") == GOOD


def test_white_pictures_of_the_grid_have_an_edge():
    white = ShownView(None, "", (Image.new("RGB", (50, 20), "white"),))
    grid = draw_grid(ShownItem("1", "?", "5", white, (replace(white, family="crop"),) * 2))
    grey = sum(count for count, colour in grid.getcolors(2**16) if colour == (211, 211, 211))
    assert grey == 3 * (2 * 202 + 2 * 80)  # three pictures of 200 x 80, each in a line of one pixel


def test_texts_are_escaped_and_long_answers_cut():
    page = render_views([shown(["<b>x</b>", "<i>y</i>"], [None, None])], title="<t>", strengths="", seed=0)
    assert not re.search(r"<script>alert|<b>x|<i>y|<t>", page)
    assert given_answer("word " * 100).startswith("\u2026")
    assert len(given_answer(r"\boxed{" + "9" * 500 + "}")) == 61
    assert draw_grid(shown(["a", "b"], [None, None])).width > 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.png"], "give either --image FILE or --data SPEC"),
        (["--image", "gone.png", "--out", "x.png"], "--image: gone.png: there is no such file"),
        (["--image", "broken.png", "--out", "x.png"], "--image: broken.png: it cannot be read as an image"),
        (["--image", "broken.png", "--out", "x.gif"], "--out: x.gif: write a .png"),
        (["--data", "tasks:digits", "--out", "x.png"], "several items make a page"),
        (["--image", "broken.png", "--out", "no/x.png"], "--out: cannot write no/x.png: there is no such folder"),
        (["--image", "broken.png", "--out", "x.png", "--answer", "5"], "--answer needs --model"),
        (["--image", "broken.png", "--out", "x.png", "--dtype", "float32"], "--dtype needs --model"),
        (["--data", "tasks:digits", "--out", "x.html", "--config", "gone"], "recipe 'gone'"),
        (["--image", "broken.png", "--out", "x.png", "--draws", "0"], "[1, inf)"),
        (["--image", "broken.png", "--out", "x.png", "--families", "fog"], "--families: 'fog' is unknown"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not an image")
    assert message in refused("views", *words)


def test_rows_without_images_are_left_out(tmp_path, refused):
    (tmp_path / "text.jsonl").write_text('{"prompt": "2 + 2?", "answer": "4"}\n')
    message = refused("views", "--data", tmp_path / "text.jsonl", "--out", tmp_path / "x.html")
    assert "none of the rows has an image" in message
