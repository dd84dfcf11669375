"""How far a model's positions reach: beyond that it fails, or becomes another function with every sequence."""

from __future__ import annotations

from typing import Any

from torch import nn

from fasttrain.model.lora import language_model


def why_too_long(model: Any, longest: int) -> str | None:
    """Why this model cannot run a sequence of `longest` tokens; None if it can.

    Plain rotary positions are no limit: the model's own code runs beyond what it was trained on.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not limit or longest <= limit:
        return None
    if "dynamic" in rope_types(config):
        return f"beyond {limit} tokens its dynamic position scaling depends on the sequences that ran before"
    # OPT's table has two rows more than positions
    tables = [m.num_embeddings for m in language_model(model).modules() if isinstance(m, nn.Embedding)]
    if {limit, limit + 2} & set(tables[1:]):
        return f"it has {limit} positions"
    return None


def trained_positions(config: Any) -> int | None:
    """How long the sequences of the model's training were; None where its config leaves that open, as under scaled positions."""
    if not rope_types(config) <= {"default", "llama3"}:
        return None
    return getattr(config, "max_position_embeddings", None)


def scales_by_longest(config: Any, longest: int) -> bool:
    """Whether every sequence of a pass gets the position scaling of the longest (longrope, beyond its original length)."""
    originals = [
        rope.get("original_max_position_embeddings")
        for rope in _ropes(config)
        if rope.get("rope_type") == "longrope"
    ]
    return any(original and longest > original for original in originals)


def rope_types(config: Any) -> set[str]:
    """How the positions are scaled, in whichever layers."""
    return {rope.get("rope_type", "default") for rope in _ropes(config)}


def _ropes(config: Any) -> list[dict[str, Any]]:
    """What scales the positions: one for all layers, or one for each type of them (Gemma 3)."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [part for part in rope.values() if isinstance(part, dict)]
    return each or [rope]
