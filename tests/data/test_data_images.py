"""Images of rows: where they may lie, and that every one that training could not read is found before."""

import io
import json
import os
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

from cppo.data import load_records, load_rows
from cppo.data.images import RowError, check_image, decode_image
from cppo.errors import UserError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (4, 4), "green").save(folder / "good.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "secret.png")
    return folder


def reason_of(folder, image):
    rows = [{"prompt": f"q{i}", "answer": "a", "images": ["good.png"]} for i in range(100)]
    rows[41]["images"] = ["good.png", image]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    source = load_records(str(path))
    assert len(source) == 99
    ((line, reason),) = source.skipped
    assert line == 42
    assert "\n" not in reason
    return reason.removeprefix(f"{path}: ")


def noise_image(side, seed=0):
    pixels = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_paths_that_leave_the_folder(folder, tmp_path):
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "out").symlink_to(tmp_path)
    (folder / "sub").mkdir()
    absolute = str(folder / "good.png")
    for name in ("../secret.png", "sub/../../secret.png", "link.png", "out/secret.png", absolute):
        assert reason_of(folder, name) == f"image {name!r} leaves the folder of the data file"


def test_an_image_that_is_far_longer_than_wide(folder):
    for size in ((600, 3), (2, 400)):
        Image.new("RGB", size).save(folder / "long.png")
        assert reason_of(folder, "long.png").endswith(f"one side of {size[0]} x {size[1]} is 200 times the other")
    Image.new("RGB", (597, 3)).save(folder / "long.png")
    assert len(load_records(str(folder / "rows.jsonl"))) == 100


def test_paths_inside_the_folder(folder):
    (folder / "bilder für 日本").mkdir()
    noise_image(5).save(folder / "bilder für 日本" / "ü 1.png")
    (folder / "inner.png").symlink_to("good.png")
    names = ["./good.png", "bilder für 日本/ü 1.png", "inner.png", "bilder für 日本/../good.png"]
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "answer": "a", "images": names}))
    assert [image.size for image in load_records(str(path))[0].images] == [(4, 4), (5, 5), (4, 4), (4, 4)]


def test_data_file_reached_through_a_link_or_another_working_folder(folder, tmp_path, monkeypatch):
    (folder / "rows.jsonl").write_text('{"prompt": "q", "answer": "a", "image": "good.png"}')
    (tmp_path / "alias").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    source = load_records("alias/rows.jsonl")
    monkeypatch.chdir("/")
    assert source[0].images[0].getpixel((0, 0)) == (0, 128, 0)


def test_paths_that_are_no_pictures(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.png").mkdir()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("missing.png", "pipe.png", "folder.png"):
        assert reason_of(folder, name) == f"image {name!r} does not exist or is not a file"
    for name in ("empty.png", "text.png", "script.eps"):
        assert reason_of(folder, name).startswith(f"image {name!r} is broken or none of BMP, ")
    for name in ("loop.png", "nul\0.png", "x" * 5000 + ".png"):
        assert reason_of(folder, name).startswith("image ")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
def refusal(use, data):
    """Why an image is refused, or None."""
    try:
        use(data)
    except RowError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 60}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"quality": 95, "subsampling": 0, "restart_marker_blocks": 2}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
)
def test_the_cheap_check_finds_exactly_what_decoding_refuses(kind, options):
    data = encoded(noise_image(32), kind, **options)
    assert refusal(check_image, data) is None
    for length in range(0, len(data), max(1, len(data) // 150)):
        refused = refusal(decode_image, data[:length])
        for check in (check_image, partial(check_image, with_facts=True)):
            assert (refusal(check, data[:length]) is None) == (refused is None), length
    assert "image (" in refusal(check_image, data[: len(data) // 2])


def smooth(size, mode="RGB", white_below=None):
    """An image like a photograph, or like a page that is white from a row on."""
    pixels = np.random.default_rng(1).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size)
    if white_below is not None:
        image.paste("white", (0, white_below, *size))
    return image.convert(mode)


JPEG_KINDS = [
    {},
    {"quality": 95, "subsampling": 0},
    {"restart_marker_blocks": 3},
    {"restart_marker_rows": 1},
    {"optimize": True},
    {"quality": 20, "comment": b"\xff\xd9 and more"},
]


@pytest.mark.parametrize("options", JPEG_KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_whose_data_end_early(options, mode):
    """Cut in the middle, with an end marker after the cut: decoders fill the rest with one colour and say nothing."""
    data = encoded(smooth((200, 120), mode), "JPEG", **options)
    for part in (0.4, 0.5, 0.6, 0.7, 0.9):
        cut = int(len(data) * part)
        cut -= data[cut - 1] == 0xFF
        half = data[:cut] + b"\xff\xd9"
        assert refusal(decode_image, half) is None
        for check in (check_image, partial(check_image, with_facts=True)):
            assert "its data ends before the picture does" in refusal(check, half)


@pytest.mark.parametrize("options", [*JPEG_KINDS, {"progressive": True}])
def test_a_whole_jpeg_is_whole(options):
    """Of all sizes of the last block, white below too, with data after the picture, and of one colour."""
    pages = [smooth((side + 40, side + 17), white_below=side) for side in range(1, 18)]
    pages += [Image.new("RGB", (99, 300), "white"), Image.new("L", (1, 1)), smooth((7, 300), "CMYK")]
    for page in pages:
        data = encoded(page, "JPEG", **options)
        for whole in (data, data + b"trailer \xff\xd9", data + data):
            assert refusal(check_image, whole) is None, page.size


def test_truncated_files(folder):
    (folder / "in").mkdir()
    for name, kind in (("cut.jpg", "JPEG"), ("in/cut.png", "PNG")):
        data = encoded(noise_image(64), kind)
        (folder / name).write_bytes(data[: len(data) * 2 // 3])
        reason = reason_of(folder, name)
        assert reason.startswith(f"image {name!r} cannot be read: ")
        assert reason.count("image '") == 1


def test_picture_that_announces_too_many_pixels(folder):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"0" * 100)), chunk(b"IEND", b"")]
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert "3600000000 pixels" in reason_of(folder, "bomb.png")


def test_one_bad_row_of_ten_stops_with_file_line_and_reason(folder):
    path = folder / "rows.jsonl"
    rows = [{"prompt": "q", "answer": "a", "images": ["good.png"] if i != 6 else ["gone.png"]} for i in range(10)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(UserError) as caught:
        load_records(str(path))
    assert str(caught.value) == (
        f"{path}: 1 of 10 rows cannot be used (max_bad_fraction is 0.01); the first is line 7: "
        "image 'gone.png' does not exist or is not a file"
    )


def test_images_in_memory():
    picture = noise_image(8)
    buffer = io.BytesIO(encoded(picture, "PNG"))
    rows = [
        {"prompt": "PIL, open", "answer": "a", "images": [picture]},
        {"prompt": "PIL, not decoded yet", "answer": "a", "images": [Image.open(buffer)]},
        {"prompt": "bytes", "answer": "a", "image": buffer.getvalue()},
    ]
    for record in load_rows(rows):
        assert [image.tobytes() for image in record.images] == [picture.tobytes()]
    cut = buffer.getvalue()[:100]
    for broken in (cut, Image.open(io.BytesIO(cut))):
        with pytest.raises(UserError, match=r"mine: 1 of 1 rows .* row 1: .*image"):
            load_rows([{"prompt": "q", "answer": "a", "image": broken}], name="mine")


def test_picture_that_vanishes_after_the_check(folder):
    path = folder / "rows.jsonl"
    path.write_text('{"prompt": "q", "answer": "a", "image": "good.png"}')
    source = load_records(str(path))
    (folder / "good.png").unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl line 1: image 'good\.png' cannot be read"):
        source[0]
