"""Images: where a row's image is, safe to open, its content hash, its pixels through the model's own processor."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain.data.placeholders import text_of_images
from fasttrain.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile
    from torch import Tensor

    ImageInputs = dict[str, Tensor]

MAX_PIXELS = 100_000_000  # more than any camera makes; a decompression bomb needs far more
MAX_RATIO = 200  # of the sides: resizing a thin strip to the model's shortest edge makes it a bomb
FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
)  # no EPS: it runs Ghostscript

_WIDTH, _LENGTH, _BITS, _PHOTOMETRIC = 256, 257, 258, 262  # tags of a TIFF

_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # by EXIF's orientation, what turns the pixels upright  # fmt: skip

_TELL_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # in an image's info


@dataclass(frozen=True)
class ImageRef:
    """One image of a row: a file inside the image root, or bytes embedded in the pair file."""

    path: Path | None = None
    content: bytes | None = None

    def size(self) -> int:
        """Bytes of the encoded image; OSError if the file is missing."""
        return len(self.content) if self.content is not None else self._file().stat().st_size

    def read(self) -> bytes:
        return self.content if self.content is not None else self._file().read_bytes()

    def name(self) -> str:
        return str(self.path) if self.path is not None else "embedded image"

    def _file(self) -> Path:
        assert self.path is not None
        return self.path


def hash_bytes(content: bytes) -> str:
    """blake2b-128, hex: the same function that `files.hash_file` applies to a file."""
    return blake2b(content, digest_size=16).hexdigest()


def resolve_inside(root: Path, name: str) -> Path:
    """The file `name` under `root`; ValueError if it leaves the root, by `..`, an absolute path or a link."""
    try:
        path = Path(os.path.realpath(root / name))
    except ValueError:
        raise ValueError("a path without NUL characters and lone surrogates") from None
    if not path.is_relative_to(os.path.realpath(root)):
        raise ValueError(f"a path inside the image root {root} (data.image_root, --image-root)")
    return path


def open_image(content: bytes) -> Image:
    """Decode to RGB, upright; ValueError says what is wrong with the bytes."""
    from PIL.Image import Transpose

    with opened(io.BytesIO(content)) as image:
        image.load()  # before it is asked how it lies: some versions of Pillow turn a TIFF here
        turn = _TURNS.get(_orientation(image))
        upright = to_rgb(image if turn is None else image.transpose(Transpose[turn]))
    for name in _TELL_ORIENTATION:  # a processor that heeds it would turn the image again
        upright.info.pop(name, None)
    return upright


def _orientation(image: Image) -> int:
    """How the pixels lie, by EXIF's numbers; 1, upright, where the file does not say, or says it in a way that cannot be read."""
    from PIL.Image import ExifTags

    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 (the pixels are sound; Pillow fails on damaged metadata in many ways)
        return 1
    return found if isinstance(found, int) else 1


def to_rgb(image: Image) -> Image:
    """8 bits a channel; of 16-bit greys the upper 8. ValueError for integer or float greys of no known range."""
    import numpy as np
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    grey = np.asarray(image)
    low, high, most = grey.min(), grey.max(), 255 if image.mode == "F" else 65535
    if not 0 <= low <= high <= most:
        raise ValueError(f"grey values from {low} to {high}, not within 0 to {most}")
    if image.mode.startswith("I;16") or high > 255:  # as "I" come files of 16 bits and files of 8 bits in 32
        grey = grey >> 8
    elif image.mode == "F" and high <= 1:
        grey = np.round(grey * 255)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def check_header(ref: ImageRef) -> None:
    """Cheap check that an image can probably be opened: header only. ValueError or OSError if not."""
    if ref.content is not None:
        with opened(io.BytesIO(ref.content)):
            return
    with ref._file().open("rb") as file, opened(file):
        return


@contextlib.contextmanager
def opened(file: Any) -> Iterator[ImageFile]:
    """A lazily opened image of sane size; what PIL raises for damage, here or in the block, becomes a ValueError.

    Its decoders raise what they like: zlib's, struct's and their own errors, and KeyError and the like from damaged tables.
    """
    from PIL import Image, UnidentifiedImageError

    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # size is judged below; PIL's other warnings concern metadata
        try:
            with Image.open(file, formats=known) as image:
                _check_size(image.width, image.height)
                _check_greys(image)
                yield image
        except Image.DecompressionBombError:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels") from None
        except UnidentifiedImageError:
            raise ValueError(f"not a file of type {', '.join(known)}") from None
        except (ValueError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 (see above)
            problem = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"broken image: {problem}") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels, one side more than {MAX_RATIO} times the other")


def _check_greys(image: Image) -> None:
    """Refuse greys of a TIFF that Pillow passes on as they are and that its mode does not tell from others."""
    if not image.mode.startswith(("I", "F")):
        return
    tags = getattr(image, "tag_v2", {})
    if tags.get(_BITS) == (12,):
        raise ValueError("a TIFF with greys of 12 bits, wanted 8 or 16")
    if tags.get(_PHOTOMETRIC) == 0:
        raise ValueError("a TIFF whose white is 0 with greys of more than 8 bits, wanted black as 0")


def image_size(ref: ImageRef) -> tuple[int, int]:
    """(width, height) of an image as `open_image` would give it, from its header; ValueError or OSError if it has none."""
    if ref.content is not None:
        file: Any = io.BytesIO(ref.content)
    else:
        file = ref._file().open("rb")
    with file, opened(file) as image:
        # of a TIFF: some versions of Pillow turn its size, and not yet its pixels, when they open it
        tags = getattr(image, "tag_v2", None)
        width, height = image.size if tags is None else (tags[_WIDTH], tags[_LENGTH])
        return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


# What processors return for the text, not for the images.
_OF_TEXT = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "cross_attention_mask",
    "labels",
)


class PixelMaker:
    """Encoded images of one prompt -> what the model's processor makes of them, by the names of the model's arguments."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def settings(self) -> dict[str, Any]:
        """What decides the image inputs, for the reference key."""
        settings: dict[str, Any] = self.processor.image_processor.to_dict()
        for incidental in ("_processor_class", "processor_class", "auto_map"):
            settings.pop(incidental, None)
        options = getattr(self.processor, "images_kwargs", None)
        return {**settings, "images_kwargs": options} if options else settings

    def __call__(self, contents: list[bytes]) -> ImageInputs:
        """`pixel_values` and its companions (sizes, grids, masks); ValueError if an image is broken."""
        images = [open_image(content) for content in contents]
        text = text_of_images(self.processor, len(images))
        with (
            warnings.catch_warnings()
        ):  # some processors make numpy arrays of tensors in a way that numpy deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            inputs = self.processor(
                images=[images], text=[text], add_special_tokens=False, return_tensors="pt"
            )
        kept = {name: value for name, value in inputs.items() if name not in _OF_TEXT}
        if lists := [name for name, value in kept.items() if not hasattr(value, "to")]:
            raise UserError(
                f"model.name: wanted a processor whose image inputs are tensors, got {type(self.processor).__name__}, whose "
                f"{', '.join(lists)} are lists"
            )
        return kept


def join_inputs(inputs: list[ImageInputs]) -> ImageInputs:
    """Image inputs of several prompts as those of one pass: along the first axis, the others filled up with zeros.

    That is how processors batch images of different sizes and numbers of tiles, and what the models expect. MiniCPM-V's lay the
    patches of all images side by side instead, and say in `target_sizes` where each ends.
    """
    import torch
    from torch.nn import functional

    joined: ImageInputs = {}
    for name in dict.fromkeys(name for entry in inputs for name in entry):
        tensors = [entry[name] for entry in inputs if name in entry]
        if name == "pixel_values" and "target_sizes" in inputs[0]:
            joined[name] = torch.cat(tensors, dim=-1)
            continue
        shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        padded = []
        for tensor in tensors:
            missing = [wanted - got for wanted, got in zip(shape, tensor.shape[1:])]
            edges = [edge for amount in reversed(missing) for edge in (0, amount)]
            padded.append(functional.pad(tensor, edges) if any(missing) else tensor)
        joined[name] = torch.cat(padded)
    return joined


def blank_images(pixels: PixelMaker, count: int = 1) -> ImageInputs:
    """What the model gets for so many small black images."""
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (32, 32)).save(content, "PNG")
    return pixels([content.getvalue()] * count)
