"""Images: opened when sane, refused in one line when not, turned into the pixels the model's processor makes."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from fasttrain.data import images
from fasttrain.data.images import ImageRef, PixelMaker, check_header, hash_bytes, open_image
from fasttrain.errors import UserError


def picture(size: tuple[int, int] = (37, 23), seed: int = 0, mode: str = "RGB") -> Any:
    from PIL import Image

    pixels = random.Random(seed).randbytes(3 * size[0] * size[1])
    return Image.frombytes("RGB", size, pixels).convert(mode)


def encode(image: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of any claimed size, without its pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_a_lossless_file_opens_as_its_pixels(kind: str) -> None:
    opened = open_image(encode(picture(), kind))
    assert (opened.mode, opened.size, opened.tobytes()) == ("RGB", (37, 23), picture().tobytes())


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_common_lossy_files_open(kind: str) -> None:
    assert open_image(encode(picture(), kind)).size == (37, 23)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert open_image(encode(picture(mode=mode), kind)).mode == "RGB"


def test_a_camera_picture_is_turned_upright() -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right
    opened = open_image(encode(picture(), "PNG", exif=exif))
    assert opened.tobytes() == picture().transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a file of type"),
        (b"just text\n", "not a file of type"),
        (b"\x89PNG\r\n\x1a\n", "not a file of type"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a file of type"),  # would run Ghostscript
        (encode(picture(), "JPEG")[:700], "broken image"),
        (encode(picture(), "PNG")[:700], "broken image"),
        (bomb(30_000, 20_000), "more than 100,000,000"),
        (bomb(10_001, 10_000), "10001 x 10000 pixels, more than 100,000,000"),
        (bomb(2_001, 10), "2001 x 10 pixels, one side more than 200 times the other"),
        (bomb(1, 50_000), "1 x 50000 pixels, one side more than 200 times the other"),
    ],
)
def test_bytes_that_are_no_sane_image_say_why(content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_image(content)


@pytest.mark.parametrize("content", [b"text", bomb(30_000, 20_000), bomb(1, 50_000)])
def test_the_header_alone_shows_text_and_bombs(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    for ref in (ImageRef(content=content), ImageRef(path=tmp_path / "x.png")):
        with pytest.raises(ValueError, match=r"not a file of type|pixels"):
            check_header(ref)


def test_the_header_check_reads_no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    check_header(ImageRef(content=encode(picture(), "PNG")))


def test_a_thin_strip_is_refused_before_it_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 x 20,000 pixels resized to a shortest edge of 336 are 20 GB.
    maker = PixelMaker(lambda **_: pytest.fail("the strip reached the image processor"))
    with pytest.raises(ValueError, match="one side more than"):
        maker([encode(picture((1, 201)), "PNG")])


def test_a_processor_whose_image_inputs_are_lists_is_one_line() -> None:
    """Unlimited-OCR's, which packs could neither join nor move."""
    import torch

    class Lists:
        image_token = "<image>"

        def __call__(self, **_: Any) -> dict[str, Any]:
            return {"input_ids": [[1]], "pixel_values": torch.zeros(1, 3, 2, 2), "patches_grid": [[1, 2]]}

    wanted = r"model\.name: wanted a processor whose image inputs are tensors, got Lists, whose patches_grid are lists"
    with pytest.raises(UserError, match=wanted):
        PixelMaker(Lists())([encode(picture(), "PNG")])


def test_a_strip_of_200_to_1_is_still_an_image() -> None:
    assert open_image(encode(picture((1, 200)), "PNG")).size == (1, 200)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM"])
def test_damage_anywhere_is_a_value_error_and_nothing_else(kind: str) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "description"
    whole = encode(picture(), kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
    rng = random.Random(kind)
    for _ in range(300):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(min(len(damaged), rng.randrange(1, 6))):
            damaged[rng.randrange(min(len(damaged), rng.choice([40, 200, 10**6])))] = rng.randrange(256)
        for open_it in (open_image, lambda content: check_header(ImageRef(content=content))):
            try:
                open_it(bytes(damaged))
            except ValueError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Failed to decode image"), "Failed to decode image"),  # as AVIF's decoder does
        (struct.error("unpack requires a buffer\nof 2 bytes"), "unpack requires a buffer of 2 bytes"),
        (zlib.error("Error -3"), "Error -3"),
        (KeyError(3), "3"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_decoder_that_fails_in_its_own_way_is_a_value_error(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageFile

    def fail(image: Any) -> None:
        raise error

    content = encode(picture(), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ValueError, match=f"^broken image: {said}$"):
        open_image(content)


def test_memory_that_runs_out_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    def fail(image: Any) -> None:
        raise MemoryError

    content = encode(picture(), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        open_image(content)


def test_known_formats_are_those_that_pillow_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FORMATS", ("PNG", "A FORMAT OF LATER PILLOWS"))
    assert open_image(encode(picture(), "PNG")).size == (37, 23)


def test_a_file_and_its_bytes_are_the_same_image(tmp_path: Path) -> None:
    content = encode(picture(), "PNG")
    (tmp_path / "a.png").write_bytes(content)
    file, embedded = ImageRef(path=tmp_path / "a.png"), ImageRef(content=content)
    assert file.read() == embedded.read() == content and file.size() == embedded.size() == len(content)
    assert hash_bytes(content) == hashlib.blake2b(content, digest_size=16).hexdigest()
    assert (file.name(), embedded.name()) == (str(tmp_path / "a.png"), "embedded image")


def test_pixels_are_those_of_the_models_processor(tiny_llava: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_llava, backend="pil")
    contents = [
        encode(picture(size, seed), "PNG") for seed, size in enumerate([(37, 23), (20, 61), (3, 50), (1, 1)])
    ]
    ours = PixelMaker(processor)(contents)["pixel_values"]
    truth = processor(
        images=[Image.open(io.BytesIO(content)) for content in contents],
        text=["<image>"] * 4,
        return_tensors="pt",
    )["pixel_values"]
    assert ours.shape == (4, 3, 28, 28) and ours.equal(truth)


def test_settings_that_change_pixels_change_the_fingerprint(tiny_llava: Path) -> None:
    from transformers import AutoProcessor

    from fasttrain.data.tokens import ChatTokenizer

    def fingerprint(**changes: Any) -> str:
        processor = AutoProcessor.from_pretrained(tiny_llava, backend="pil")
        for name, value in changes.items():
            setattr(processor.image_processor, name, value)
        return ChatTokenizer(processor, [processor.tokenizer.eos_token_id]).fingerprint()

    assert fingerprint() == fingerprint()
    changed = [
        fingerprint(image_mean=[0.5, 0.5, 0.5]),
        fingerprint(do_convert_rgb=False),
        fingerprint(resample=2),
    ]
    assert len({fingerprint(), *changed}) == 4
