"""Image bytes of a reviewed pair."""

from __future__ import annotations

from pathlib import Path

from fasttrain_data.image_files import BadImage, as_png, check_image, find_image, mime_type, read_image
from fasttrain_data.review.items import Item


def image_bytes(item: Item, number: int, image_root: Path) -> bytes:
    """BadImage if the pair has no such image, its file is not under the root, or it is none."""
    if not 0 <= number < len(item.images):
        raise BadImage("no such image")
    image = item.images[number]
    if isinstance(image, dict):
        found = check_image(image["bytes"], "embedded image")
    else:
        found = read_image(find_image(image_root, image))
    shown = mime_type(found.content).startswith("image/")
    return found.content if shown else as_png(found).content  # TIFF and others, which browsers do not show
