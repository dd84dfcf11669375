"""Other projects' preference files as our pairs, or (where every answer has scores) as our annotations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fasttrain_data.account import Account, account_of
from fasttrain_data.errors import UserError
from fasttrain_data.formats.detect import detect_format
from fasttrain_data.formats.image_store import ImageStore
from fasttrain_data.formats.messages import Place, text_of
from fasttrain_data.formats.read import read_pairs
from fasttrain_data.formats.scored import helpsteer_annotations
from fasttrain_data.formats.table_rows import iterate_rows
from fasttrain_data.ids import content_hash
from fasttrain_data.image_files import ImageNames
from fasttrain_data.jsonl import NON_FINITE, Row, check_output, has_non_finite, whole_rows
from fasttrain_data.records import ATTRIBUTES


def import_pairs(
    source: Path,
    output: Path,
    *,
    form: str | None = None,
    into: Literal["pairs", "annotations"] = "pairs",
    image_root: Path | None = None,
    split: str | None = None,
) -> Account:
    """Write pairs.jsonl (TRL vision rows) or annotations.jsonl from a preference file, or a split of a folder.

    Embedded images are written to a folder beside the output. Annotations come from HelpSteer (all answers of a
    prompt) and mllm-dpo (the two of a pair); other layouts hold no five scores.
    """
    check_output(output, source)
    names = ImageNames.between(source / "-" if source.is_dir() else source, output, image_root)
    store = ImageStore(names, output)
    with account_of(output) as account, whole_rows(output) as write:
        if into == "annotations":
            rows = _annotations(source, form or detect_format(source, split), split, store)
        else:
            rows = _pairs(source, form, split, store, account)
        for row in rows:
            write(row)
            account.keep(source.name)
            if has_non_finite(row):
                account.change(source.name, NON_FINITE)
        account.check_any_kept(source, "row to import")
    if note := names.note(output):
        account.notes.append(note)
    return account


def _pairs(
    source: Path, form: str | None, split: str | None, store: ImageStore, account: Account
) -> Iterator[Row]:
    def skipped(where: str, reason: str) -> None:
        account.drop(source.name, reason, where)

    for row in read_pairs(source, form, skipped, split=split):
        place = Place(str(source), f"pair {row['id']}")
        yield {**row, "images": store.named(row["images"], place)}


def _annotations(source: Path, form: str | None, split: str | None, store: ImageStore) -> Iterator[Row]:
    if form == "helpsteer":
        yield from helpsteer_annotations(iterate_rows(source, split=split))
        return
    if form != "mllm-dpo":
        raise UserError(f"{source}: wanted helpsteer or mllm-dpo for --into annotations, got {form}")
    for row in read_pairs(source, form, split=split):
        place = Place(str(source), f"pair {row['id']}")
        prompt = [part for part in row["prompt"][0]["content"] if part["type"] == "text"]
        question = text_of({"content": prompt})
        images = store.named(row["images"], place)
        completions = []
        for side, mark in (("chosen", "gpt4v"), ("rejected", "candidate")):
            text = text_of(row[side][0])
            scores = {name: row.get(f"{name.capitalize()}_{mark}") for name in ATTRIBUTES}
            if None in scores.values():
                raise place.bad(f"Helpfulness_{mark}", "five scores", scores)
            completions.append({"id": content_hash(images, question, text), "text": text, **scores})
        yield {
            "id": row["id"],
            "question_id": content_hash(images, question),
            "images": images,
            "question": question,
            "completions": completions,
            "status": "ok",
            "model": "imported (mllm-dpo)",
        }
