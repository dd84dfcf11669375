"""A folder that datasets' save_to_disk wrote is one of the files that other projects' layouts come in."""

import json

import pytest

from fasttrain_data.errors import UserError
from fasttrain_data.formats import detect_format
from fasttrain_data.formats.bring_in import import_pairs


@pytest.fixture
def folder(tmp_path):
    import pyarrow as pa

    rows = [{"question": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(150)]
    (tmp_path / "set").mkdir()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(tmp_path / "set" / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "set" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return tmp_path / "set"


def test_a_datasets_folder_is_imported(folder, tmp_path):
    assert detect_format(folder) == "rlaif-v"
    assert import_pairs(folder, tmp_path / "pairs.jsonl").total_kept() == 150


def test_a_folder_of_splits_and_one_without_any_rows_are_told(folder, tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match=f"wanted one split of this datasets folder, for example {folder}"):
        import_pairs(tmp_path, tmp_path / "pairs.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: wanted a folder with Parquet files or written by datasets"):
        import_pairs(tmp_path / "empty", tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("state", ['{"_data_files": [{"filename": "%s"}]}', "[" * 100_000])
def test_a_state_that_leads_out_of_the_folder_or_nests_without_end_is_one_line(folder, tmp_path, state):
    (folder / "data.arrow").rename(tmp_path / "other.arrow")
    for name in ("../other.arrow", str(tmp_path / "other.arrow")):
        (folder / "state.json").write_text(state.replace("%s", name))
        with pytest.raises(UserError, match=r"state\.json"):
            import_pairs(folder, tmp_path / "pairs.jsonl")
