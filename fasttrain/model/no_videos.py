"""Processors of families that also take videos, on machines without torchvision: the same processor, for images only.

transformers makes video processors with torchvision alone and refuses the whole processor where it is missing, also to
those who have no videos. Image processing needs only PIL.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def without_videos(model_type: str) -> Any | None:
    """The model type's processor class without its video processor; None if it has none, or torchvision is installed."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import is_torchvision_available

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None or is_torchvision_available():
        return None
    found: Any = getattr(transformers, name)
    kept = [attribute for attribute in found.get_attributes() if attribute != "video_processor"]
    if len(kept) == len(found.get_attributes()):
        return None

    class Images(found):  # type: ignore[misc]
        # what templates and settings ask a video processor for
        video_processor = SimpleNamespace(num_frames=None, fps=None, merge_size=None)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return kept

        @classmethod
        def _get_arguments_from_pretrained(cls, *names: Any, **options: Any) -> list[Any]:
            return [
                *super()._get_arguments_from_pretrained(*names, **options),
                None,
            ]  # the third is the videos'

    Images.__name__ = Images.__qualname__ = name
    return Images


def save_processor(processor: Any, source: Path, folder: Path) -> None:
    """Write a processor's files; what one without videos has left out is copied from the model it was read from."""
    processor.save_pretrained(folder)
    if not isinstance(getattr(processor, "video_processor", None), SimpleNamespace):
        return
    if (source / "video_preprocessor_config.json").is_file():
        shutil.copy(source / "video_preprocessor_config.json", folder)
    written, original = folder / "processor_config.json", source / "processor_config.json"
    if written.is_file() and original.is_file():
        videos = json.loads(original.read_text(encoding="utf-8")).get("video_processor")
        if videos is not None:
            settings = {**json.loads(written.read_text(encoding="utf-8")), "video_processor": videos}
            written.write_text(json.dumps(settings, indent=2), encoding="utf-8")
