"""Conversations and questions with outputs of other projects: every answer in them is one to learn."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fasttrain.data.bad_row import BadRow
from fasttrain.data.pairs import read_example
from fasttrain.data.sources import open_source
from fasttrain.errors import UserError


def taught(path: Path) -> list[tuple[list[tuple[str, str]], str, int]]:
    """(turns with images as *, answers and what is said between them, images) of a file as `fasttrain sft` reads it."""
    source = open_source(path)
    pairs = [
        read_example(source.row(number), source.where(number), path.parent) for number in range(len(source))
    ]
    found = []
    for pair in pairs:
        answer = pair.chosen
        for question, later in pair.later:
            answer += "".join(f" [{role}: {parts[0][1]}] " for role, parts in question) + later
        turns = [(role, "".join(text or "*" for _, text in parts)) for role, parts in pair.messages]
        found.append((turns, answer, len(pair.images)))
    return found


def test_every_answer_of_a_conversation_is_one_to_learn(tmp_path: Path) -> None:
    Image.new("RGB", (5, 4), "red").save(tmp_path / "a.png")
    said = [("user", "<image>Why?"), ("assistant", "So."), ("user", "<image>And?"), ("assistant", "Or.")]
    messages = [{"role": role, "content": text} for role, text in said]
    turns = [
        {"from": {"user": "human", "assistant": "gpt"}[role], "value": text, "role": None}
        for role, text in said
    ]
    rows = [
        {"messages": messages, "system": "Be short.", "images": ["a.png", "a.png"], "tools": "[]"},
        {"messages": None, "conversations": turns, "images": ["a.png", "a.png"]},
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Ready?", "Yes."]]},
        {"messages": [*messages[:2], {**messages[2], "content": "And?"}, messages[3]], "images": ["a.png"]},
        {
            "messages": [*messages[:2], {**messages[2], "content": "And?"}, messages[3]],
            "system": "Be short.",
            "images": ["a.png"],
        },
    ]
    path = tmp_path / "taught.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, system = ("user", "*Why?"), ("system", "Be short.")
    later = [first, ("assistant", "So."), ("user", "*And?")]
    assert taught(path) == [
        ([system, first], "So.", 1),
        ([system, *later], "Or.", 2),
        ([first], "So.", 1),
        (later, "Or.", 2),
        ([("user", "Ready?")], "Yes. [user: Add.\n1 2] 3", 0),
        ([first], "So. [user: And?] Or.", 1),
        ([system, first], "So.", 1),
        ([system, first, ("assistant", "So."), ("user", "And?")], "Or.", 1),
    ]


def test_conversations_of_parts_with_embedded_images_are_read(tmp_path: Path) -> None:
    """As HuggingFaceH4/llava-instruct-mix-vsft has them."""
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(buffer, "PNG")
    text, image = (
        {"index": None, "text": "Why?", "type": "text"},
        {"index": 0, "text": None, "type": "image"},
    )
    answer = {"index": None, "text": "So.", "type": "text"}
    row = {
        "messages": [{"role": "user", "content": [text, image]}, {"role": "assistant", "content": [answer]}],
        "images": [{"bytes": buffer.getvalue(), "path": None}],
    }
    path = tmp_path / "taught.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert taught(path) == [([("user", "Why?*")], "So.", 1)]


def test_other_columns_of_conversations_come_through(tmp_path: Path) -> None:
    """A source, for the model card; a key that seems to hold an image, for the warning that it is not read."""
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    no_pair = {"chosen": None, "rejected": None}  # as datasets fills up rows beside pairs
    path = tmp_path / "taught.jsonl"
    path.write_text(json.dumps({"messages": said, "source": "LRV", "image_path": "a.png"} | no_pair))
    [row] = open_source(path).rows(0, 1)
    assert row.keys() == {"source", "image_path", "id", "images", "prompt", "completion"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tools": [{"name": "x"}]}, "tools: wanted a row without tools"),
        ({"label": False}, "label: wanted an answer to learn"),
        ({"messages": [{"role": "user", "content": "Why?"}]}, "messages: wanted answers behind a question"),
        (
            {"images": ["a.png"], "messages": [{"role": "user", "content": "<image><image>"}]},
            "images: wanted",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Where is <ref-object>?"},
                    {"role": "assistant", "content": "<bbox>"},
                ],
                "objects": {"ref": ["a dog"], "bbox": [[1, 2, 3, 4]]},
            },
            "line 1: objects: wanted names and boxes written out",
        ),
        (
            {
                "messages": None,
                "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": " "}],
            },
            "line 1: conversations: wanted a non-empty answer",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "loss": False}]},
            "messages: wanted answers that are all learned, without loss, got False",
        ),
    ],
)
def test_conversations_that_would_be_learned_otherwise_are_refused(
    changed: dict[str, object], told: str, tmp_path: Path
) -> None:
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    path = tmp_path / "taught.jsonl"
    path.write_text(json.dumps({"messages": said} | changed))
    with pytest.raises((UserError, BadRow), match=told):
        taught(path)
