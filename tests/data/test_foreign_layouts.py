"""Pair files in other projects' layouts go into training as they are; what holds no pair is listed."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fasttrain.config import DataConfig
from fasttrain.data.pairs import check_images, read_pair
from fasttrain.data.prepare import prepare
from fasttrain.data.sources import open_source
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.errors import UserError
from fasttrain.files import HashMemo


def sharegpt(question: str, chosen: str, rejected: str) -> dict[str, object]:
    turn = {"from": "human", "value": question}
    return {
        "conversations": [turn],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }


def test_llama_factory_rankings_are_read_as_pairs(tmp_path: Path) -> None:
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps([sharegpt("Why?", "Because.", "No."), sharegpt("How?", "So.", "Not so.")]))
    source = open_source(path)
    pairs = [read_pair(source.row(number), source.where(number), tmp_path) for number in range(len(source))]
    assert [(p.messages[0][1][0][1], p.chosen, p.rejected) for p in pairs] == [
        ("Why?", "Because.", "No."),
        ("How?", "So.", "Not so."),
    ]


@pytest.mark.parametrize("layout", ["json", "jsonl", "helpsteer"])
def test_bad_rows_of_a_foreign_file_stop_or_are_listed_as_ours_are(
    layout: str, tmp_path: Path, tiny_models: ModuleType
) -> None:
    rows: list[object] = [
        sharegpt("Why?", "Because.", "No."),
        sharegpt("How?", "So.", ""),
        sharegpt("Who?", "I.", "You."),
    ]
    bad = "rejected: wanted"
    if layout == "helpsteer":
        scores = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 4)
        rows = [
            {"prompt": "Why?", "response": f"{n}", **scores, "helpfulness": n, "correctness": n}
            for n in (0, 7, 4)
        ]
        bad = "helpfulness: wanted"
    path = tmp_path / f"ranking.{'json' if layout == 'json' else 'jsonl'}"
    path.write_text(json.dumps(rows) if layout == "json" else "\n".join(map(json.dumps, rows)) + "\nnot json")
    tokenizer = tiny_models.build_tokenizer(tiny_models.CHATML, eos="<|im_end|>")
    chat, memo = ChatTokenizer(tokenizer, [tokenizer.eos_token_id]), HashMemo(tmp_path / "hashes.sqlite")
    place = "row" if layout == "json" else "line"
    with pytest.raises(UserError, match=rf"ranking\.jsonl? {place} 2: {bad}"):
        prepare(str(path), DataConfig(train=str(path)), chat, memo, seed=0)
    data = prepare(str(path), DataConfig(train=str(path), on_bad_row="skip"), chat, memo, seed=0)
    memo.close()
    assert data.account.pairs == (1 if layout == "helpsteer" else 2)
    told = [(line["where"], line["reason"].partition(", got")[0]) for line in data.skipped_lines()]
    assert told[0][0] == f"{path} {place} 2" and told[0][1].startswith(bad)
    assert told[1:] == ([] if layout == "json" else [(f"{path} line 4", "row: wanted a JSON object")])


def test_a_json_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{**TRL, "id": str(n)} for n in range(20_000)]))
    monkeypatch.setattr(Path, "read_text", lambda *given, **named: pytest.fail("read whole"))
    source = open_source(path)
    assert len(source) == 20_000 and source.row(19_999)["id"] == "19999"


def test_the_real_demo_file_gives_all_its_pairs(shared_data: Path) -> None:
    source = open_source(shared_data / "llamafactory_demo" / "dpo_en_demo_first150.json")
    assert len(source) == 150 and source.passed_over == []


TRL = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "Because."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
LAYOUTS = {
    "llama-factory": sharegpt("Why?", "Because.", "No."),
    "mllm-dpo": {
        "question": "{'from': 'human', 'value': 'Why?'}",
        "chosen": [{"from": "gpt", "value": "Because."}],
        "rejected": [{"from": "gpt", "value": "No."}],
    },
    "ms-swift": {
        "messages": [*TRL["prompt"], *TRL["chosen"]],
        "rejected_response": "No.",
    },
    "rlaif-v": {"question": "Why?", "chosen": "Because.", "rejected": "No."},
    "ultrafeedback": {
        "prompt": "Why?",
        "chosen": [*TRL["prompt"], *TRL["chosen"]],
        "rejected": [*TRL["prompt"], *TRL["rejected"]],
        "chosen-rating": 5.0,
        "rejected-rating": 1.0,
    },
    "llava-next": {"prompt": "Why?", "answer": "Because!", "chosen": "Because.", "rejected": "No."},
    "trl with other columns": {**TRL, "question": "Who?", "completions": [], "messages": [], "answer": "x"},
    "trl, implicit, with other columns": {
        "question": "Who?",
        "chosen": [*TRL["prompt"], *TRL["chosen"]],
        "rejected": [*TRL["prompt"], *TRL["rejected"]],
    },
    "short, with other columns": {
        "prompt": "Why?", "chosen": "Because.", "rejected": "No.", "question": "Who?", "completions": [],
    },
}  # fmt: skip


def save_to_disk(rows: list[dict[str, object]], folder: Path) -> None:
    """A datasets folder as `Dataset.save_to_disk` lays it out."""
    folder.mkdir()
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "folder"])
def test_every_layout_means_the_same_pair(layout: str, form: str, tmp_path: Path) -> None:
    path, row = tmp_path / f"rows.{form}", LAYOUTS[layout]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif form == "folder":
        save_to_disk([row], path)
    else:
        path.write_text(json.dumps([row]) if form == "json" else json.dumps(row))
    source = open_source(path)
    pair = read_pair(source.row(0), source.where(0), tmp_path)
    assert (pair.messages, pair.chosen, pair.rejected) == (
        (("user", (("text", "Why?"),)),),
        "Because.",
        "No.",
    )
    assert len(source) == 1 and source.passed_over == []


def test_a_folder_of_parquet_files_is_answered_with_their_names(tmp_path: Path) -> None:
    """They may be of several splits."""
    (tmp_path / "data").mkdir()
    for split in ("test", "train"):
        pq.write_table(pa.Table.from_pylist([{"prompt": "p"}]), tmp_path / "data" / f"{split}-0.parquet")
    with pytest.raises(
        UserError, match=r"got 2 Parquet files; name those of a split in a list, as \[.*test-0"
    ):
        open_source(tmp_path)


def test_the_line_of_a_row_in_our_own_layout_is_not_lost_to_its_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(LAYOUTS["trl with other columns"]))
    assert open_source(path).where(0) == f"{path} line 2"


def test_the_first_readable_row_tells_the_layout(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("nope\n" + json.dumps(LAYOUTS["mllm-dpo"]))
    source = open_source(path)
    assert (len(source), [error.where for error in source.bad]) == (1, [f"{path} line 1"])
    path.write_text("nope\n" + json.dumps(TRL))
    assert open_source(path).row(1) == TRL


def test_rows_without_a_preference_are_listed_as_skipped_and_pairs_counted_as_pairs(tmp_path: Path) -> None:
    tie = {**LAYOUTS["ultrafeedback"], "rejected-rating": 5.0}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [LAYOUTS["ultrafeedback"], tie, LAYOUTS["ultrafeedback"]])))
    source = open_source(path)
    assert source.passed_over == [(f"{path} line 2", "tie")]
    assert [source.where(number) for number in range(len(source))] == [f"{path} pair 1", f"{path} pair 2"]
    path.write_text(json.dumps(tie))
    with pytest.raises(UserError, match=r"rows\.jsonl: wanted at least one pair, got none \(tie\)"):
        open_source(path)


def test_embedded_images_of_a_foreign_layout_arrive_as_bytes(tmp_path: Path, tiny_models: ModuleType) -> None:
    content = tiny_models.draw_image(tmp_path / "drawn.png", seed=1).read_bytes()
    row = {**LAYOUTS["rlaif-v"], "image": {"bytes": content, "path": "x.jpg"}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    source = open_source(tmp_path / "rows.parquet")
    pair = read_pair(source.row(0), source.where(0), tmp_path)
    assert [ref.content for ref in pair.images] == [content]
    check_images(pair)


def test_rows_of_a_foreign_datasets_folder_are_placed_in_it_and_their_images_start_there(
    tmp_path: Path, tiny_models: ModuleType
) -> None:
    folder, row = tmp_path / "rlaif", {**LAYOUTS["rlaif-v"], "image": "drawn.png"}
    save_to_disk([row, {**row, "chosen": ""}], folder)
    content = tiny_models.draw_image(folder / "drawn.png", seed=1).read_bytes()
    source = open_source(folder)
    pair = read_pair(source.row(0), source.where(0), source.folder)
    assert [ref.read() for ref in pair.images] == [content]
    assert [error.where for error in source.bad] == [f"{folder} row 2"]


def test_a_datasets_folder_saved_from_a_foreign_layout_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([LAYOUTS["rlaif-v"]] * 3).save_to_disk(tmp_path / "set")
    assert [row["chosen"][0]["role"] for row in open_source(tmp_path / "set").rows(0, 3)] == ["assistant"] * 3


def test_columns_of_a_foreign_parquet_that_json_has_not_are_read_over(tmp_path: Path) -> None:
    row = {**LAYOUTS["rlaif-v"], "image": None, "image_path": None}
    table = pa.Table.from_pylist([row, row])
    for name, column in (
        ("at", pa.array([1, 2], pa.timestamp("us"))),
        ("beyond", pa.array([0, 2**62], pa.timestamp("ms"))),
        ("cost", pa.array([1, 2], pa.decimal128(5, 2))),
    ):
        table = table.append_column(name, column)
    pq.write_table(table, tmp_path / "rows.parquet")
    source = open_source(tmp_path / "rows.parquet")
    rows = [source.row(number) for number in range(len(source))]
    assert [(row["cost"], row["at"]) for row in rows] == [
        ("1.00", "1970-01-01 00:00:00.000001"),
        ("2.00", "1970-01-01 00:00:00.000002"),
    ]
    assert [read_pair(row, "x", tmp_path).chosen for row in rows] == [row["chosen"]] * 2


def test_alpaca_rankings_are_read_as_llama_factory_reads_them(tmp_path: Path) -> None:
    row = {
        "instruction": "Translate.",
        "input": "Hund",
        "system": "Be short.",
        "history": [["Hello?", "Hi."]],
        "chosen": "dog",
        "rejected": "cat",
    }
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps([row]))
    source = open_source(path)
    pair = read_pair(source.row(0), source.where(0), tmp_path)
    assert [(role, parts[0][1]) for role, parts in pair.messages] == [
        ("system", "Be short."),
        ("user", "Hello?"),
        ("assistant", "Hi."),
        ("user", "Translate.\nHund"),
    ]
    assert (pair.chosen, pair.rejected) == ("dog", "cat")


def test_ms_swift_boxes_that_it_would_write_into_the_text_are_refused(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Where is <ref-object>?"}, {"role": "assistant", "content": "<bbox>"}]
    row = {
        "messages": said,
        "rejected_response": "No.",
        "objects": {"ref": ["a dog"], "bbox": [[1, 2, 3, 4]]},
    }
    path = tmp_path / "boxes.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match="objects: wanted names and boxes written out"):
        open_source(path)


@pytest.mark.parametrize("layout", ["ours", "ms-swift"])
def test_images_may_be_data_urls(layout: str, tmp_path: Path, tiny_models: ModuleType) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(buffer, "PNG")
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    row: dict[str, object] = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    if layout == "ms-swift":
        row = {"messages": said, "rejected_response": "No."}
    row["images"] = ["data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()]
    path = tmp_path / "inline.jsonl"
    path.write_text(json.dumps(row))
    source = open_source(path)
    pair = read_pair(source.row(0), source.where(0), tmp_path)
    check_images(pair)
    assert [ref.content for ref in pair.images] == [buffer.getvalue()]
    row["images"] = ["data:image/png,red"]
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match="images: wanted a data URL with base64"):
        source = open_source(path)
        read_pair(source.row(0), source.where(0), tmp_path)
