"""What import and export carry over: names under which images are found again, and what JSON or UTF-8 cannot hold."""

import json

import pytest

from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.formats.bring_in import import_pairs
from fasttrain_data.formats.write import TARGETS, export_pairs

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc000000301"
    "0100c9fe92ef0000000049454e44ae426082"
)
PAIR = {"prompt": "Why?", "chosen": "good", "rejected": "bad"}
RLAIF_V = {"question": "Why?", "chosen": "good", "rejected": "bad", "idx": 7}
EMBEDDED = RLAIF_V | {"image": {"bytes": PNG, "path": "0.png"}, "image_path": None}
NAMED = RLAIF_V | {"image": None, "image_path": "a.png"}


def test_names_are_rewritten_when_the_output_stands_elsewhere(tmp_path, write_rows, read_rows):
    path = write_rows(tmp_path / "in" / "pairs.jsonl", [PAIR | {"image": "a.png"}])
    export_pairs(path, tmp_path / "out.jsonl", "trl")
    assert read_rows(tmp_path / "out.jsonl")[0]["images"] == ["in/a.png"]
    account = export_pairs(path, tmp_path / "other" / "out.jsonl", "trl")
    assert read_rows(tmp_path / "other" / "out.jsonl")[0]["images"] == ["a.png"]
    assert "--image-root" in account.notes[0]


@pytest.mark.parametrize("out", ["p.jsonl", "in/p.jsonl", "in/below/p.jsonl", "other/p.jsonl"])
def test_embedded_images_are_found_from_the_output_and_no_root_is_asked_for(out, tmp_path, read_rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist([EMBEDDED]), tmp_path / "in" / "x.parquet")
    account = import_pairs(tmp_path / "in" / "x.parquet", tmp_path / out)
    [row] = read_rows(tmp_path / out)
    assert ((tmp_path / out).parent / row["images"][0]).read_bytes() == PNG
    assert account.notes == []


@pytest.mark.parametrize("rows", [[EMBEDDED, NAMED], [NAMED, EMBEDDED]])
def test_embedded_and_named_images_of_one_output_start_from_one_root(rows, tmp_path, read_rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), source)
    (tmp_path / "in" / "a.png").write_bytes(PNG)
    for out in ("p.jsonl", "in/p.jsonl"):
        assert import_pairs(source, tmp_path / out).notes == []
        for row in read_rows(tmp_path / out):
            assert ((tmp_path / out).parent / row["images"][0]).read_bytes() == PNG
    for out in ("in/below/p.jsonl", "other/p.jsonl"):
        with pytest.raises(BadRow, match=f"or an --out in {tmp_path / 'in'}, got both"):
            import_pairs(source, tmp_path / out)
        assert not (tmp_path / out).exists()


def test_text_only_data_gets_no_note(tmp_path, write_rows):
    path = write_rows(tmp_path / "in" / "pairs.jsonl", [PAIR])
    assert export_pairs(path, tmp_path / "other" / "out.jsonl", "trl").notes == []
    assert import_pairs(path, tmp_path / "other" / "back.jsonl").notes == []


def test_columns_that_json_has_not_come_through_and_are_told(tmp_path, read_rows):
    import datetime
    from decimal import Decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    day = datetime.datetime(2024, 1, 2, 3, 4)
    rows = [
        PAIR | {"at": day, "cost": Decimal("1.5"), "margin": margin}
        for margin in (2.0, float("nan"), float("inf"))
    ]
    table = pa.Table.from_pylist(rows).append_column("never", pa.array([2**62] * 3, pa.timestamp("ms")))
    pq.write_table(table, tmp_path / "x.parquet")
    account = import_pairs(tmp_path / "x.parquet", tmp_path / "p.jsonl")
    made = read_rows(tmp_path / "p.jsonl")
    assert [(row["at"], row["cost"], row["margin"]) for row in made] == [
        ("2024-01-02T03:04:00", "1.5", margin) for margin in (2.0, None, None)
    ]
    assert account.changed == {"x.parquet": {"NaN or infinity written as null": 2}}
    account = export_pairs(tmp_path / "x.parquet", tmp_path / "t.jsonl", "trl")
    assert account.changed == {"pairs": {"NaN or infinity written as null": 2}}
    assert read_rows(tmp_path / "t.jsonl") == made


def test_half_a_character_survives_json_and_is_named_where_it_cannot(tmp_path, read_rows):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"id": "p", **PAIR, "chosen": "x \ud83d"}) + "\n")
    import_pairs(path, tmp_path / "p.jsonl")
    assert read_rows(tmp_path / "p.jsonl")[0]["chosen"][0]["content"][0]["text"] == "x \ud83d"
    with pytest.raises(UserError, match="pair p: row: wanted valid Unicode, got a lone surrogate"):
        export_pairs(path, tmp_path / "t.parquet", "trl")
    path.write_text(json.dumps(PAIR | {"image": "\ud83d.png"}))
    with pytest.raises(BadRow, match="images: wanted an image path"):
        import_pairs(path, tmp_path / "other" / "p.jsonl")


@pytest.mark.parametrize("target", [*TARGETS, "parquet"])
def test_an_export_of_nothing_leaves_the_earlier_one_and_says_why(tmp_path, write_rows, target):
    row = {"context": [{"role": "user", "content": "why?"}], "response1": "yes", "response2": "no"}
    good = write_rows(tmp_path / "good.jsonl", [{**row, "overall_preference": -2}])
    tied = write_rows(tmp_path / "tied.jsonl", [{**row, "overall_preference": 0}] * 2)
    output = tmp_path / ("out.parquet" if target == "parquet" else "out.json")
    form = "trl" if target == "parquet" else target
    export_pairs(good, output, form)
    before = output.read_bytes()
    with pytest.raises(UserError, match=r"got none \(2 tie\)"):
        export_pairs(tied, output, form)
    assert output.read_bytes() == before
