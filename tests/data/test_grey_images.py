"""Greys of more than 8 bits become the picture that was meant, or an error; ordinary images stay as they are."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from fasttrain.data.images import ImageRef, check_header, open_image, to_rgb

GREY = np.arange(7 * 11, dtype=np.uint16).reshape(7, 11) * 851  # from 0 to 64676
WANTED = (GREY >> 8).astype(np.uint8)


def encode(image: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_of(image: Any) -> np.ndarray:
    """(height, width) of an RGB image whose channels are equal."""
    pixels = np.asarray(image)
    assert image.mode == "RGB" and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    ("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I;16", "PPM"), ("I;16", "JPEG2000")]
)  # fmt: skip
def test_files_of_16_bit_greys_keep_their_upper_8_bits(mode: str, kind: str) -> None:
    from PIL import Image

    raw = GREY.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    content = encode(Image.frombytes(mode, (11, 7), raw), kind)
    assert (grey_of(open_image(content)) == WANTED).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_every_16_bit_mode_is_scaled(mode: str) -> None:
    from PIL import Image

    kind = {"B": ">u2", "N": "=u2"}.get(mode[-1], "<u2")
    image = Image.frombytes(mode, (11, 7), GREY.astype(kind).tobytes())
    assert (grey_of(to_rgb(image)) == WANTED).all()


def test_a_16_bit_picture_is_turned_upright() -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(Image.fromarray(GREY), "PNG", exif=exif)
    assert (grey_of(open_image(content)) == np.rot90(WANTED, -1)).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_the_darkest_16_bit_picture_stays_dark(kind: str) -> None:
    from PIL import Image

    assert not grey_of(open_image(encode(Image.fromarray(GREY // 300), kind))).any()  # at most 215 of 65535


def test_integer_greys_are_of_16_bits_or_of_8() -> None:
    from PIL import Image

    for values, wanted in ((GREY, WANTED), (WANTED, WANTED)):
        content = encode(Image.fromarray(values.astype(np.int32)), "TIFF")
        assert (grey_of(open_image(content)) == wanted).all()


def test_float_greys_reach_to_1_or_to_255() -> None:
    from PIL import Image

    for values in (WANTED / 255, WANTED.astype(float)):
        content = encode(Image.fromarray(values.astype(np.float32)), "TIFF")
        assert (grey_of(open_image(content)) == WANTED).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.int32([[0, 65536]]), "from 0 to 65536, not within 0 to 65535"),
        (np.int32([[-1, 255]]), "from -1 to 255, not within 0 to 65535"),
        (np.float32([[0, 255.5]]), "from 0.0 to 255.5, not within 0 to 255"),
        (np.float32([[-0.5, 0.5]]), "from -0.5 to 0.5, not within 0 to 255"),
        (np.float32([[0, np.nan]]), "from nan to nan, not within 0 to 255"),
        (np.float32([[0, np.inf]]), "from 0.0 to inf, not within 0 to 255"),
    ],
)
def test_greys_of_no_known_range_are_refused(values: np.ndarray, said: str) -> None:
    from PIL import Image

    with pytest.raises(ValueError, match=f"grey values {said}"):
        open_image(encode(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize(
    ("tag", "value", "said"),
    [(258, 12, "greys of 12 bits"), (262, 0, "white is 0 with greys of more than 8 bits")],
)
def test_a_tiff_whose_range_or_direction_would_be_lost_is_refused(tag: int, value: int, said: str) -> None:
    from PIL import Image

    content = encode(Image.fromarray(GREY), "TIFF")
    entry = tag.to_bytes(2, "little") + b"\3\0\1\0\0\0"  # one 16-bit number follows
    start = content.index(entry) + len(entry)
    content = content[:start] + value.to_bytes(2, "little") + content[start + 2 :]
    for look in (open_image, lambda content: check_header(ImageRef(content=content))):
        with pytest.raises(ValueError, match=said):
            look(content)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_ordinary_images_are_converted_as_pillow_does(mode: str) -> None:
    from PIL import Image

    pixels = np.random.default_rng(3).integers(0, 256, (7, 11, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()
