"""Which files of a downloaded data set are of one split: train, test and others lie side by side in its folder."""

from __future__ import annotations

import re
from pathlib import Path

from fasttrain_data.errors import UserError

# The names that Hugging Face's datasets looks for, and how it numbers the files of a split of any name.
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}")


def parquet_files(folder: Path, split: str | None) -> list[Path]:
    """The Parquet files of a split, or of a folder that holds no more than one; UserError otherwise."""
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise UserError(
            f"{folder}: wanted a folder with Parquet files or written by datasets' save_to_disk, got neither"
        )
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    named = ", ".join(f"{name} ({len(splits[name])})" for name in splits if name is not None)
    if split is None:
        if len(splits.keys() - {None}) > 1:
            raise UserError(f"{folder}: wanted the Parquet files of one split (--split), got {named}")
        return files
    if split not in splits:
        raise UserError(
            f"{folder}: wanted Parquet files of the split {split} (--split), got {named or 'none by their names'}"
        )
    return splits[split]


def _split_of(file: Path) -> str | None:
    """What the file's name says, or else the nearest folder's."""
    if numbered := _NUMBERED.fullmatch(file.stem):
        return numbered.group(1)
    for name in (file.stem, *reversed(file.parts[:-1])):
        words = re.split(r"[-._ \d]+", name.lower())
        for split, keywords in _KEYWORDS.items():
            if any(word in keywords for word in words):
                return split
    return None
