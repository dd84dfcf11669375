"""Image files of records: found inside their root, checked, read, and named again relative to an output."""

from __future__ import annotations

import base64
import io
import os
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from fasttrain_data.errors import UserError
from fasttrain_data.ids import image_hash
from fasttrain_data.jsonl import is_unicode

_SENT_AS_IS = frozenset({"image/png", "image/jpeg", "image/webp"})
_LONGEST_TOLD = 300  # of a name that may be a whole image in base64
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
}


class BadImage(Exception):
    """An image that cannot be used; the text says why."""


@dataclass(frozen=True)
class ImageFile:
    """The bytes of one image, with its media type and SHA-256."""

    content: bytes
    mime_type: str
    sha256: str


def find_image(root: Path, name: str) -> Path:
    """The file `name` under `root`; BadImage if it is missing or leaves the root by `..`, absolute path or link."""
    if "\x00" in name or not is_unicode(name):
        raise BadImage(f"not a file name: {_told(repr(name))}")
    path = Path(os.path.realpath(root / name))
    if not path.is_relative_to(os.path.realpath(root)):
        raise BadImage(f"outside the image root {root}: {_told(name)}")
    try:
        found = path.is_file()
    except OSError as error:  # longer than a file name can be, as inline base64 is
        raise BadImage(f"no path of a file ({error.strerror}): {_told(name)}") from None
    if not found:
        raise BadImage(f"no such file: {_told(str(root / name))}")
    return path


def _told(name: str) -> str:
    return name if len(name) <= _LONGEST_TOLD else f"{name[:_LONGEST_TOLD]}..."


def read_image(path: Path) -> ImageFile:
    """Read and check one image (header only, nothing is decoded); BadImage says what is wrong with it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror}") from None
    return check_image(content, str(path))


def check_image(content: bytes, name: str) -> ImageFile:
    """The same for bytes at hand: what training would refuse (its file types, sizes, greys) is refused here."""
    from fasttrain.data.images import opened  # needs no torch

    try:
        with opened(io.BytesIO(content)) as image:
            kind = image.get_format_mimetype()
    except ValueError as error:
        raise BadImage(f"{name}: {error}") from None
    return ImageFile(content, kind or mime_type(content), image_hash(content))


@lru_cache(maxsize=16)  # questions about one image, and samples of one question, stand together
def as_sent(image: ImageFile) -> ImageFile:
    """The image for another program: as it is where that sees in it what training sees, else as PNG.

    Other programs leave photos as they lie, make 16 bits white, lay what is transparent on white. BadImage if an image
    that has to be decoded cannot be.
    """
    return image if image.mime_type in _SENT_AS_IS and _is_plain(image.content) else as_png(image)


def _is_plain(content: bytes) -> bool:
    """Whether an image is one picture of 8 bits a channel, opaque and upright."""
    from PIL import ExifTags, Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(content)) as image:
                upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
                opaque = image.mode in ("RGB", "L") and "transparency" not in image.info
                return upright and opaque and not getattr(image, "is_animated", False)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 (Pillow fails on damaged metadata in many ways)
            return False


def as_png(image: ImageFile) -> ImageFile:
    """The picture as training sees it: upright, 8 bits a channel."""
    from fasttrain.data.images import open_image  # needs no torch

    buffer = io.BytesIO()
    try:
        picture = open_image(image.content)
        picture.info.pop("transparency", None)  # a color that would be transparent again
        picture.save(buffer, "PNG")
    except ValueError as error:
        raise BadImage(f"cannot be decoded: {error}") from None
    return ImageFile(buffer.getvalue(), "image/png", image.sha256)


def mime_type(content: bytes) -> str:
    """Media type by the first bytes; `application/octet-stream` if they are unknown."""
    for magic, kind in _MAGIC.items():
        if content.startswith(magic):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return "application/octet-stream"


@dataclass
class ImageNames:
    """How image names of an input file become names in an output file.

    in_root: where relative names of the input start. out_root: where those of the output start. They differ
    only when no image root was given and the output stands in another folder. used: whether a name was written.
    """

    in_root: Path
    out_root: Path
    used: bool = field(default=False, init=False)

    @classmethod
    def between(cls, source: Path, output: Path, image_root: Path | None) -> ImageNames:
        if image_root is not None:
            if not image_root.is_dir():
                raise UserError(f"--image-root: wanted a folder, got {image_root}")
            return cls(image_root, image_root)
        here, there = source.parent, output.parent
        inside = Path(os.path.realpath(here)).is_relative_to(os.path.realpath(there))
        return cls(here, there if inside else here)

    def written(self, name: str) -> str:
        """The name as the output says it."""
        self.used = True
        if self.in_root == self.out_root:
            return name
        return os.path.relpath(os.path.realpath(self.in_root / name), os.path.realpath(self.out_root))

    def starts_beside(self, output: Path) -> bool:
        """Whether names start from the folder of the output itself."""
        return os.path.realpath(self.out_root) == os.path.realpath(output.parent)

    def note(self, output: Path) -> str | None:
        """What to tell the user when later stages will need an image root for the names that were written."""
        if not self.used or self.starts_beside(output):
            return None
        return f"note: image names in {output} are relative to {self.out_root}: pass --image-root {self.out_root}"


def data_url_bytes(url: str) -> bytes | None:
    """What an inline image holds, `data:image/png;base64,...`; None if it is no base64."""
    head, _, text = url.partition(",")
    try:
        return base64.b64decode(text, validate=True) if head.endswith(";base64") and text else None
    except ValueError:
        return None
