"""Images that a data file embeds, written beside an output that can only name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttrain_data.formats.messages import Place
from fasttrain_data.ids import image_hash
from fasttrain_data.image_files import BadImage, ImageNames, check_image, find_image
from fasttrain_data.jsonl import whole_file

_SUFFIX = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/gif": ".gif",
    "image/webp": ".webp",
    "image/bmp": ".bmp",
}


class ImageStore:
    """Gives every image of a row a path in the output; equal bytes are written once.

    Names start from `names.out_root`, embedded images from the output's own folder. Where these are two folders, an
    output holds one kind only: later commands know a single root.
    """

    def __init__(self, names: ImageNames, output: Path) -> None:
        self._names = names
        self._folder = output.parent / f"{output.stem}_images"
        self._one_root, self._embeds = names.starts_beside(output), False

    def named(self, images: list[Any], place: Place) -> list[str]:
        """Paths for a row's images; BadRow when embedded bytes are no image, and when paths have no root in common."""
        paths = [
            self._write(image["bytes"], place) if isinstance(image, dict) else self._names.written(image)
            for image in images
        ]
        self._embeds = self._embeds or any(isinstance(image, dict) for image in images)
        if self._embeds and self._names.used and not self._one_root:
            wanted = f"only embedded or only named images, or an --out in {self._names.out_root}"
            raise place.bad("images", wanted, "both in this file")
        return paths

    def content(self, image: Any, place: Place) -> bytes:
        """The bytes of an image that is embedded or named; BadRow when it cannot be read."""
        if isinstance(image, dict):
            content: bytes = image["bytes"]
            return content
        try:
            return find_image(self._names.in_root, image).read_bytes()
        except BadImage as problem:
            raise place.bad("images", "an existing image file", str(problem)) from None

    def _write(self, content: bytes, place: Place) -> str:
        try:
            suffix = _SUFFIX.get(check_image(content, "embedded image").mime_type, "")
        except BadImage as problem:
            raise place.bad("images", "an image", str(problem)) from None
        path = self._folder / f"{image_hash(content)[:32]}{suffix}"
        if not path.exists():
            with whole_file(path) as file:
                file.write(content)
        return f"{self._folder.name}/{path.name}"
