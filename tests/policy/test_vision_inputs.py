"""Slicing and joining vision inputs, layout by layout, against rows made one at a time."""

import pytest
import torch

from cppo.policy import concatenate_rows, slice_rows
from cppo.policy.vision_inputs import pick_rows, without_empty_images

IMAGES = [1, 0, 2, 2]
"""Images of each row; the second is text only."""


def numbered(start, *shape):
    """A tensor with numbers that occur nowhere else in the batch."""
    tensor = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    return tensor + 1000 * start


def qwen_row(row, images):
    grids = torch.tensor([[1, 2 * (i + 1), 2] for i in range(images)], dtype=torch.long).reshape(images, 3)
    return {
        "pixel_values": numbered(row, int(grids.prod(-1).sum()), 6),
        "image_grid_thw": grids,
        "num_images": [images],
        "mm_token_type_ids": numbered(row, 1, 5).long(),
    }


def llava_row(row, images):
    sizes = torch.tensor([[row, i] for i in range(images)], dtype=torch.long).reshape(images, 2)
    return {"pixel_values": numbered(row, images, 3, 2, 2), "image_sizes": sizes, "num_images": [images]}


def tiled_row(row, images):
    """As in PerceptionLM: each image in two tiles, with five dimensions and no other input."""
    return {"pixel_values": numbered(row, images, 2, 3, 2, 2), "num_images": [images]}


def idefics_row(row, images):
    """One row of the tensor per row of the batch, padded to the two images of the fullest row."""
    pixels = torch.zeros(1, 2, 3, 2, 2)
    mask = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    pixels[:, :images] = numbered(row, 1, images, 3, 2, 2)
    mask[:, :images] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "num_images": [images]}


def internvl_row(row, images):
    tiles = images * (row + 1)
    return {"pixel_values": numbered(row, tiles, 3, 2, 2), "num_images": [images], "num_tiles": [tiles]}


def lfm2_row(row, images):
    tiles = images * (row + 1)
    return {
        "pixel_values": numbered(row, tiles, 4, 6),
        "pixel_attention_mask": numbered(row, tiles, 4).long(),
        "spatial_shapes": numbered(row, tiles, 2).long(),
        "num_images": [images],
        "num_tiles": [tiles],
    }


def gemma_row(row, images):
    return {
        "pixel_values": numbered(row, images, 4, 6),
        "image_position_ids": numbered(row, images, 4, 2).long(),
        "num_images": [images],
        "token_type_ids": numbered(row, 1, 5).long(),
    }


LAYOUTS = [qwen_row, llava_row, tiled_row, idefics_row, internvl_row, lfm2_row, gemma_row]


def rows_of(layout):
    return [layout(row, images) for row, images in enumerate(IMAGES)]


def stacked(parts):
    """The batch of these rows, key by key and row by row."""
    batch = {}
    for key in parts[0]:
        if isinstance(parts[0][key], list):
            batch[key] = [number for part in parts for number in part[key]]
        else:
            batch[key] = torch.cat([part[key] for part in parts])
    return batch


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, list):
            assert found[key] == value, key
        else:
            assert torch.equal(found[key], value), key
            assert found[key].dtype == value.dtype, key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_join_to_the_batch(layout):
    assert_same(concatenate_rows(rows_of(layout)), stacked(rows_of(layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("start", "end"), [(a, b) for a in range(4) for b in range(a + 1, 5) if (a, b) != (1, 2)])
def test_slices_are_the_rows(layout, start, end):
    parts = rows_of(layout)
    assert_same(slice_rows(stacked(parts), start, end), stacked(parts[start:end]))


@pytest.mark.parametrize("counts", [(2, 0), (0, 2, 1), (1, 1)])
def test_idefics_rows_stay_rows_where_there_are_as_many_images(counts):
    parts = [idefics_row(row, images) for row, images in enumerate(counts)]
    for row, part in enumerate(parts):
        assert_same(slice_rows(stacked(parts), row, row + 1), part)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout is not idefics_row])
def test_a_slice_of_text_only_rows_has_no_images(layout):
    parts = rows_of(layout)
    kept = {key: value for key, value in parts[1].items() if "token_type_ids" in key}
    assert_same(slice_rows(stacked(parts), 1, 2), kept)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_join_in_any_order(layout):
    parts = rows_of(layout)
    batch = stacked(parts)
    order = [3, 0, 2]
    found = concatenate_rows([slice_rows(batch, row, row + 1) for row in order])
    assert_same(found, stacked([parts[row] for row in order]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", [[3, 0, 2], [1, 3, 2], [0, 1]])
def test_rows_are_picked_with_those_of_text_alone(layout, order):
    parts = rows_of(layout)
    assert_same(pick_rows(stacked(parts), order), stacked([parts[row] for row in order]))


def test_a_batch_is_left_as_it_is():
    batch = stacked(rows_of(qwen_row))
    copy = {key: list(value) if isinstance(value, list) else value.clone() for key, value in batch.items()}
    slice_rows(batch, 0, 2)
    concatenate_rows([batch, batch])
    assert_same(batch, copy)


def test_images_padded_to_another_size_are_padded_at_the_end():
    """An Idefics processor pads to the largest image and the fullest row of its own batch."""
    small = {"pixel_values": numbered(0, 1, 1, 3, 2, 3), "pixel_attention_mask": torch.ones(1, 1, 2, 3)}
    large = {"pixel_values": numbered(1, 2, 2, 3, 4, 2), "pixel_attention_mask": torch.ones(2, 2, 4, 2)}
    joined = concatenate_rows([small, large])
    assert joined["pixel_values"].shape == (3, 2, 3, 4, 3)
    assert joined["pixel_attention_mask"].shape == (3, 2, 4, 3)
    for key in ("pixel_values", "pixel_attention_mask"):
        expected = torch.zeros(joined[key].shape)
        for row, part, index in ((0, small, 0), (1, large, 0), (2, large, 1)):
            source = part[key][index]
            expected[row][tuple(slice(size) for size in source.shape)] = source
        assert torch.equal(joined[key], expected)


def test_what_a_batch_without_images_keeps():
    text = {
        "pixel_values": torch.zeros(0, 6),
        "image_grid_thw": torch.zeros(0, 3),
        "num_images": [0, 0],
        "mm_token_type_ids": torch.zeros(2, 5),
        "image_sizes": None,
    }
    assert list(without_empty_images(text)) == ["mm_token_type_ids"]
    assert without_empty_images({"num_images": None, "pixel_values": None}) == {}
    full = stacked(rows_of(qwen_row))
    assert_same(without_empty_images({**full, "image_sizes": None}), full)


def test_a_part_that_lacks_a_key_is_not_joined():
    with pytest.raises(KeyError, match="image_grid_thw"):
        concatenate_rows([qwen_row(0, 1), {"pixel_values": torch.zeros(2, 6), "num_images": [1]}])
