"""Pair files: rows fetched by number whatever the file's form, and the right line named when one is broken."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fasttrain.data import json_lines
from fasttrain.data.bad_row import BadRow
from fasttrain.data.groups import PairFiles
from fasttrain.data.json_lines import JsonLines
from fasttrain.data.sources import ArrowRows, open_source
from fasttrain.errors import UserError

ROWS = [{"prompt": f"q{n}", "chosen": "größer", "rejected": "b", "score": n} for n in range(5)]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def save_to_disk(table: pa.Table, folder: Path) -> Path:
    """A datasets folder as `Dataset.save_to_disk` lays it out, in two Arrow files."""
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 2), table.slice(2)), strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as writer:
            writer.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def as_jsonl(folder: Path) -> Path:
    return write(folder / "p.jsonl", b"\n".join(LINES))


def as_windows_jsonl(folder: Path) -> Path:
    return write(folder / "p.jsonl", b"\xef\xbb\xbf" + b"\r\n\r\n".join(LINES) + b"\r\n  \r\n")


def as_array(folder: Path) -> Path:
    return write(folder / "p.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=2).encode())


def as_json_lines_named_json(folder: Path) -> Path:
    return write(folder / "p.json", b"\n".join(LINES))


def as_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "p.parquet", row_group_size=2)
    return folder / "p.parquet"


def as_datasets(folder: Path) -> Path:
    return save_to_disk(pa.Table.from_pylist(ROWS), folder / "set")


FORMS = [as_jsonl, as_windows_jsonl, as_array, as_json_lines_named_json, as_parquet, as_datasets]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_by_number(form: Any, tmp_path: Path) -> None:
    path = form(tmp_path)
    source = open_source(path)
    assert [source.row(number) for number in (4, 0, 2, 1, 3)] == [ROWS[n] for n in (4, 0, 2, 1, 3)]
    assert len(source) == 5 and source.folder == (path if path.is_dir() else tmp_path)
    assert not [
        part for part in tmp_path.iterdir() if part != path
    ]  # nothing is left beside the user's files


@pytest.mark.parametrize(
    ("form", "place"),
    [(as_jsonl, "line 4"), (as_windows_jsonl, "line 7"), (as_array, "row 4"), (as_parquet, "row 4"), (as_datasets, "row 4")],
)  # fmt: skip
def test_a_row_is_placed_as_an_editor_or_a_table_counts(form: Any, place: str, tmp_path: Path) -> None:
    path = form(tmp_path)
    assert open_source(path).where(3) == f"{path} {place}"


def test_capital_suffixes_are_known(tmp_path: Path) -> None:
    assert open_source(write(tmp_path / "P.JSONL", LINES[0])).row(0) == ROWS[0]


def test_datasets_saves_what_we_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    source = open_source(tmp_path / "set")
    assert [source.row(number) for number in range(len(source))] == ROWS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"nope", "row: wanted a JSON object, got invalid JSON (Expecting value)"),
        (b'{"a": 1} {"b": 2}', "row: wanted a JSON object, got invalid JSON (Extra data)"),
        (b"[1, 2]", "row: wanted a JSON object, got [1, 2]"),
        (b'"text"', "row: wanted a JSON object, got text"),
        (b'{"a": "\xe9"}', "row: wanted UTF-8, got byte 0xe9"),
        (b'{"a": ' + 5000 * b"1" + b"}", "row: wanted a JSON object, got invalid JSON (Exceeds the limit"),
        (100_000 * b"[", "row: wanted a JSON object, got JSON nested too deeply"),
    ],
)
def test_a_broken_line_is_named_with_its_number_and_the_others_still_read(
    line: bytes, said: str, tmp_path: Path
) -> None:
    source = open_source(write(tmp_path / "p.jsonl", b"\n".join([LINES[0], b"", line, LINES[1]])))
    assert (source.row(0), source.row(2)) == (ROWS[0], ROWS[1])
    with pytest.raises(BadRow) as caught:
        source.row(1)
    assert str(caught.value).startswith(f"{tmp_path / 'p.jsonl'} line 3: {said}")


def test_an_element_of_an_array_that_is_no_object_is_named(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "p.json", b'[{"a": 1}, 2]'))
    with pytest.raises(BadRow, match=r"p\.json row 2: row: wanted a JSON object, got 2"):
        source.row(1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", b"", "wanted at least one row, got none"),
        ("p.jsonl", b"\n\n \n", "wanted at least one row, got none"),
        ("p.json", b"[]", "wanted at least one row, got none"),
        ("p.json", b'[{"a": 1},\n {"a" 2}]', "line 2: wanted a JSON array, got invalid JSON (Expecting ':'"),
        ("p.json", b'[{"a": 1}] x', "line 1: wanted a JSON array, got invalid JSON (Extra data)"),
        ("p.json", b'[{"a": "\xe9"}]', "wanted UTF-8, got byte 0xe9 at 8"),
        (
            "p.json",
            b'[{"a": ' + 5000 * b"1" + b"}]",
            "wanted a JSON array, got invalid JSON (Exceeds the limit",
        ),
        ("p.json", 100_000 * b"[", "wanted a JSON array, got JSON nested too deeply"),
        ("p.parquet", b"", "wanted a Parquet file, got Parquet file size is 0 bytes"),
        ("p.parquet", b"PAR1 this is none PAR1", "wanted a Parquet file, got "),
        ("p.txt", b"{}", "wanted .jsonl, .json, .parquet or a datasets folder, got .txt"),
        ("pairs", b"{}", "wanted .jsonl, .json, .parquet or a datasets folder, got no suffix"),
    ],
)
def test_a_file_that_is_no_pair_file_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_source(write(tmp_path / name, content))
    assert str(caught.value).startswith(str(tmp_path / name)) and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: .* got nothing there"):
        open_source(tmp_path / "none.jsonl")


def test_a_missing_file_says_where_relative_paths_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"relative paths start at the working directory, {tmp_path}\)"):
        open_source(Path("none.jsonl"))


def test_parquet_without_rows_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="wanted at least one row, got none"):
        open_source(tmp_path / "p.parquet")


def test_damaged_parquet_is_always_the_users_one_line(tmp_path: Path) -> None:
    whole = as_parquet(tmp_path).read_bytes()
    for position in range(4, len(whole) - 8, 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        try:
            source = open_source(write(tmp_path / "d.parquet", bytes(damaged)))
            for number in range(len(source)):
                source.row(number)
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / 'd.parquet'}") and "\n" not in str(error)


def test_text_in_parquet_that_is_no_utf8_is_a_bad_row(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"chosen": column}), tmp_path / "p.parquet")
    source = open_source(tmp_path / "p.parquet")
    assert source.row(0) == {"chosen": "a"}
    with pytest.raises(BadRow, match="row 2: row: wanted values that Python can hold"):
        source.row(1)


def test_a_dictionary_column_reads_as_its_values(tmp_path: Path) -> None:
    values = [f"kind {n % 150}" for n in range(300)]
    table = pa.table({"prompt": values, "kind": pa.array(values).dictionary_encode()})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=70)
    source = open_source(tmp_path / "p.parquet")
    assert [source.row(number)["kind"] for number in range(300)] == values


class CountedBatch:
    """A record batch that counts how often it is asked for anything."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch, self.num_rows, self.asked = batch, batch.num_rows, 0

    def slice(self, start: int, length: int) -> pa.RecordBatch:
        self.asked += 1
        return self.batch.slice(start, length)


def test_a_row_of_a_large_table_asks_one_batch_alone() -> None:
    # Slicing the whole table would walk all its batches for every row: minutes for a million rows.
    whole = pa.table({"n": list(range(100))}).to_batches(max_chunksize=7)
    batches = [CountedBatch(batch) for batch in whole]

    class Table:
        def to_batches(self) -> list[CountedBatch]:
            return batches

    rows = ArrowRows(Table(), Path(), "p.parquet")
    assert [rows.row(number)["n"] for number in range(100)] == list(range(100))
    assert [batch.asked for batch in batches] == [batch.num_rows for batch in batches]


@pytest.mark.parametrize("state", ["", "{}", '{"_data_files": 3}', '{"_data_files": [{}]}', "[]"])
def test_a_folder_that_datasets_did_not_write_is_named(state: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match="wanted a folder written by datasets' save_to_disk"):
        open_source(tmp_path)


def test_a_folder_of_splits_names_one_to_take(tmp_path: Path) -> None:
    save_to_disk(pa.Table.from_pylist(ROWS), tmp_path / "test")
    save_to_disk(pa.Table.from_pylist(ROWS), tmp_path / "train")
    (tmp_path / "dataset_dict.json").write_text("broken")
    with pytest.raises(
        UserError, match=f"wanted one split of this datasets folder, for example {tmp_path}/test"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other schema", "no files", "no rows"])
def test_a_damaged_datasets_folder_is_named(damage: str, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    folder = save_to_disk(table.slice(0, 0) if damage == "no rows" else table, tmp_path / "set")
    second = folder / "data-00001-of-00002.arrow"
    if damage == "missing":
        second.unlink()
    elif damage == "truncated":
        second.write_bytes(second.read_bytes()[:100])
    elif damage == "other schema":
        other = save_to_disk(pa.table({"x": [1, 2, 3]}), tmp_path / "other")
        second.write_bytes((other / second.name).read_bytes())
    elif damage == "no files":
        (folder / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(UserError) as caught:
        open_source(folder)
    assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)


def test_several_files_count_on_and_keep_their_own_image_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    paths = [as_jsonl(tmp_path / "one"), as_parquet(tmp_path / "two")]
    files = PairFiles([str(path) for path in paths], None)
    assert len(files) == 10 and list(files) == list(range(10))
    assert [files.pair(number).messages[0][1][0][1] for number in (0, 4, 5, 9)] == ["q0", "q4", "q0", "q4"]
    assert (files.where(4), files.where(5)) == (f"{paths[0]} line 5", f"{paths[1]} row 1")
    assert files.roots == [tmp_path / "one", tmp_path / "two"]


def test_image_root_must_be_a_folder_and_may_start_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir()
    as_jsonl(tmp_path)
    assert PairFiles(["~/p.jsonl"], "~/pictures").roots == [tmp_path / "pictures"]
    with pytest.raises(UserError, match=r"data\.image_root: wanted an existing folder"):
        PairFiles(["~/p.jsonl"], "~/none")


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    """An editor or a shell's > cuts a file before it writes it: the system ended the process at the next row (SIGBUS)."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "p"}\n' * 2000)
    lines = JsonLines(path)
    begun = lines.rows(0, 2000)
    next(begun)
    path.write_text('{"prompt": "p"}\n')
    said = "pairs.jsonl: wanted the 32,000 bytes that were there at the start, got a file cut to 16"
    for read in (lambda: lines.row(1999), lambda: next(lines.rows(5, 9)), lambda: list(begun)):
        with pytest.raises(UserError, match=said):
            read()


def test_a_first_row_of_no_known_layout_still_gets_its_line(tmp_path: Path) -> None:
    files = PairFiles(
        [str(write(tmp_path / "p.jsonl", b'{"chosen": "a", "prompt": "q"}\n' + LINES[0]))], None
    )
    with pytest.raises(BadRow, match=r"p\.jsonl line 1: rejected: wanted an answer, got nothing"):
        files.pair(0)
    assert files.pair(1).chosen == "größer"


def test_columns_that_no_pair_needs_never_make_a_row_bad(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["Why?", "How?"],
            "chosen": ["a", "a"],
            "rejected": ["b", "b"],
            "at": pa.array([1, 2], pa.timestamp("us")),
            "beyond": pa.array([0, 2**62], pa.timestamp("ms")),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    source = open_source(tmp_path / "p.parquet")
    assert [source.row(number)["chosen"] for number in range(2)] == ["a", "a"]
    rows = [row for row in source.rows(0, 2) if isinstance(row, dict)]
    assert [row["prompt"] for row in rows] == ["Why?", "How?"]
    assert ["beyond" in row for row in rows] == [True, False]


@pytest.mark.parametrize("piece", [1, 3, 64])
def test_lines_that_are_not_blank_are_found_wherever_pieces_of_the_file_end(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "_PIECE", piece)
    draw = random.Random(piece)
    for _ in range(200):
        content = bytes(draw.choices(b"\n\n \t\r\x0b\x0c{}a\xff\x85", k=draw.randint(1, 60)))
        with write(tmp_path / "p.jsonl", content).open("rb") as file:
            lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
        found = JsonLines(tmp_path / "p.jsonl")
        assert list(found._lines) == [number for number, _ in lines], content
        assert [content[start:].split(b"\n")[0] for start in found._offsets] == [
            line.rstrip(b"\n") for _, line in lines
        ]
