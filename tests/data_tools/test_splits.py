"""A downloaded data set's folder holds train and test side by side: importing reads one split, named if there are several."""

import json

import pytest

from fasttrain_data.errors import UserError
from fasttrain_data.formats.bring_in import import_pairs


def write(file, *questions):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": question, "chosen": "Yes.", "rejected": "No."} for question in questions]
    pq.write_table(pa.Table.from_pylist(rows), file)


def imported(folder, output, split=None):
    import_pairs(folder, output, split=split)
    return [
        row["prompt"][0]["content"][0]["text"] for row in map(json.loads, output.read_text().splitlines())
    ]


@pytest.mark.parametrize(
    ("names", "split", "told"),
    [
        (["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"], "train", "test (1), train (2)"),
        (["train_prefs-00000-of-00001", "train_sft-00000-of-00001"], "train_prefs", "train_prefs (1), train_sft (1)"),
        (["helpful/train/0", "helpful/Dev/0"], "validation", "validation (1), train (1)"),
        (["0_evaluation", "my training.2024", "more"], "test", "test (1), train (1)"),
    ],
)  # fmt: skip
def test_of_several_splits_one_is_read(tmp_path, names, split, told):
    for name in names:
        write(tmp_path / "set" / f"{name}.parquet", name)
    with pytest.raises(UserError, match="one split") as error:
        import_pairs(tmp_path / "set", tmp_path / "pairs.jsonl")
    assert str(error.value).endswith(f"(--split), got {told}")
    wanted = {"train": names[:2], "train_prefs": names[:1], "validation": names[1:], "test": names[:1]}
    assert imported(tmp_path / "set", tmp_path / "pairs.jsonl", split) == wanted[split]


@pytest.mark.parametrize("names", [["a", "b"], ["train", "RLAIF-V_003"], ["contest", "latest", "devices"]])
def test_names_of_one_split_or_none_are_read_together(tmp_path, names):
    for name in names:
        write(tmp_path / "set" / f"{name}.parquet", name)
    assert set(imported(tmp_path / "set", tmp_path / "pairs.jsonl")) == set(names)


def test_a_split_that_is_not_there_and_one_of_a_file_are_told(tmp_path):
    write(tmp_path / "set" / "train.parquet", "q")
    with pytest.raises(UserError, match=r"of the split dev \(--split\), got train \(1\)"):
        import_pairs(tmp_path / "set", tmp_path / "pairs.jsonl", split="dev")
    with pytest.raises(UserError, match=r"--split: wanted a folder of several splits, got .*train\.parquet"):
        import_pairs(tmp_path / "set" / "train.parquet", tmp_path / "pairs.jsonl", split="train")


def test_a_split_of_a_folder_that_save_to_disk_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {name: datasets.Dataset.from_list([{"prompt": name, "chosen": "Yes.", "rejected": "No."}]) for name in ("train", "test")}  # fmt: skip
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "set")
    assert imported(tmp_path / "set", tmp_path / "pairs.jsonl", "test") == ["test"]
