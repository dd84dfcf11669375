"""Preference files of other projects: reading, errors, round trips, and the real consumers of what we write."""

import copy
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.formats import FORMATS, detect_format, read_pairs
from fasttrain_data.formats.bring_in import import_pairs
from fasttrain_data.formats.messages import parts_of
from fasttrain_data.formats.write import export_pairs
from fasttrain_data.pairs.build import PairSettings, make_pairs
from fasttrain_data.records import ATTRIBUTES

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc000000301"
    "0100c9fe92ef0000000049454e44ae426082"
)


def turn(role, *parts):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def human(text):
    return {"from": "human", "value": text}


def expected(images=("a.png",), prompt=None, chosen="good", rejected="bad"):
    placeholders = [None] * len(images)
    return {
        "images": list(images),
        "prompt": prompt or [turn("user", *placeholders, "Why?")],
        "chosen": [turn("assistant", chosen)],
        "rejected": [turn("assistant", rejected)],
    }


def vl_answer(text, **ratings):
    return {
        "response": text,
        "model": text,
        "annotations": {name: {"Rating": value} for name, value in ratings.items()},
    }


SCORES = dict.fromkeys(ATTRIBUTES, 3)
# layout -> (a record as its project publishes it, what it means)
RECORDS = {
    "trl": (
        {
            "images": ["a.png"],
            "prompt": [turn("user", None, "Why?")],
            "chosen": [turn("assistant", "good")],
            "rejected": [turn("assistant", "bad")],
        },
        expected(),
    ),
    "trl implicit": (
        {
            "images": [],
            "chosen": [turn("user", "Why?"), turn("assistant", "good")],
            "rejected": [turn("user", "Why?"), turn("assistant", "bad")],
        },
        expected(images=()),
    ),
    "trl said again": (
        {
            "prompt": "Why?",
            "chosen": [turn("user", "Why?") | {"content": "Why?"}, turn("assistant", "good")],
            "rejected": [turn("user", "Why?") | {"content": "Why?"}, turn("assistant", "bad")],
        },
        expected(images=()),
    ),
    "alpaca": (
        {"image": "a.png", "instruction": "Why?", "input": "", "chosen": "good", "rejected": "bad"},
        expected(),
    ),
    "alpaca argilla": (
        {"image": "a.png", "input": "Why?", "chosen_response": "good", "rejected_response": "bad"},
        expected(),
    ),
    "trl short": ({"image": "a.png", "prompt": "Why?", "chosen": "good", "rejected": "bad"}, expected()),
    "mllm-dpo": (
        {
            "image": "a.png",
            "question": {"from": "human", "value": "<image>\nWhy?"},
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
            "ref_win_logp": -12.5,
        },
        expected(),
    ),
    "mllm-dpo literal": (
        {
            "image": "a.png",
            "question": "{'from': 'human', 'value': '<image>\\nWhy?'}",
            "chosen": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "good"}],
            "rejected": {"from": "gpt", "value": "bad"},
        },
        expected(),
    ),
    "rlaif-v": (
        {
            "ds_name": "x",
            "image_path": "a.png",
            "question": "Why?",
            "chosen": "good",
            "rejected": "bad",
            "idx": 7,
            "logps": "[-1.5, -0.1]",
        },
        expected(),
    ),
    "vlfeedback": (
        {
            "id": "v",
            "prompt": "Why?",
            "img_path": "a.png",
            "models": ["good", "bad"],
            "completions": [
                vl_answer("so so", Helpfulness="3", Safety="N/A"),
                vl_answer("good", Helpfulness="5", Visual="4"),
                vl_answer("bad", Helpfulness="1", Visual="2"),
            ],
        },
        expected(),
    ),
    "llama-factory": (
        {
            "conversations": [{"from": "human", "value": "<image>Why?"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
            "images": ["a.png"],
        },
        expected(),
    ),
    "ms-swift": (
        {
            "messages": [
                {"role": "user", "content": "<image>Why?"},
                {"role": "assistant", "content": "good"},
            ],
            "rejected_response": "bad",
            "images": ["a.png"],
        },
        expected(),
    ),
    "llava-next": (
        {
            "id": 3,
            "image": "a.png",
            "prompt": "<image>\nWhy?",
            "answer": "x",
            "chosen": "good",
            "rejected": "bad",
        },
        expected(),
    ),
    "helpsteer3": (
        {
            "domain": "d",
            "language": "en",
            "context": [{"role": "user", "content": "Why?"}],
            "response1": "good",
            "response2": "bad",
            "overall_preference": -2,
        },
        expected(images=()),
    ),
    "ultrafeedback": (
        {
            "prompt": "Why?",
            "chosen": [turn("user", "Why?"), turn("assistant", "good")],
            "rejected": [turn("user", "Why?"), turn("assistant", "bad")],
            "chosen-rating": 4.5,
            "rejected-rating": 2,
        },
        expected(images=()),
    ),
}


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


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("trl", {"chosen": None}, "chosen"),
        ("trl", {"rejected": [turn("assistant", "good")]}, "rejected"),
        ("trl", {"images": []}, "images"),
        ("trl", {"images": ["a.png", "b.png"]}, "images"),
        ("trl", {"images": [5]}, "images"),
        ("trl", {"prompt": [turn("assistant", "Why?")]}, "prompt"),
        ("trl short", {"chosen": "  "}, "chosen"),
        ("mllm-dpo", {"question": {"from": "robot", "value": "x"}}, "question"),
        ("mllm-dpo literal", {"question": "{'from': "}, "question"),
        ("llama-factory", {"conversations": []}, "conversations"),
        ("llama-factory", {"rejected": {"from": "gpt"}}, "rejected"),
        ("ms-swift", {"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ("ms-swift", {"rejected_response": ["a", "b"]}, "rejected_response"),
        ("ms-swift", {"rejected_images": ["b.png"]}, "rejected_images"),
        (
            "ms-swift",
            {
                "rejected_response": None,
                "rejected_messages": [human("How?"), {"role": "assistant", "content": "x"}],
            },
            "rejected_messages",
        ),
        ("trl", {"chosen": [turn("assistant", "good") | {"reasoning_content": "so"}]}, "chosen"),
        ("trl", {"prompt": [turn("user", None, "Why?") | {"thinking": "so"}]}, "prompt"),
        ("llama-factory", {"chosen": {"from": "gpt", "value": "x", "reasoning": "so"}}, "chosen"),
        ("mllm-dpo", {"rejected": [human("Who?"), {"from": "gpt", "value": "x"}]}, "rejected"),
        (
            "mllm-dpo",
            {
                "chosen": [
                    human("Why?"),
                    {"from": "gpt", "value": "x"},
                    human("And?"),
                    {"from": "gpt", "value": "y"},
                ]
            },
            "chosen",
        ),
        ("helpsteer3", {"overall_preference": 4}, "overall_preference"),
        ("vlfeedback", {"completions": 3}, "completions"),
    ],
)
def test_a_bad_row_names_file_place_field_wanted_and_got(name, change, field, tmp_path, write_rows):
    good = RECORDS[name][0]
    path = write_rows(tmp_path / "x.jsonl", [good, {**good, **change}])
    rows = read_pairs(path)
    next(rows)
    with pytest.raises(BadRow) as caught:
        next(rows)
    assert (caught.value.file, caught.value.place, caught.value.field) == (str(path), "line 2", field)
    assert caught.value.wanted and caught.value.got


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


def test_a_system_column_beside_question_and_answers_is_a_system_turn(tmp_path, write_rows):
    row = {"system": "Be brief.", "question": "Why?", "chosen": "good", "rejected": "bad"}
    [pair, plain] = read_pairs(write_rows(tmp_path / "orca.jsonl", [row, row | {"system": ""}]))
    assert [(turn["role"], turn["content"][0]["text"]) for turn in pair["prompt"]] == [
        ("system", "Be brief."),
        ("user", "Why?"),
    ]
    assert [turn["role"] for turn in plain["prompt"]] == ["user"]


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


junk = st.one_of(
    st.none(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=2),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(RECORDS)), seed=st.integers(0, 10**6), value=junk)
def test_a_damaged_row_is_read_or_refused_but_never_crashes(name, seed, value, tmp_path_factory):
    rng = random.Random(seed)
    record = copy.deepcopy(RECORDS[name][0])
    node = record
    while True:  # walk to a random place and put junk there
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        if rng.random() < 0.3 and isinstance(node, dict):
            del node[key]
        else:
            node[key] = value
        break
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    path.write_text(json.dumps(RECORDS[name][0]) + "\n" + json.dumps(record) + "\n")
    try:
        assert 1 <= len(list(read_pairs(path))) <= 2
    except BadRow as error:
        assert error.place == "line 2"


def test_an_unknown_layout_names_the_known_ones(tmp_path, write_rows):
    path = write_rows(tmp_path / "x.jsonl", [{"foo": 1}])
    assert detect_format(path) is None
    with pytest.raises(UserError, match="rlaif-v"):
        list(read_pairs(path))
    with pytest.raises(UserError, match="--format"):
        list(read_pairs(path, "nonsense"))


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


def test_formats_are_tried_in_an_order_that_tells_all_apart():
    for name, (record, _) in RECORDS.items():
        matching = [form for form, matches in FORMATS.items() if matches(record)]
        assert matching[0] == name.split(" ")[0]


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


@pytest.mark.parametrize(
    ("content", "got"),
    [("", "no rows"), ("[]", "no rows"), ('{"foo": 1, "bar": 2}\n', "keys foo, bar in line 1")],
)
def test_a_file_of_no_known_layout_is_told_what_it_holds(tmp_path, content, got):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        list(read_pairs(path))
    assert str(caught.value).startswith(f"{path}: wanted a preference file of one of: ms-swift, ")
    assert str(caught.value).endswith(f"; got {got}")
