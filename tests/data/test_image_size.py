"""The size read from a header is that of the decoded, upright image."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from fasttrain.data.images import ImageRef, image_size, open_image

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}), ("JPEG", {}), ("MPO", {}), ("WEBP", {}), ("AVIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
]  # fmt: skip


def encoded(kind: str, **options: Any) -> bytes:
    """37 x 23 pixels as stored."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_mandelbrot((37, 23), (-2, -1, 1, 1), 50).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda value: str(value))
def test_the_size_is_that_of_the_upright_image(
    kind: str, options: dict[str, Any], orientation: int, tmp_path: Path
) -> None:
    from PIL import Image

    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = orientation
    content = encoded(kind, exif=exif, **options)
    (tmp_path / "image").write_bytes(content)
    upright = (23, 37) if orientation > 4 else (37, 23)
    assert open_image(content).size == upright
    assert image_size(ImageRef(content=content)) == image_size(ImageRef(path=tmp_path / "image")) == upright


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_orientation_in_the_xmp_of_a_tiff_counts_where_pillow_heeds_it(orientation: int) -> None:
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    content = encoded("TIFF", tiffinfo={700: xmp})
    assert open_image(content).size == image_size(ImageRef(content=content))


# cut short, with an orientation in a field of no known type, with a directory beyond the end, and no EXIF at all
UNREADABLE = [
    b"II*\0",
    b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\xff\0",
    b"MM\0*\xff\xff\xff\xff",
    b"nothing of the kind",
]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("exif", UNREADABLE)
def test_metadata_that_cannot_be_read_leaves_the_image_as_it_is_stored(kind: str, exif: bytes) -> None:
    content = encoded(kind, exif=exif)
    assert open_image(content).tobytes() == open_image(encoded(kind)).tobytes()
    assert image_size(ImageRef(content=content)) == (37, 23)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_an_upright_image_says_nothing_by_which_it_would_be_turned_again(kind: str, orientation: int) -> None:
    from PIL import Image, ImageOps

    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = orientation
    opened = open_image(encoded(kind, exif=exif))
    assert ImageOps.exif_transpose(opened).tobytes() == opened.tobytes()
