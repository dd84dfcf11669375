"""Processors that transformers refuses to load with PIL image processing, though their images need nothing else.

Video processors are made with torchvision alone: the whole processor is refused where it is missing, and where it is
installed, for there is no video processing by PIL. The same processor is made for images only. Pixtral's imports
torchvision for a function that its PIL image processing has too.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PIXTRAL = "PixtralProcessor"


class _Absent(SimpleNamespace):
    """In place of a video processor: what templates, settings and a processor's constructor ask it for is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def without_videos(model_type: str, named: str | None = None) -> Any | None:
    """The model type's processor class, or where it has none the one that the files name, without its video processor; None
    if it has none."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(model_type) or named
    found: Any = getattr(transformers, name or "", None)
    if found is None or name == PIXTRAL:  # looking at Pixtral's attributes imports torchvision
        return None
    attributes = found.get_attributes()
    if "video_processor" not in attributes:
        return None
    place = attributes.index("video_processor")
    kept = [attribute for attribute in attributes if attribute != "video_processor"]

    class Parts(transformers.ProcessorMixin):
        """What the class hands its parts to: the one that is missing, None, is dropped, wherever it stands."""

        def __init__(self, *parts: Any, **named: Any) -> None:
            named.pop("video_processor", None)
            super().__init__(*parts[:place], *parts[place + 1 :], **named)

    class Images(found, Parts):  # type: ignore[misc]
        # what Ernie's saves, and what Qwen-Omni's adds up
        video_processor = _Absent(font="", model_input_names=[])

        @classmethod
        def get_attributes(cls) -> list[str]:
            return kept

        @classmethod
        def _get_arguments_from_pretrained(cls, *names: Any, **options: Any) -> list[Any]:
            made = super()._get_arguments_from_pretrained(*names, **options)
            return [*made[:place], None, *made[place:]]

    Images.__name__ = Images.__qualname__ = name
    return Images


def pixtral_processor() -> Any:
    """PixtralProcessor, of Pixtral and Mistral 3, with what it imports from the torchvision module taken from the PIL one."""
    package = "transformers.models.pixtral"
    same = importlib.import_module(f"{package}.image_processing_pil_pixtral")
    torchvision = f"{package}.image_processing_pixtral"
    sys.modules[torchvision] = same
    try:
        return importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
    finally:
        del sys.modules[torchvision]


def processor_name(folder: Path) -> str | None:
    """The class that a model's files name for its processor, if they do."""
    for file in ("processor_config.json", "preprocessor_config.json"):
        try:
            name = json.loads((folder / file).read_text(encoding="utf-8")).get("processor_class")
        except (OSError, ValueError, AttributeError):
            continue
        if name is not None:
            return str(name)
    return None


def save_processor(processor: Any, source: Path, folder: Path) -> None:
    """Write a processor's files; what one without videos has left out is copied from the model it was read from."""
    processor.save_pretrained(folder)
    if not isinstance(getattr(processor, "video_processor", None), _Absent):
        return
    if (source / "video_preprocessor_config.json").is_file():
        shutil.copy(source / "video_preprocessor_config.json", folder)
    written, original = folder / "processor_config.json", source / "processor_config.json"
    if written.is_file() and original.is_file():
        videos = json.loads(original.read_text(encoding="utf-8")).get("video_processor")
        if videos is not None:
            settings = {**json.loads(written.read_text(encoding="utf-8")), "video_processor": videos}
            written.write_text(json.dumps(settings, indent=2), encoding="utf-8")
