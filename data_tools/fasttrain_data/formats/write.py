"""Writers: TRL vision rows -> the layouts of TRL, LLaMA-Factory, ms-swift and mllm-dpo."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fasttrain_data.account import Account, account_of
from fasttrain_data.errors import UserError
from fasttrain_data.formats.image_store import ImageStore
from fasttrain_data.formats.messages import PLACEHOLDER, Place, text_of
from fasttrain_data.formats.read import read_pairs
from fasttrain_data.image_files import ImageNames
from fasttrain_data.jsonl import (
    NON_FINITE,
    Row,
    check_output,
    dump_row,
    has_non_finite,
    whole_file,
    write_text,
)
from fasttrain_data.records import ATTRIBUTES
from fasttrain_data.unread import unread_column

TARGETS = ("trl", "llama-factory", "ms-swift", "mllm-dpo")
_PLACEHOLDERS = {
    "trl": (),
    "llama-factory": (PLACEHOLDER, "<video>", "<audio>"),
    "ms-swift": (PLACEHOLDER, "<video>", "<audio>"),
    "mllm-dpo": (PLACEHOLDER,),
}
_SPEAKER = {"user": "human", "assistant": "gpt"}


def export_pairs(
    source: Path, output: Path, target: str, *, form: str | None = None, image_root: Path | None = None
) -> Account:
    """Write the pairs of any readable file in the layout `target`.

    trl: JSON lines, or Parquet with the images in it when `output` ends in .parquet. llama-factory: a JSON array
    and, beside it, dataset_info.json with its entry. ms-swift: JSON lines. mllm-dpo: a JSON array, which holds
    one image and one question at most. Rows that a layout cannot hold are left out, counted and listed.
    """
    if target not in TARGETS:
        raise UserError(f"--to: wanted one of {', '.join(TARGETS)}, got {target!r}")
    in_parquet = target == "trl" and output.suffix == ".parquet"
    check_output(output, source, parquet=in_parquet)
    names = ImageNames.between(source, output, image_root)
    store = ImageStore(names, output)
    if target == "llama-factory":
        _entries_beside(output)  # a broken one is told before anything is written
    with account_of(output) as account:
        rows = _rows(source, form, account, whole=target == "trl" and not in_parquet)
        if in_parquet:
            from fasttrain_data.formats.parquet import write_parquet

            write_parquet(rows, output, store, account, source)
        else:
            _write_json(rows, output, target, store, account, source)
    if target == "llama-factory":
        _register(output)
    if not in_parquet and (note := names.note(output)):
        account.notes.append(note)
    return account


def _rows(source: Path, form: str | None, account: Account, *, whole: bool) -> Iterator[Row]:
    """Pairs to write; where not all their columns are, without those that would mean something else then."""
    for row in read_pairs(source, form, lambda where, reason: account.drop("pairs", reason, where)):
        if not whole and (name := unread_column(row)):
            account.drop("pairs", f"holds {name}", str(row["id"]))
            continue
        yield row


def _write_json(
    rows: Iterator[Row], output: Path, target: str, store: ImageStore, account: Account, source: Path
) -> None:
    convert = _WRITERS[target]
    as_array = target in ("llama-factory", "mllm-dpo")
    with whole_file(output) as file:
        separator = "[\n" if as_array else ""
        for row in rows:
            place = Place(str(output), f"pair {row['id']}")
            converted = _held_up(row, target) or convert({**row, "images": store.named(row["images"], place)})
            if isinstance(converted, str):
                account.drop("pairs", converted, str(row["id"]))
                continue
            file.write((separator + dump_row(converted)).encode())
            separator = ",\n" if as_array else "\n"
            account.keep("pairs")
            if has_non_finite(converted):
                account.change("pairs", NON_FINITE)
        account.check_any_kept(source, "pair to export")
        file.write(b"\n]\n" if as_array else b"\n")


def _held_up(row: Row, target: str) -> str | None:
    """Why a row cannot be told in this layout: its readers take a placeholder in a text for an image, video or sound."""
    parts = (part for turn in (*row["prompt"], *row["chosen"], *row["rejected"]) for part in turn["content"])
    texts = [part["text"] for part in parts if part["type"] == "text"]
    marks = _PLACEHOLDERS[target]
    return next((f"{mark} in a text" for mark in marks if any(mark in text for text in texts)), None)


def _to_trl(row: Row) -> Row | str:
    return row


def _to_llama_factory(row: Row) -> Row | str:
    """Ranking form: an odd number of alternating turns after the system's, which stands first."""
    turns = [(turn["role"], text_of(turn)) for turn in row["prompt"]]
    spoken = [role for role, _ in turns[turns[0][0] == "system" :]]
    if spoken != [("user", "assistant")[at % 2] for at in range(len(spoken))]:
        return "turns do not alternate"
    return {
        "conversations": [{"from": _SPEAKER.get(role, role), "value": text} for role, text in turns],
        "chosen": {"from": "gpt", "value": text_of(row["chosen"][0])},
        "rejected": {"from": "gpt", "value": text_of(row["rejected"][0])},
        "images": row["images"],
        "id": row["id"],
    }


def _to_ms_swift(row: Row) -> Row | str:
    messages = [{"role": turn["role"], "content": text_of(turn)} for turn in row["prompt"]]
    messages.append({"role": "assistant", "content": text_of(row["chosen"][0])})
    converted = {"messages": messages, "rejected_response": text_of(row["rejected"][0])}
    return {**converted, **({"images": row["images"]} if row["images"] else {}), "id": row["id"]}


def _to_mllm_dpo(row: Row) -> Row | str:
    """The released file of arXiv 2402.10884; `_gpt4v` marks the chosen answer's scores there."""
    if len(row["images"]) > 1:
        return "several images"
    if len(row["prompt"]) > 1:
        return "several turns"
    text = text_of({"content": [part for part in row["prompt"][0]["content"] if part["type"] == "text"]})
    converted: dict[str, Any] = {
        "id": row["id"],
        "question": {"from": "human", "value": f"{PLACEHOLDER}\n{text}" if row["images"] else text},
        "chosen": {"from": "gpt", "value": text_of(row["chosen"][0])},
        "rejected": {"from": "gpt", "value": text_of(row["rejected"][0])},
    }
    if row["images"]:
        converted["image"] = row["images"][0]
    for side, mark in (("chosen", "gpt4v"), ("rejected", "candidate")):
        scores = row.get(f"scores_{side}") or {}
        if set(ATTRIBUTES) <= set(scores):
            converted |= {f"{name.capitalize()}_{mark}": scores[name] for name in ATTRIBUTES}
            total = scores["helpfulness"] + scores["correctness"] + scores["coherence"]
            converted[f"Sum_of_helpfulness_correctness_coherence_{mark}"] = total
    return converted


_WRITERS: dict[str, Callable[[Row], Row | str]] = {
    "trl": _to_trl,
    "llama-factory": _to_llama_factory,
    "ms-swift": _to_ms_swift,
    "mllm-dpo": _to_mllm_dpo,
}


def _register(output: Path) -> None:
    """Add the file to LLaMA-Factory's dataset_info.json beside it."""
    entries = _entries_beside(output)
    entries[output.stem] = {
        "file_name": output.name,
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {
            "messages": "conversations",
            "chosen": "chosen",
            "rejected": "rejected",
            "images": "images",
        },
    }
    write_text(_info_path(output), json.dumps(entries, indent=2) + "\n")


def _info_path(output: Path) -> Path:
    return output.with_name("dataset_info.json")


def _entries_beside(output: Path) -> dict[str, Any]:
    """What dataset_info.json holds; UserError if it is no JSON object."""
    path = _info_path(output)
    if not path.exists():
        return {}
    entries = None
    with contextlib.suppress(ValueError, RecursionError):  # not UTF-8, not JSON
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(entries, dict):
        raise UserError(f"{path}: wanted LLaMA-Factory's JSON object of data sets, got something else")
    return entries
