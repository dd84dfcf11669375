"""Pair files in other projects' layouts go into training as they are; what holds no pair is listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasttrain.data.sources import open_source
from fasttrain.errors import UserError


def sharegpt(question: str, chosen: str, rejected: str) -> dict[str, object]:
    turn = {"from": "human", "value": question}
    return {
        "conversations": [turn],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }


def test_llama_factory_rankings_are_read_as_pairs(tmp_path: Path) -> None:
    from fasttrain.data.pairs import read_pair

    path = tmp_path / "ranking.json"
    path.write_text(json.dumps([sharegpt("Why?", "Because.", "No."), sharegpt("How?", "So.", "Not so.")]))
    source = open_source(path)
    pairs = [read_pair(source.row(number), source.where(number), tmp_path) for number in range(len(source))]
    assert [(p.messages[0][1][0][1], p.chosen, p.rejected) for p in pairs] == [
        ("Why?", "Because.", "No."),
        ("How?", "So.", "Not so."),
    ]


def test_a_mistake_in_a_foreign_file_is_one_line_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps([sharegpt("Why?", "Because.", "No."), sharegpt("How?", "So.", "")]))
    with pytest.raises(UserError, match=r"ranking.json row 2: rejected"):
        open_source(path)


def test_the_real_demo_file_gives_all_its_pairs(shared_data: Path) -> None:
    source = open_source(shared_data / "llamafactory_demo" / "dpo_en_demo_first150.json")
    assert len(source) == 150 and source.passed_over == []
