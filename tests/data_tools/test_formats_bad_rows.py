"""Rows and files that are in no known layout, or wrong in theirs."""

import copy
import json
import random

import pytest
from format_records import RECORDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from turns import human, turn

from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.formats import detect_format, read_pairs


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
