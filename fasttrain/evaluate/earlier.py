"""Scores that an output folder holds from before: they stay only beside the very answers they are of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from fasttrain.evaluate.results import RESULTS
from fasttrain.progress import say

# in the order they come back: scores.json is what makes a folder an evaluation
_NAMES = (RESULTS, "scores.json")


def hash_answers(files: Iterable[Path]) -> str:
    """Of the answer files' content; equal runs write equal files. scores.json keeps it as `answers_hash`."""
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:24]


def set_aside(out: Path) -> None:
    """Rename the scores, so that none stand beside new answers whenever the process dies."""
    for name in reversed(_NAMES):
        if (out / name).is_file():
            (out / name).replace(_aside(out, name))


def bring_back(out: Path, answers_hash: str) -> None:
    """Rename them back if they are of the answers with this hash, else remove them and say so."""
    places = [_aside(out, name) for name in _NAMES]
    if not any(place.is_file() for place in places):
        return
    try:
        before = json.loads(places[-1].read_text(encoding="utf-8")).get("answers_hash")
    except (OSError, ValueError, AttributeError):
        before = None
    if before == answers_hash:
        for place, name in zip(places, _NAMES, strict=True):
            if place.is_file():
                place.replace(out / name)
        return
    for place in places:
        place.unlink(missing_ok=True)
    say(f"note: the scores in {out} were of other answers, or of an earlier version, and are removed")


def _aside(out: Path, name: str) -> Path:
    return out / f"{name}.earlier"
