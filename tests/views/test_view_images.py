"""load_rgb against Pillow-free arithmetic and hand-made files."""

import copy
import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cppo.errors import UserError
from cppo.views import load_rgb, preserving_view, removing_view

RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
CORNERS = Image.fromarray(PIXELS)


def encoded(image: Image.Image, file_format: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(load_rgb(image))


def state(image: Image.Image) -> tuple:
    return image.mode, image.size, image.tobytes(), dict(image.info), image.tell()


@pytest.mark.parametrize("mode", Image.MODES)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (4000, 3)])
def test_every_mode_gives_rgb_of_the_same_size_and_the_input_stays(mode, size):
    image = Image.new(mode, size)
    before = state(image)
    rgb = load_rgb(image)
    views = [view(image, np.random.default_rng(0)) for view in (preserving_view, removing_view)]
    for result in (rgb, *views):
        assert (result.mode, result.size) == ("RGB", size)
    assert state(image) == before
    for result in (rgb, *views):
        result.paste("red", (0, 0, *size))
    assert state(image) == before


def test_rgb_grey_and_bilevel_values():
    assert (array(CORNERS) == PIXELS).all()
    grey = PIXELS[:, :, 0]
    assert (array(Image.fromarray(grey)) == grey[:, :, None]).all()
    bits = grey > 127
    assert (array(Image.fromarray(bits)) == np.where(bits, 255, 0)[:, :, None]).all()


def test_cmyk_values():
    cmyk = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    ink = cmyk.astype(np.float64) / 255
    expected = 255 * (1 - ink[:, :, :3]) * (1 - ink[:, :, 3:])
    got = array(Image.fromarray(cmyk, "CMYK")).astype(np.float64)
    assert np.abs(got - expected).max() <= 1  # one level of rounding


def test_transparency_is_laid_over_white():
    rgba = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    alpha = rgba[:, :, 3:] / 255
    expected = rgba[:, :, :3] * alpha + 255 * (1 - alpha)
    assert np.abs(array(Image.fromarray(rgba)) - expected).max() <= 1
    expected_grey = rgba[:, :, :1] * alpha + 255 * (1 - alpha)
    for mode in ("LA", "La"):
        image = Image.fromarray(np.ascontiguousarray(rgba[:, :, [0, 3]]), "LA").convert(mode)
        # Premultiplied pixels are rounded once more.
        assert np.abs(array(image) - expected_grey).max() <= (2 if mode == "La" else 1)
    image = Image.new("PA", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([(0, 0), (1, 51), (2, 255)])
    assert array(image).tolist() == [[[255, 255, 255], [204, 255, 204], [0, 0, 255]]]


@pytest.mark.parametrize("as_bytes", [False, True])
def test_palette_with_transparency(as_bytes):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    assert array(image).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    image.info["transparency"] = bytes([255, 0, 255]) if as_bytes else 1
    assert array(image).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    assert array(encoded(image, "PNG")).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize(("mode", "key"), [("1", 255), ("L", 255), ("RGB", (255, 255, 255))])
def test_transparent_colour_of_a_png(mode, key):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), key)
    image = encoded(image, "PNG", transparency=0 if mode != "RGB" else (0, 0, 0))
    assert (array(image) == 255).all()


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bit_grey_is_scaled_by_65535(dtype):
    values = np.array([[0, 128, 129, 32768, 65534, 65535]], dtype=dtype)
    mode = "I;16" if dtype == "<u2" else "I;16B"
    image = Image.frombytes(mode, (6, 1), values.tobytes())
    assert array(image)[0, :, 1].tolist() == [0, 0, 1, 128, 255, 255]
    if dtype == "<u2":
        assert array(encoded(image, "PNG"))[0, :, 1].tolist() == [0, 0, 1, 128, 255, 255]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 7, 255], np.int32, [0, 7, 255]),
        ([0, 256, 65535], np.int32, [0, 1, 255]),
        ([-10, 0, 10], np.int32, [0, 128, 255]),
        ([0, 65535, 131070], np.int32, [0, 128, 255]),
        ([0, 0.5, 1], np.float32, [0, 128, 255]),
        ([0, 7.2, 254.6], np.float32, [0, 7, 255]),
        ([0, 257.0, 65535], np.float32, [0, 1, 255]),
        ([-1, 0, 1], np.float32, [0, 128, 255]),
        ([-3, -3, -3], np.float32, [0, 0, 0]),
    ],
)
def test_integer_and_float_grey_take_the_first_range_that_fits(values, dtype, expected):
    assert array(Image.fromarray(np.array([values], dtype=dtype)))[0, :, 2].tolist() == expected


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        load_rgb(Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)))


# How a camera stores an upright picture for each orientation, written with numpy from the Exif standard.
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("file_format", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_exif_orientation_is_undone_once(orientation, file_format, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](PIXELS)))
    rgb = load_rgb(encoded(stored, file_format, exif=exif, **options))
    assert (np.asarray(rgb) == PIXELS).all()
    assert (array(rgb) == PIXELS).all()
    assert not rgb.getexif()
    for view in (preserving_view, removing_view):
        assert view(rgb, np.random.default_rng(0)).size == (7, 5)


def test_exif_orientation_of_a_jpeg_palette_and_sixteen_bit_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encoded(Image.new("RGB", (16, 8), "red"), "JPEG", exif=exif)
    assert load_rgb(jpeg).size == (8, 16)
    assert jpeg.size == (16, 8)
    for mode in ("P", "I;16"):
        image = encoded(Image.new(mode, (6, 2)), "PNG", exif=exif)
        assert load_rgb(image).size == (2, 6)


def test_broken_exif_does_not_lose_the_picture():
    image = CORNERS.copy()
    image.info["exif"] = b"Exif\0\0nonsense"
    assert (array(image) == PIXELS).all()


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_from_any_frame(file_format):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert image.n_frames == 3
    for frame in (0, 2, 1):
        image.seek(frame)
        assert (array(image) == (255, 0, 0)).all()
        assert image.tell() == frame
    image.seek(2)
    assert (np.asarray(image.convert("RGB")) == (0, 0, 255)).all()


def photo() -> bytes:
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    ImageDraw.Draw(image).ellipse((8, 8, 50, 50), fill="orange")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda image: pickle.loads(pickle.dumps(image))])
def test_an_image_that_came_from_another_process(file_format, copied):
    image = encoded(CORNERS, file_format)
    assert (array(copied(image)) == np.asarray(encoded(CORNERS, file_format).convert("RGB"))).all()


def test_truncated_file_names_the_file(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(photo()[:-2000])
    with pytest.raises(UserError) as caught:
        load_rgb(Image.open(path))
    message = str(caught.value)
    assert str(path) in message
    assert "replace" in message
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "TIFF", "BMP"])
def test_damaged_bytes_give_a_picture_or_a_user_error(file_format):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(photo())).save(buffer, file_format)
    good = np.frombuffer(buffer.getvalue(), np.uint8)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(40):
        data = good.copy()
        places = rng.integers(0, len(data), 20)
        data[places] = rng.integers(0, 256, 20)
        stop = int(rng.integers(30, len(data)))
        try:
            image = Image.open(io.BytesIO(data[:stop].tobytes()))
        except Exception:
            continue  # opening is the caller's part
        try:
            assert load_rgb(image).mode == "RGB"
        except UserError:
            refused += 1
    assert refused > 0


def test_what_is_no_image_or_has_no_pixels_is_refused():
    with pytest.raises(UserError, match="expected a PIL image, got str"):
        load_rgb("picture.png")
    with pytest.raises(UserError, match="no pixels"):
        load_rgb(Image.new("RGB", (0, 3)))
    closed = encoded(CORNERS, "PNG")
    closed.close()
    with pytest.raises(UserError, match="cannot be read"):
        load_rgb(closed)
