"""Preference files of other projects: every layout is recognised and read."""

import copy
import json

import pytest
from format_records import PNG, RECORDS, expected

from fasttrain_data.formats import FORMATS, detect_format, read_pairs
from fasttrain_data.formats.bring_in import import_pairs
from fasttrain_data.formats.messages import parts_of


@pytest.mark.parametrize("name", RECORDS)
def test_every_layout_is_recognised_and_read(name, tmp_path, write_rows):
    record, meaning = RECORDS[name]
    assert detect_format(record) == name.split(" ")[0]
    path = write_rows(tmp_path / "x.jsonl", [record])
    assert detect_format(path) == name.split(" ")[0]
    [row] = read_pairs(path)
    assert {key: row[key] for key in meaning} == meaning
    assert isinstance(row["id"], str) and row["id"]


@pytest.mark.parametrize(
    "text", ["<image>\nWhy?", "Why?\n<image>", "In\n\n<image>\n\nwhy?\n<image>\n", "<image>"]
)
def test_text_around_placeholders_is_read_as_the_trainer_reads_it(text, tmp_path):
    from fasttrain.data.pairs import read_prompt

    row = {"images": [{"bytes": PNG}] * text.count("<image>")}
    [(_, trained)], _ = read_prompt(row, text, "line 1", tmp_path)
    assert [(part["type"], part.get("text", "")) for part in parts_of(text)] == list(trained)


def test_helpsteer_answers_become_pairs_by_the_papers_rule(tmp_path, write_rows):
    def row(prompt, response, h, c, co):
        return {
            "prompt": prompt,
            "response": response,
            "helpfulness": h,
            "correctness": c,
            "coherence": co,
            "complexity": 1,
            "verbosity": 1,
        }

    rows = [
        row("Why?", "bad", 1, 1, 3),
        row("Why?", "good", 4, 4, 4),
        row("Who?", "x", 3, 3, 3),
        row("Who?", "y", 3, 3, 4),
        row("How?", "z", 1, 1, 1),
    ]
    path = write_rows(tmp_path / "h.jsonl", rows)
    skipped = []
    [pair] = read_pairs(path, skipped=lambda where, reason: skipped.append((where, reason)))
    assert {key: pair[key] for key in ("prompt", "chosen", "rejected")} == {
        key: value for key, value in expected(images=()).items() if key != "images"
    }
    assert (pair["score_chosen"], pair["score_rejected"]) == (12, 5)
    assert skipped == [(f"{path} line 3", "low margin"), (f"{path} line 5", "one answer only")]


def test_ties_are_told_not_hidden(tmp_path, write_rows):
    tied = {**RECORDS["helpsteer3"][0], "overall_preference": 0}
    better_second = {**RECORDS["helpsteer3"][0], "overall_preference": 3}
    skipped = []
    rows = list(
        read_pairs(
            write_rows(tmp_path / "x.jsonl", [tied, better_second]),
            skipped=lambda *told: skipped.append(told),
        )
    )
    assert [row["chosen"][0]["content"][0]["text"] for row in rows] == ["bad"]
    assert [reason for _, reason in skipped] == ["tie"]


def test_foreign_log_probs_are_data_and_never_look_like_a_reference(tmp_path, write_rows):
    [mllm] = read_pairs(write_rows(tmp_path / "m.jsonl", [RECORDS["mllm-dpo"][0]]))
    assert mllm["foreign_logps"] == {"ref_win_logp": -12.5}
    [rlaif] = read_pairs(write_rows(tmp_path / "r.jsonl", [RECORDS["rlaif-v"][0]]))
    assert rlaif["foreign_logps"] == {"logps": [-1.5, -0.1]}
    for row in (mllm, rlaif):
        assert not {"ref_win_logp", "logps", "ref_chosen_logps", "ref_rejected_logps"} & set(row)


def test_embedded_images_come_out_of_parquet_as_bytes(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {**RECORDS["rlaif-v"][0], "image": {"bytes": PNG, "path": f"{n}.png"}, "question": f"{n}?"}
        for n in range(150)
    ]
    shards = tmp_path / "shards"
    shards.mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:100]), shards / "0.parquet")
    pq.write_table(pa.Table.from_pylist(rows[100:]), shards / "1.parquet")
    read = list(read_pairs(shards))
    assert len(read) == 150
    assert read[120]["images"] == [{"bytes": PNG, "path": "120.png"}]
    account = import_pairs(shards, tmp_path / "pairs.jsonl")
    assert account.total_kept() == 150
    [image] = (tmp_path / "pairs_images").iterdir()
    assert image.read_bytes() == PNG
    first = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    assert first["images"] == [f"pairs_images/{image.name}"]


def test_completions_stored_as_a_struct_of_lists_are_read(tmp_path, write_rows):
    record = copy.deepcopy(RECORDS["vlfeedback"][0])
    items = record["completions"]
    record["completions"] = {key: [item[key] for item in items] for key in items[0]}
    [row] = read_pairs(write_rows(tmp_path / "v.jsonl", [record]))
    assert (row["score_chosen"], row["score_rejected"], row["chosen_model"]) == (4.5, 1.5, "good")


def test_whole_conversations_keep_what_stands_before_the_answer_once(tmp_path, write_rows):
    system, said = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Yes."}
    asked, again = {"role": "user", "content": "Hi?"}, {"role": "user", "content": "Why?"}
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    before = [asked, said, again]
    swift = {"system": "Be brief.", "messages": [*before, good], "rejected_messages": [*before, bad]}
    twice = {side: [system, *swift[side]] for side in ("messages", "rejected_messages")} | {
        "system": "Be long."
    }
    whole = {"prompt": "Why?", "chosen": [system, *before, good], "rejected": [system, *before, bad]}
    factory = {"system": "Be long.", "messages": [system, *before], "chosen": good, "rejected": bad}
    for row in (swift, twice, factory, whole | {"chosen-rating": 5.0, "rejected-rating": 1.0}):
        [pair] = read_pairs(write_rows(tmp_path / "x.jsonl", [row]))
        texts = [(message["role"], message["content"][0]["text"]) for message in pair["prompt"]]
        assert texts == [("system", "Be brief."), ("user", "Hi?"), ("assistant", "Yes."), ("user", "Why?")]
        assert [pair[side][0]["content"][0]["text"] for side in ("chosen", "rejected")] == ["good", "bad"]


def test_turns_in_either_spelling_may_stand_in_one_file(tmp_path, write_rows):
    """As datasets fills up rows of both: from and value were null, and refused, where role and content said all."""
    asked = {"from": None, "value": None, "role": "user", "content": "Why?"}
    chosen, rejected = (
        {"from": "gpt", "value": text, "role": None, "content": None} for text in ("good", "bad")
    )
    row = {"conversations": [asked], "chosen": chosen, "rejected": rejected}
    [pair] = read_pairs(write_rows(tmp_path / "x.jsonl", [row]))
    assert pair["prompt"] == expected(images=())["prompt"]


def test_a_system_column_beside_question_and_answers_is_a_system_turn(tmp_path, write_rows):
    row = {"system": "Be brief.", "question": "Why?", "chosen": "good", "rejected": "bad"}
    [pair, plain] = read_pairs(write_rows(tmp_path / "orca.jsonl", [row, row | {"system": ""}]))
    assert [(turn["role"], turn["content"][0]["text"]) for turn in pair["prompt"]] == [
        ("system", "Be brief."),
        ("user", "Why?"),
    ]
    assert [turn["role"] for turn in plain["prompt"]] == ["user"]


def test_formats_are_tried_in_an_order_that_tells_all_apart():
    for name, (record, _) in RECORDS.items():
        matching = [form for form, matches in FORMATS.items() if matches(record)]
        assert matching[0] == name.split(" ")[0]


@pytest.mark.parametrize(
    "name", ["trl", "trl short", "mllm-dpo", "rlaif-v", "llama-factory", "ms-swift", "llava-next"]
)
@pytest.mark.parametrize("empty", [None, []])
def test_an_empty_column_does_not_hide_the_images_beside_it(name, empty, tmp_path, write_rows):
    plain = {key: value for key, value in RECORDS[name][0].items() if not key.startswith("image")}
    for row in ({"images": empty, "image": "a.png"}, {"images": ["a.png"], "image": empty}):
        [read] = read_pairs(write_rows(tmp_path / "x.jsonl", [{**row, **plain}]), name.split(" ")[0])
        assert (read["images"], read["prompt"]) == (["a.png"], expected()["prompt"])
        assert "image" not in read


def test_vlfeedback_takes_the_path_where_the_image_is_null(tmp_path, write_rows):
    [row] = read_pairs(write_rows(tmp_path / "v.jsonl", [{**RECORDS["vlfeedback"][0], "image": None}]))
    assert row["images"] == ["a.png"]


def test_pairs_of_one_question_have_ids_of_their_own(tmp_path, write_rows):
    rows = [
        {"question_id": "q1", "prompt": "Why?", "chosen": "good", "rejected": f"bad {number}"}
        for number in range(3)
    ]
    read = list(read_pairs(write_rows(tmp_path / "x.jsonl", rows)))
    assert len({row["id"] for row in read}) == 3
    assert {row["question_id"] for row in read} == {"q1"}
