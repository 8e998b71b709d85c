"""What the pictures show, read back from the pixels without the generator, and the splits kept apart by it."""

import re
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cppo.tasks import TaskOptions, make_item
from cppo.tasks.digits import handwritten_digits

HUES = {
    "red": (225, 50, 45),
    "green": (45, 175, 70),
    "blue": (60, 95, 235),
    "yellow": (235, 205, 40),
    "pink": (235, 110, 205),
}


def nearest_colour(pixel):
    return min(HUES, key=lambda name: np.abs(np.subtract(HUES[name], pixel)).sum())


def readings(item):
    return [item.response[start:end] for start, end in item.perception_spans]


def read_bars(image):
    """(colour, height) of each bar from left to right: runs of coloured pixels above the baseline (row 60)."""
    pixels = np.asarray(image).astype(int)
    is_bar = np.abs(pixels[59] - pixels[0, 63]).sum(axis=1) > 60
    is_bar[:8] = False
    bars = []
    for column in np.flatnonzero(is_bar):
        colour = tuple(pixels[59, column])
        if bars and bars[-1][0] == colour and bars[-1][2] == column - 1:
            bars[-1][2] = column
        else:
            height = 0
            while tuple(pixels[59 - height, column]) == colour:
                height += 1
            assert height % 6 == 0
            bars.append([colour, height // 6, column])
    return [(nearest_colour(colour), height) for colour, height, _ in bars]


def read_cells(image, columns):
    """(colour, shape) or None of each place in reading order, from the ink's outline in its bounding box."""
    pixels = np.asarray(image).astype(int)
    pitch, ground, cells = 64 // columns, pixels[0, 0], []
    for place in range(columns**2):
        row, column = divmod(place, columns)
        block = pixels[row * pitch : (row + 1) * pitch, column * pitch : (column + 1) * pitch]
        ink = np.abs(block - ground).sum(axis=2) > 0
        if not ink.any():
            cells.append(None)
            continue
        rows, columns_ = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
        box = ink[rows[0] : rows[-1] + 1, columns_[0] : columns_[-1] + 1]
        top_left, bottom_left = box[0, 0], box[-1, 0]
        if top_left:
            shape = "square"
        elif bottom_left:
            shape = "triangle"
        else:
            quarter = round(len(box) * 0.2)
            shape = "circle" if box[quarter, quarter] else "cross"
        cells.append((nearest_colour(np.median(block[ink], axis=0)), shape))
    return cells


@lru_cache
def raw_digits():
    bunch = load_digits()
    crops = np.stack([crop_to_ink(image * (255 / 16)) for image in bunch.images])
    order = np.array([np.sum(bunch.target[:i] == label) for i, label in enumerate(bunch.target)])
    return crops.reshape(len(crops), -1), bunch.target, np.where(order % 5 == 4, "test", "train")


def crop_to_ink(grey):
    ink = grey > 0.35 * grey.max()
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    grey = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray(np.asarray(grey / grey.max() * 255, dtype=np.uint8))
    return np.asarray(image.resize((12, 12), Image.Resampling.BILINEAR), dtype=np.float64)


def read_digit(block):
    """Label and split of the raw handwritten digit that is nearest to what stands in this place."""
    crops, labels, splits = raw_digits()
    grey = np.abs(block - block[0, 0]).sum(axis=2)
    nearest = np.argmin(((crops - crop_to_ink(grey).ravel()) ** 2).sum(axis=1))
    return labels[nearest], splits[nearest]


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_show_their_answer_and_come_from_their_split(split):
    labels_right, splits_right = [], []
    for index in range(40):
        item = make_item("digits", TaskOptions(ask="name"), seed=3, index=index, split=split)
        pixels = np.asarray(item.image).astype(float)
        for place, word in enumerate(readings(item)):
            row, column = divmod(place, 2)
            block = pixels[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            label, origin = read_digit(block)
            labels_right.append(label == int(word))
            splits_right.append(origin == split)
    assert np.mean(labels_right) > 0.97
    # The nearest neighbour is now and then another writer's twin; drawing from all digits would give 0.2 in test.
    assert np.mean(splits_right) > 0.75


def test_the_two_pools_of_handwritten_digits_are_disjoint_and_complete():
    pools = {
        split: {image.tobytes() for group in groups for image in group}
        for split, groups in handwritten_digits().items()
    }
    assert not pools["train"] & pools["test"]
    raw = {np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images}
    assert pools["train"] | pools["test"] == raw
    assert len(pools["test"]) == 355


@pytest.mark.parametrize("level", [1, 2, 3])
def test_digits_are_read_at_the_places_that_the_question_names(level):
    places = {
        "top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3),
        "falling diagonal": (0, 3), "rising diagonal": (2, 1),
        "top left": (0,), "top right": (1,), "bottom left": (2,), "bottom right": (3,),
    }  # fmt: skip
    named = "|".join(places)
    for index in range(100):
        item = make_item("digits", TaskOptions(level=level), seed=6, index=index, split="train")
        shown = make_item("digits", TaskOptions(level=level, ask="name"), seed=6, index=index, split="train")
        grid = readings(shown)
        asked = [place for name in re.findall(named, item.prompt) for place in places[name]]
        assert readings(item) == [grid[place] for place in asked]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_chart_heights_are_what_the_pixels_show(level):
    for index in range(80):
        item = make_item("chart", TaskOptions(level=level), seed=3, index=index, split="test")
        bars = read_bars(item.image)
        named = re.findall("red|green|blue|yellow|pink", item.prompt)
        heights = dict(bars)
        assert len(heights) == len(bars)
        expected = [heights[name] for name in named] if named else [height for _, height in bars]
        assert readings(item) == [str(height) for height in expected]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_shapes_are_what_the_pixels_show(level):
    for index in range(80):
        item = make_item("shapes", TaskOptions(level=level), seed=3, index=index, split="test")
        cells = read_cells(item.image, 2 if level == 1 else 3)
        for word, cell in zip(readings(item), cells, strict=True):
            if cell is None:
                assert word == "empty"
            else:
                assert word in (cell[0], cell[1], " ".join(cell)), (word, cell)


@pytest.mark.parametrize(("name", "facts"), [("chart", read_bars), ("shapes", lambda image: read_cells(image, 2))])
def test_no_drawn_scene_is_in_both_splits(name, facts):
    scenes = {
        split: [
            tuple(facts(make_item(name, TaskOptions(), seed=seed, index=index, split=split).image))
            for seed in (0, 1)
            for index in range(350)
        ]
        for split in ("train", "test")
    }
    # Scenes recur within a split, so a generator without the split rule would share some between the splits.
    assert len(set(scenes["train"])) < len(scenes["train"])
    assert len(set(scenes["test"])) < len(scenes["test"])
    assert not set(scenes["train"]) & set(scenes["test"])
