"""Content hashes: ids of records, keys of calls, digests of images."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any


def content_hash(*parts: Any) -> str:
    """24 hex digits (96 bits) that are equal exactly when the JSON-able parts are."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def image_hash(content: bytes) -> str:
    """SHA-256 of an image file's bytes, hex."""
    return hashlib.sha256(content).hexdigest()


def seed_of(*parts: Any) -> int:
    """A 31-bit seed made from the parts: the same wherever and whenever it is asked for."""
    return int(content_hash(*parts)[:8], 16) & 0x7FFFFFFF


def rng_of(*parts: Any) -> random.Random:
    """A random generator of its own for these parts, so that no draw depends on file order."""
    return random.Random(content_hash(*parts))
