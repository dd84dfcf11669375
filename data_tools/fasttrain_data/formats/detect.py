"""Which layout a preference record has, by its keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fasttrain_data.formats.table_rows import iterate_rows
from fasttrain_data.jsonl import Row


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and ("value" in value or "content" in value)


def _is_mllm_dpo(row: Row) -> bool:
    if "question" not in row or "rejected" not in row:
        return False
    chosen = row.get("chosen")
    first = chosen[0] if isinstance(chosen, list) and chosen else chosen
    return isinstance(first, dict) and "from" in first


# name -> test, in the order they are tried: layouts with telling keys first
FORMATS: dict[str, Callable[[Row], bool]] = {
    "ms-swift": lambda row: "messages" in row and ("rejected_response" in row or "rejected_messages" in row),
    "llama-factory": lambda row: (
        ("conversations" in row or "messages" in row)
        and _is_turn(row.get("chosen"))
        and _is_turn(row.get("rejected"))
    ),
    "mllm-dpo": _is_mllm_dpo,
    "rlaif-v": lambda row: {"question", "chosen", "rejected"} <= set(row),
    "vlfeedback": lambda row: {"prompt", "completions"} <= set(row),
    "helpsteer3": lambda row: {"context", "response1", "response2", "overall_preference"} <= set(row),
    "helpsteer": lambda row: {"prompt", "response", "helpfulness", "correctness", "coherence"} <= set(row),
    "ultrafeedback": lambda row: (
        {"prompt", "chosen", "rejected", "chosen-rating", "rejected-rating"} <= set(row)
    ),
    "llava-next": lambda row: {"prompt", "answer", "chosen", "rejected"} <= set(row),
    "alpaca": lambda row: (
        row.get("prompt") is None
        and bool(row.get("instruction") or row.get("input"))
        and all(
            isinstance(row.get(side, row.get(f"{side}_response")), str) for side in ("chosen", "rejected")
        )
    ),
    "trl": lambda row: {"chosen", "rejected"} <= set(row),
}


def first_keys(path: Path, split: str | None = None) -> str:
    """What a file that is of no known layout holds, for a message."""
    for _, place, row in iterate_rows(path, split=split):
        return f"keys {', '.join(row) or 'none'} in {place}"
    return "no rows"


def detect_format(source: Path | str | Row, split: str | None = None) -> str | None:
    """The layout of a record, or of the first record of a file (a folder's split); None if it is none we know.

    "trl" covers TRL's explicit and implicit prompts and the short form with plain strings.
    """
    if isinstance(source, dict):
        return next((name for name, matches in FORMATS.items() if matches(source)), None)
    for _, _, row in iterate_rows(Path(source), split=split):
        return detect_format(row)
    return None
