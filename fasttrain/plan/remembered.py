"""Predicted bytes of earlier starts: a pass that was counted is not counted again for the same model, recipe and code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fasttrain_kernels
from fasttrain.files import cache_root, write_json

KEPT = 100  # the newest of them
_COUNTED_WITH = ("torch", "transformers", "peft")


def remembered(facts: dict[str, Any], count: Callable[[], int]) -> int:
    """`count()`, or what it gave for the same `facts`; kept in the cache folder, where that can be written.

    facts: everything that decides the number besides the code, whose files and versions are looked at here.
    """
    known = json.dumps([facts, _code()], sort_keys=True, default=str)
    path = cache_root() / "memory" / f"{blake2b(known.encode(), digest_size=16).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found: int = json.loads(path.read_bytes())["bytes"]
        return found
    found = count()
    with contextlib.suppress(OSError):  # only costs the next start its time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"bytes": found})
        entries = sorted(path.parent.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
        for old in entries[KEPT:]:
            old.unlink(missing_ok=True)
    return found


def _code() -> list[Any]:
    """What tells that a program counts otherwise: versions of other packages, and our own files by size and time."""
    here = Path(__file__).parent
    folders = (here, here.parent / "model", Path(fasttrain_kernels.__file__).parent)
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    states = [(path.name, found.st_size, found.st_mtime_ns) for path in files for found in [path.stat()]]
    return [*map(version, _COUNTED_WITH), states]
