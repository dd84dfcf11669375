"""Reading and writing of JSON rows."""

import datetime
import errno
import gzip
import json
import math
import os
import random
from decimal import Decimal

import pytest

from fasttrain_data import jsonl
from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.formats.bring_in import import_pairs
from fasttrain_data.formats.write import export_pairs


def test_a_json_array_is_streamed_across_chunk_borders(tmp_path, monkeypatch):
    rng = random.Random(3)
    rows = [{"n": n, "text": 'ü\\"[]{},' * rng.randrange(9), "deep": [{"x": [n]}]} for n in range(57)]
    path = tmp_path / "rows.json"
    path.write_text("\ufeff " + json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for chunk in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(jsonl, "_CHUNK", chunk)
        read = list(jsonl.read_rows(path))
        assert [row for _, row in read] == rows
        assert [place for place, _ in read] == [f"row {n + 1}" for n in range(57)]


def test_json_lines_under_a_json_suffix_are_read_as_lines(tmp_path):
    path = tmp_path / "lines.json"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(jsonl.read_rows(path)) == [("line 1", {"a": 1}), ("line 3", {"a": 2})]


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (gzip.compress(b'{"a": 1}\n', mtime=0), "a gzip file: unpack it first"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "a zstd file: unpack it first"),
        (b"PK\x03\x04\x14\x00", "a zip file: unpack it first"),
        (b"PAR1\x15\x04", "a Parquet file: write it as JSON lines"),
    ],
    ids=["gzip", "zstd", "zip", "parquet"],
)
def test_a_file_of_another_kind_is_called_one(head, kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(head)
    for read in (jsonl.read_rows, jsonl.read_lines):
        with pytest.raises(UserError, match=f"wanted JSON, got {kind}"):
            next(read(path))


def test_an_array_where_lines_are_wanted_is_called_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('[\n{"a": 1}\n]\n')
    with pytest.raises(UserError, match="wanted JSON lines, one object a line, got a JSON array"):
        next(jsonl.read_lines(path))


@pytest.mark.parametrize(
    ("content", "place", "got"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2", "invalid JSON"),
        (b'{"a": 1}\n[1]\n', "line 2", "[1]"),
        (b'[{"a": 1}, {"a": ', "row 2", "invalid JSON"),
        (b'[{"a": 1}, 7 ]', "row 2", "7"),
        (b'{"a": "\xff"}\n', "line 1", "byte 0xff"),
        (b'[{"a": "\xff"}]', "row 1", "byte 0xff"),
        (b'{"a": 1}\n{"a": ' + b"3" * 5000 + b"}\n", "line 2", "invalid JSON (Exceeds the limit"),
        (b'[{"a": 1}, {"a": ' + b"3" * 5000 + b"}]", "row 2", "invalid JSON (Exceeds the limit"),
    ],
)
def test_a_bad_row_is_named_by_file_and_place(tmp_path, content, place, got):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(BadRow) as caught:
        list(jsonl.read_rows(path))
    assert caught.value.file == str(path)
    assert caught.value.place == place
    assert got in caught.value.got


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="nothing there"):
        list(jsonl.read_rows(tmp_path / "no.jsonl"))


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with pytest.raises(KeyboardInterrupt), jsonl.whole_rows(path) as write:
        write({"a": 1})
        raise KeyboardInterrupt
    assert path.read_text() == "old\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_pipe_or_a_device_is_refused_and_stays_one(tmp_path):
    """A file put in its place would end it: `-o /dev/null` made the machine's null device a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="wanted a file to write, got a device or a pipe"):
        jsonl.write_text(pipe, "text")
    with pytest.raises(UserError, match=r"--out: wanted a file, got .*pipe, a device or a pipe"):
        jsonl.check_output(pipe)
    assert pipe.is_fifo() and [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


def test_a_parquet_name_is_refused_where_json_is_written(tmp_path):
    for target in ("llama-factory", "ms-swift", "mllm-dpo"):
        with pytest.raises(UserError, match=r"--out: wanted a name for JSON, got .*; .*export --to trl"):
            export_pairs(tmp_path / "pairs.jsonl", tmp_path / "x.parquet", target)
    with pytest.raises(UserError, match="--out: wanted a name for JSON"):
        import_pairs(tmp_path / "pairs.jsonl", tmp_path / "x.parquet")


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "large" / "out.jsonl")
    for text in ("new", "newer"):
        jsonl.write_text(tmp_path / "out.jsonl", text)
        assert (tmp_path / "out.jsonl").is_symlink()
        assert (tmp_path / "large" / "out.jsonl").read_text() == text


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_names_the_file_that_was_to_be(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(code)) as synced:
        patch.setattr(os, "fsync", fail)
        jsonl.write_text(tmp_path / "out.jsonl", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as renamed:
        jsonl.write_text(tmp_path / "folder", "text")
    told = [error.value.filename for error in (synced, renamed)]
    assert told == [str(tmp_path / "out.jsonl"), str(tmp_path / "folder")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    path = tmp_path / "out.jsonl"
    (tmp_path / ".out.jsonl.4194399.tmp").write_text("half")  # beyond the largest process id
    with jsonl.whole_rows(path) as write:
        write({"a": "ü"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]
    assert path.read_text(encoding="utf-8") == '{"a": "ü"}\n'


def test_text_with_a_lone_surrogate_is_written_and_read_back(tmp_path):
    row = {"text": "good \ud83d", "ü \udfff": ["😀"]}
    with jsonl.whole_rows(tmp_path / "rows.jsonl") as write:
        write(row)
    assert "😀".encode() in (tmp_path / "rows.jsonl").read_bytes()
    jsonl.write_text(tmp_path / "row.json", json.dumps(row, ensure_ascii=False))
    for name in ("rows.jsonl", "row.json"):
        assert [read for _, read in jsonl.read_rows(tmp_path / name)] == [row]


def test_values_that_json_has_not_are_written_as_null_or_text():
    day = datetime.datetime(2026, 11, 26, 17, 5, tzinfo=datetime.UTC)
    row = {"nan": [math.nan, {"deep": -math.inf}, 1.5], "at": day, "day": day.date(), "cost": Decimal("1.50")}
    assert json.loads(jsonl.dump_row({**row, "raw": b"ab", "after": datetime.timedelta(seconds=5)})) == {
        "nan": [None, {"deep": None}, 1.5],
        "at": "2026-11-26T17:05:00+00:00",
        "day": "2026-11-26",
        "cost": "1.50",
        "raw": {"base64": "YWI="},
        "after": "0:00:05",
    }
    assert jsonl.has_non_finite(row) and not jsonl.has_non_finite({"n": [1.5, "NaN"]})
