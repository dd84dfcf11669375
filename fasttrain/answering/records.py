"""Answers as rows: LLaVA's answer format, FastChat's for questions of several turns."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fasttrain.answering.run import Answer
from fasttrain.files import write_atomic


def llava_row(answer: Answer, model_id: str) -> dict[str, Any]:
    """One line of LLaVA's answer files. The id follows from the content, so that equal runs write equal files."""
    from fasttrain_data.ids import content_hash

    return {
        "question_id": answer.question.id,
        "prompt": answer.question.text,
        "text": answer.turns[0],
        "answer_id": content_hash(str(answer.question.id), model_id, answer.turns),
        "model_id": model_id,
        "metadata": {"finish_reason": answer.finish[0], "tokens": answer.tokens},
    }


def fastchat_row(answer: Answer, model_id: str) -> dict[str, Any]:
    """One line of FastChat's answer files. tstamp is 0: no scorer reads it, and equal runs write equal files."""
    from fasttrain_data.ids import content_hash

    return {
        "question_id": answer.question.id,
        "answer_id": content_hash(str(answer.question.id), model_id, answer.turns),
        "model_id": model_id,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": 0.0,
    }


def answer_row(answer: Answer, model_id: str) -> dict[str, Any]:
    """The format that fits the question: FastChat's if its row has `turns`."""
    return (fastchat_row if "turns" in answer.question.row else llava_row)(answer, model_id)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """The rows as a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomic(path, "".join(lines).encode("utf-8", "backslashreplace"))
    return path


def model_name(model: str, adapter: Path | None) -> str:
    """What answers are signed with: the adapter's run, else the last part of the model's name."""
    if adapter is not None:
        folder = adapter.resolve()
        return folder.parent.name if folder.name == "final" else folder.name
    return model.rstrip("/").rsplit("/", 1)[-1]
