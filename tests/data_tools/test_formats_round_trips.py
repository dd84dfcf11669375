"""Pairs written in other projects' layouts, read again, and by the real consumers of what we write."""

import json

import pytest
from format_records import expected
from turns import turn

from fasttrain_data.errors import UserError
from fasttrain_data.formats import detect_format, read_pairs
from fasttrain_data.formats.bring_in import import_pairs
from fasttrain_data.formats.write import export_pairs
from fasttrain_data.pairs.build import PairSettings, make_pairs
from fasttrain_data.records import ATTRIBUTES

SCORES = dict.fromkeys(ATTRIBUTES, 3)


MULTI = {
    **expected(images=("a.png", "b/c.png")),
    "prompt": [
        turn("system", "Be brief."),
        turn("user", None, "What?"),
        turn("assistant", "This."),
        turn("user", "And", None, "why?"),
    ],
}


PAIRS = [
    {"id": "1", **expected()},
    {"id": "2", **expected(images=(), chosen="ü <b>\n", rejected="x")},
    {"id": "3", **MULTI},
]


@pytest.mark.parametrize("target", ["trl", "llama-factory", "ms-swift"])
def test_round_trips_keep_prompts_answers_and_images(target, tmp_path, write_rows):
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    out = tmp_path / "out.json"
    export_pairs(path, out, target)
    assert detect_format(out) == target
    assert [{key: row[key] for key in PAIRS[0]} for row in read_pairs(out)] == PAIRS


def test_mllm_dpo_holds_single_turns_with_one_image_and_counts_the_rest(tmp_path, write_rows, read_rows):
    scored = {**PAIRS[0], "scores_chosen": SCORES, "scores_rejected": {**SCORES, "coherence": 0}}
    path = write_rows(tmp_path / "pairs.jsonl", [scored, *PAIRS[1:]])
    account = export_pairs(path, tmp_path / "out.json", "mllm-dpo")
    assert account.dropped == {"pairs": {"several images": 1}}
    assert read_rows(tmp_path / "out.skipped.jsonl") == [{"where": "3", "reason": "several images"}]
    rows = json.loads((tmp_path / "out.json").read_text())
    assert rows[0]["question"] == {"from": "human", "value": "<image>\nWhy?"}
    assert (rows[0]["image"], rows[0]["Helpfulness_gpt4v"], rows[0]["Coherence_candidate"]) == ("a.png", 3, 0)
    assert rows[0]["Sum_of_helpfulness_correctness_coherence_candidate"] == 6
    assert [{key: row[key] for key in PAIRS[0]} for row in read_pairs(tmp_path / "out.json")] == PAIRS[:2]


def test_scored_imports_become_annotations_from_which_any_rule_makes_pairs(tmp_path, write_rows, read_rows):
    scored = {
        **PAIRS[0],
        "scores_chosen": {**SCORES, "verbosity": 0},
        "scores_rejected": {**SCORES, "helpfulness": 0},
    }
    path = write_rows(tmp_path / "pairs.jsonl", [scored])
    export_pairs(path, tmp_path / "m.json", "mllm-dpo")
    import_pairs(tmp_path / "m.json", tmp_path / "a.jsonl", into="annotations")
    make_pairs(tmp_path / "a.jsonl", tmp_path / "p.jsonl", PairSettings(score="v=1", margin=1))
    [pair] = read_rows(tmp_path / "p.jsonl")
    assert pair["chosen"][0]["content"][0]["text"] == "bad"
    helpsteer = [
        {"prompt": "Why?", "response": text, **dict.fromkeys(ATTRIBUTES, score)}
        for text, score in (("a", 1), ("b", 4), ("c", 0))
    ]
    import_pairs(write_rows(tmp_path / "h.jsonl", helpsteer), tmp_path / "a.jsonl", into="annotations")
    make_pairs(tmp_path / "a.jsonl", tmp_path / "p.jsonl", PairSettings(rejected="all"))
    assert [row["rejected"][0]["content"][0]["text"] for row in read_rows(tmp_path / "p.jsonl")] == ["a", "c"]
    with pytest.raises(UserError, match="helpsteer or mllm-dpo"):
        import_pairs(path, tmp_path / "a.jsonl", into="annotations")


def test_llama_factory_gets_its_entry_and_keeps_others(tmp_path, write_rows):
    """The checks of LLaMA-Factory's sharegpt converter for ranking data (src/llamafactory/data/converter.py)."""
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "dataset_info.json").write_text('{"other": {"file_name": "o.json"}}')
    export_pairs(path, tmp_path / "mine.json", "llama-factory")
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert set(info) == {"other", "mine"}
    entry = info["mine"]
    assert (entry["ranking"], entry["formatting"]) == (True, "sharegpt")
    columns = entry["columns"]
    for row in json.loads((tmp_path / entry["file_name"]).read_text()):
        turns = row[columns["messages"]]
        turns = turns[turns[0]["from"] == "system" :]
        assert len(turns) % 2 == 1
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2) + ["human"]
        assert row[columns["chosen"]]["from"] == row[columns["rejected"]]["from"] == "gpt"
        assert sum(t["value"].count("<image>") for t in turns) == len(row[columns["images"]])
    (tmp_path / "mine.json").unlink()
    for broken in (b"[1]", b"{", b'{"\xff": {}}'):
        (tmp_path / "dataset_info.json").write_bytes(broken)
        with pytest.raises(UserError, match="dataset_info"):
            export_pairs(path, tmp_path / "mine.json", "llama-factory")
        assert not (tmp_path / "mine.json").exists()
    (tmp_path / "dataset_info.json").write_text("{}")
    export_pairs(path, tmp_path / "mine.json", "llama-factory")
    assert set(json.loads((tmp_path / "dataset_info.json").read_text())) == {"mine"}


def test_the_real_llama_factory_demo_round_trips(shared_data, tmp_path):
    source = shared_data / "llamafactory_demo" / "dpo_en_demo_first150.json"
    rows = list(read_pairs(source))
    assert len(rows) == 150
    export_pairs(source, tmp_path / "swift.jsonl", "ms-swift")
    export_pairs(tmp_path / "swift.jsonl", tmp_path / "back.json", "llama-factory")
    again = json.loads((tmp_path / "back.json").read_text())
    originals = json.loads(source.read_text())
    for one, other in zip(again, originals, strict=True):
        assert all(one[key] == other[key] for key in ("conversations", "chosen", "rejected"))


def test_the_commands_export_and_import(tmp_path, write_rows, command, read_rows):
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    code, stdout, _ = command("export", path, "--to", "ms-swift", "-o", tmp_path / "s.jsonl")
    assert (code, "s.jsonl: 3 pairs" in stdout) == (0, True)
    code, stdout, _ = command("import", tmp_path / "s.jsonl", "-o", tmp_path / "back.jsonl")
    assert code == 0
    assert [row["id"] for row in read_rows(tmp_path / "back.jsonl")] == ["1", "2", "3"]
    write_rows(path, [*PAIRS, {**PAIRS[0], "chosen": 3}])
    code, _, stderr = command("export", path, "--to", "trl", "-o", tmp_path / "t.jsonl")
    assert (code, stderr) == (2, f"fasttrain-data: {path} line 4: chosen: wanted text, got 3\n")
    assert not (tmp_path / "t.jsonl").exists()


@pytest.mark.parametrize("target", ["llama-factory", "ms-swift", "mllm-dpo", "trl.parquet"])
def test_export_leaves_out_and_counts_what_a_layout_cannot_hold(target, tmp_path, write_rows):
    good, tag = expected(images=()), turn("user", "What is <image> in HTML?")
    rows = [good, good | {"tools": [{"name": "f"}]}, good | {"chat_template_kwargs": {"x": 1}}]
    rows += [good | {"prompt": [tag]}, good | {"chosen": [turn("assistant", "an <image>")]}]
    path = write_rows(tmp_path / "x.jsonl", rows)
    layout, _, suffix = target.partition(".")
    out = tmp_path / f"out.{suffix or 'json'}"
    account = export_pairs(path, out, layout)
    assert (account.total_dropped("holds tools"), account.total_dropped("holds chat_template_kwargs")) == (
        1,
        1,
    )
    literal = 0 if suffix else 2  # an image part is no text in Parquet
    assert account.total_dropped("<image> in a text") == literal
    assert len(list(read_pairs(out))) == account.total_kept() == 3 - literal
