"""Find truncated JPEG files: decoders silently fill the rest with one colour."""

from io import BytesIO

from PIL import Image

_END = b"\xff\xd9"
_SCAN = 0xDA
# Entropy-coded bytes and the eight restart markers: data for any incomplete picture.
_MORE = b"\x5a\xa5\x3c\x96" * 16 + b"".join(bytes((0xFF, 0xD0 + n)) + b"\x5a\xa5\x3c\x96" * 16 for n in range(8))


def ends_early(data: bytes) -> bool:
    """Whether the data of a decodable JPEG stop before its last pixel.

    More data after its end do not change a complete picture, but a truncated one. If the last two blocks differ, no
    second decoding is needed, since a decoder fills with one colour. Later passes of a progressive file are not
    checked.
    """
    image = _eighth(data)
    width, height = image.size
    if width > 1 and image.getpixel((width - 1, height - 1)) != image.getpixel((width - 2, height - 1)):
        return False
    end = _end_of_picture(data)
    return end is not None and _eighth(data[:end] + _MORE + data[end:]).tobytes() != image.tobytes()


def _eighth(data: bytes) -> Image.Image:
    """The picture at an eighth of its size, one pixel a block."""
    with Image.open(BytesIO(data), formats=("JPEG",)) as image:
        image.draft(image.mode, (1, 1))
        image.load()
        return image


def _end_of_picture(data: bytes) -> int | None:
    """The place of the marker that ends the picture; None if there is none or the segments are broken."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xD9:
            return place
        if marker == 0xFF:  # filler byte
            place += 1
            continue
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
        if marker == _SCAN:
            place = _next_marker(data, place)
    return place if data[place : place + 2] == _END else None


def _next_marker(data: bytes, place: int) -> int:
    """The next marker except stuffed bytes, restarts and fillers."""
    while (place := data.find(b"\xff", place)) >= 0 and place + 1 < len(data):
        if data[place + 1] not in (0x00, 0xFF, *range(0xD0, 0xD8)):
            return place
        place += 1 if data[place + 1] == 0xFF else 2
    return len(data)
