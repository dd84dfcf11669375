"""TRL's vision preference format as Parquet with the images in it, typed so that `datasets` decodes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fasttrain_data.account import Account
from fasttrain_data.formats.image_store import ImageStore
from fasttrain_data.formats.messages import Place
from fasttrain_data.jsonl import Row, is_unicode, whole_file

_ROWS_PER_GROUP = 128
_PART = {"type": {"dtype": "string", "_type": "Value"}, "text": {"dtype": "string", "_type": "Value"}}
_MESSAGES = {
    "_type": "List",
    "feature": {
        "role": {"dtype": "string", "_type": "Value"},
        "content": {"_type": "List", "feature": _PART},
    },
}
_FEATURES: dict[str, Any] = {
    "id": {"dtype": "string", "_type": "Value"},
    "images": {"_type": "List", "feature": {"_type": "Image"}},
    "prompt": _MESSAGES,
    "chosen": _MESSAGES,
    "rejected": _MESSAGES,
}
_SCORES = ("score_chosen", "score_rejected", "margin")


def write_parquet(
    rows: Iterator[Row], output: Path, store: ImageStore, account: Account, source: Path
) -> None:
    """Columns id, images, prompt, chosen, rejected and the three scores; nothing else is kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(pa)
    with whole_file(output) as file, pq.ParquetWriter(file, schema) as writer:
        while group := list(islice(rows, _ROWS_PER_GROUP)):
            table = [_arrow_row(row, store, Place(str(output), f"pair {row['id']}")) for row in group]
            writer.write_table(pa.Table.from_pylist(table, schema=schema))
            account.keep("pairs", len(group))
        account.check_any_kept(source, "pair to export")


def _schema(pa: Any) -> Any:
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [("id", pa.string()), ("images", pa.list_(image))]
    columns += [(name, messages) for name in ("prompt", "chosen", "rejected")]
    columns += [(name, pa.float64()) for name in _SCORES]
    features = _FEATURES | {name: {"dtype": "float64", "_type": "Value"} for name in _SCORES}
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _arrow_row(row: Row, store: ImageStore, place: Place) -> Row:
    images = [
        {
            "bytes": store.content(image, place),
            "path": image.get("path") if isinstance(image, dict) else Path(image).name,
        }
        for image in row["images"]
    ]
    kept = {key: row[key] for key in ("id", "prompt", "chosen", "rejected")}
    if not is_unicode(json.dumps(kept, ensure_ascii=False)):
        raise place.bad("row", "valid Unicode", "a lone surrogate")
    scores = {name: row.get(name) for name in _SCORES}
    return {**kept, "images": images, **scores}
