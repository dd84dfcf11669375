"""JSON Schemas of the records. `python -m fasttrain_data.schema docs/schema` writes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fasttrain_data.jsonl import write_text
from fasttrain_data.records import Annotation, Completion, Demonstration, Pair, Question, Record

RECORDS: dict[str, type[Record]] = {
    "question": Question,
    "completion": Completion,
    "annotation": Annotation,
    "pair": Pair,
    "demonstration": Demonstration,
}


def schema_text(kind: str) -> str:
    """The JSON Schema (draft 2020-12) of one record, as a file's text."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RECORDS[kind].model_json_schema(),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def write_schemas(folder: Path) -> None:
    for kind in RECORDS:
        write_text(folder / f"{kind}.schema.json", schema_text(kind))


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
