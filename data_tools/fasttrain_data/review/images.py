"""Image bytes of a reviewed pair."""

from __future__ import annotations

from pathlib import Path

from fasttrain_data.image_files import BadImage, as_png, check_image, find_image, mime_type
from fasttrain_data.review.items import Item


def image_bytes(item: Item, number: int, image_root: Path) -> bytes:
    """BadImage if the pair has no such image, its file is not under the root, or it is none."""
    if not 0 <= number < len(item.images):
        raise BadImage("no such image")
    image = item.images[number]
    content: bytes = image["bytes"] if isinstance(image, dict) else find_image(image_root, image).read_bytes()
    if mime_type(content).startswith("image/"):
        return content
    name = image if isinstance(image, str) else "embedded image"
    return as_png(check_image(content, name)).content  # TIFF and others, which browsers do not show
