"""JPEG files that end before their picture does: decoders fill the rest with one colour and say nothing."""

from io import BytesIO

from PIL import Image

_END = b"\xff\xd9"
_SCAN = 0xDA
# Entropy-coded bytes and the eight restart markers: data for any picture that is not complete.
_MORE = b"\x5a\xa5\x3c\x96" * 16 + b"".join(bytes((0xFF, 0xD0 + n)) + b"\x5a\xa5\x3c\x96" * 16 for n in range(8))


def ends_early(data: bytes) -> bool:
    """Whether the data of a JPEG, which decodes without an error, stop before its last pixel.

    A complete picture does not change when more data follow its own, a cut one does. The second decoding is spared
    where the last two blocks differ, for the fill of a cut picture is even. Of a progressive file that has all blocks
    once, the later passes are not looked at.
    """
    image = _eighth(data)
    width, height = image.size
    if width > 1 and image.getpixel((width - 1, height - 1)) != image.getpixel((width - 2, height - 1)):
        return False
    end = _end_of_picture(data)
    return end is not None and _eighth(data[:end] + _MORE + data[end:]).tobytes() != image.tobytes()


def _eighth(data: bytes) -> Image.Image:
    """Decoded at an eighth of its size, one pixel a block."""
    with Image.open(BytesIO(data), formats=("JPEG",)) as image:
        image.draft(image.mode, (1, 1))
        image.load()
        return image


def _end_of_picture(data: bytes) -> int | None:
    """The place of the marker that ends the picture; None where there is none, or the segments cannot be followed."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xD9:
            return place
        if marker == 0xFF:  # a filler
            place += 1
            continue
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
        if marker == _SCAN:
            place = _next_marker(data, place)
    return place if data[place : place + 2] == _END else None


def _next_marker(data: bytes, place: int) -> int:
    """The next marker that is no stuffed byte, no restart and no filler."""
    while (place := data.find(b"\xff", place)) >= 0 and place + 1 < len(data):
        if data[place + 1] not in (0x00, 0xFF, *range(0xD0, 0xD8)):
            return place
        place += 1 if data[place + 1] == 0xFF else 2
    return len(data)
