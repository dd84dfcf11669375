"""Turns of conversations, as LLaVA (`human`, `gpt`) and TRL (`turn`) write them."""

from __future__ import annotations

from typing import Any


def human(text: Any) -> dict[str, Any]:
    return {"from": "human", "value": text}


def gpt(text: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


def turn(role: str, *parts: Any) -> dict[str, Any]:
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}
