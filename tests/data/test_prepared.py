"""Prepared data: distinct completions once, the overflow rules, exact and nested limits, an account that adds up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fasttrain.config import DataConfig
from fasttrain.data.prepare import prepare
from fasttrain.data.prepared import PreparedData
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.errors import UserError
from fasttrain.files import HashMemo


@pytest.fixture
def chat(tiny_models: ModuleType) -> ChatTokenizer:
    tokenizer = tiny_models.build_tokenizer(tiny_models.CHATML, eos="<|im_end|>")
    return ChatTokenizer(tokenizer, [tokenizer.eos_token_id])


@pytest.fixture
def vision_chat(tiny_llava: Path) -> ChatTokenizer:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_llava, backend="pil")
    return ChatTokenizer(processor, [processor.tokenizer.eos_token_id])


@pytest.fixture
def memo(tmp_path: Path) -> Iterator[HashMemo]:
    memo = HashMemo(tmp_path / "hashes.sqlite")
    yield memo
    memo.close()


@pytest.fixture
def prepared(tmp_path: Path, memo: HashMemo, chat: ChatTokenizer) -> Callable[..., PreparedData]:
    """Prepares rows (prompt, chosen, rejected) or a file; settings of the data section as keywords."""

    def build(
        rows: Any, *, limit: int | None = None, seed: int = 0, model: Any = None, **settings: Any
    ) -> PreparedData:
        path = rows
        if not isinstance(rows, Path):
            path = tmp_path / "pairs.jsonl"
            lines = [
                json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) for row in rows
            ]
            path.write_text("\n".join(lines))
        config = DataConfig(train=str(path), **settings)
        return prepare(str(path), config, model or chat, memo, seed=seed, limit_pairs=limit)

    return build


def tokens(chat: ChatTokenizer, answer: str) -> tuple[int, ...]:
    """An answer of a ChatML model, tokenized without our code."""
    return tuple(chat.tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"])


def all_pairs(data: PreparedData) -> list[tuple[Any, ...]]:
    """(prompt, chosen, rejected) ids of every pair, group by group."""
    return [
        (
            tuple(g.prompt_ids.tolist()),
            tuple(g.completion_ids[c].tolist()),
            tuple(g.completion_ids[r].tolist()),
        )
        for g in data
        for c, r in g.pairs
    ]


def test_equal_completions_are_kept_once_and_pairs_point_at_them(prepared: Any, chat: ChatTokenizer) -> None:
    rows = [("q", "a", "b"), ("other", "a", "b"), ("q", "a", "c"), ("q", "b", "c"), ("q", "a", "b")]
    data = prepared(rows)
    assert [g.pairs.tolist() for g in data] == [[[0, 1], [0, 2], [1, 2], [0, 1]], [[0, 1]]]
    assert [tuple(ids.tolist()) for ids in data.group(0).completion_ids] == [tokens(chat, x) for x in "abc"]
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert chat.tokenizer.decode(data.group(0).prompt_ids.tolist()) == text
    assert (data.account.rows, data.account.pairs, data.account.groups, data.account.images) == (5, 5, 2, 0)
    assert data.group(1).where.endswith("pairs.jsonl line 2")
    assert [data.lengths(0).tolist(), data.group(0).tokens] == [
        [len(data.group(0).prompt_ids), 2, 2, 2], len(data.group(0).prompt_ids) + 6
    ]  # fmt: skip


def test_every_row_of_a_file_is_a_pair_with_its_own_tokens(
    prepared: Any, chat: ChatTokenizer, text_pairs: Any, tiny_models: ModuleType, tmp_path: Path
) -> None:
    path = text_pairs(tmp_path / "rows.jsonl", 40)
    truth = Counter(
        (
            tokens(chat, row["chosen"][0]["content"][0]["text"]),
            tokens(chat, row["rejected"][0]["content"][0]["text"]),
        )
        for row in tiny_models.read_rows(path)
    )
    assert Counter(pair[1:] for pair in all_pairs(prepared(path))) == truth


def test_answers_that_differ_as_text_but_not_as_tokens_are_a_bad_row(
    prepared: Any, tiny_models: ModuleType
) -> None:
    trims = tiny_models.CHATML.replace("{{ message['content'] }}", "{{ message['content'] | trim }}")
    tokenizer = tiny_models.build_tokenizer(trims, eos="<|im_end|>")
    model = ChatTokenizer(tokenizer, [tokenizer.eos_token_id])
    with pytest.raises(
        UserError, match=r"line 2: rejected: wanted .* differs from chosen, got the same answer as tokens"
    ):
        prepared([("q", "a", "b"), ("q", "a", "a ")], model=model)


# With ChatML the prompt "q" has 12 tokens or so; answers below are of whole words, so lengths are counted, not assumed.
LONG = "the bar chart shows value of red green blue left right highest lowest is are not because answer"


def boundary(chat: ChatTokenizer) -> tuple[int, int]:
    """Tokens of prompt `q`, and of the prompt with the long answer."""
    prompt = len(chat.tokenizer("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    return prompt, prompt + len(tokens(chat, LONG))


def test_an_answer_that_just_fits_is_kept_whole(prepared: Any, chat: ChatTokenizer) -> None:
    _, total = boundary(chat)
    for overflow in ("error", "truncate", "drop"):
        data = prepared([("q", LONG, "b")], max_length=total, overflow=overflow)
        assert tuple(data.group(0).completion_ids[0].tolist()) == tokens(chat, LONG)
        assert (data.account.truncated, data.account.skipped) == (0, [])


@pytest.mark.parametrize("field", ["chosen", "rejected"])
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_overflow_error_stops_and_names_the_field(
    field: str, on_bad_row: str, prepared: Any, chat: ChatTokenizer
) -> None:
    _, total = boundary(chat)
    row = ("q", LONG, "b") if field == "chosen" else ("q", "b", LONG)
    said = (
        rf"line 2: {field}: wanted at most data.max_length = {total - 1} tokens with its prompt, got {total}"
    )
    with pytest.raises(UserError, match=said):
        prepared([("q", "a", "b"), row], max_length=total - 1, on_bad_row=on_bad_row)


def test_overflow_truncate_cuts_completions_at_the_end_and_counts_each_once(
    prepared: Any, chat: ChatTokenizer
) -> None:
    prompt, total = boundary(chat)
    rows = [("q", LONG, "b"), ("q", LONG, "c"), ("q", "c", LONG), ("q", LONG + " extra", "b")]
    data = prepared(rows, max_length=total - 3, overflow="truncate")
    cut = tokens(chat, LONG)[:-3]
    assert [tuple(ids.tolist()) for ids in data.group(0).completion_ids] == [
        cut,
        tokens(chat, "b"),
        tokens(chat, "c"),
    ]
    assert data.group(0).pairs.tolist() == [[0, 1], [0, 2], [2, 0], [0, 1]]
    assert data.account.truncated == 1  # one completion, in four rows
    assert max(data.lengths(0)[1:]) + prompt == total - 3


def test_a_pair_that_truncation_makes_equal_is_listed_not_trained(prepared: Any, chat: ChatTokenizer) -> None:
    _, total = boundary(chat)
    rows = [("q", "a", "b"), ("q", LONG + " yes", LONG + " no")]
    for on_bad_row in ("stop", "skip"):
        data = prepared(rows, max_length=total - 3, overflow="truncate", on_bad_row=on_bad_row)
        (skipped,) = data.skipped_lines()
        assert skipped["where"].endswith("pairs.jsonl line 2")
        assert skipped["reason"] == "rejected: the same as chosen after truncation"
        assert (data.account.pairs, data.account.truncated) == (1, 0)


def test_overflow_drop_leaves_the_pair_out_and_lists_it(prepared: Any, chat: ChatTokenizer) -> None:
    _, total = boundary(chat)
    rows = [("q", LONG, "b"), ("q", "a", "b"), ("q", "c", LONG), (LONG + " yes no", "a", "b")]
    data = prepared(rows, max_length=total - 1, overflow="drop")
    assert [pair[1:] for pair in all_pairs(data)] == [(tokens(chat, "a"), tokens(chat, "b"))]
    assert [(line["where"].rpartition(" ")[2], line["reason"].partition(":")[0]) for line in data.skipped_lines()] == [
        ("1", "chosen"), ("3", "rejected"), ("4", "prompt"),
    ]  # fmt: skip
    assert (data.account.rows, data.account.pairs, data.account.groups) == (4, 1, 1)
    assert len(data.group(0).completion_ids) == 2  # the dropped answers are not run either


def test_a_prompt_that_fills_everything_is_an_error_or_dropped_but_never_cut(
    prepared: Any, chat: ChatTokenizer
) -> None:
    prompt, _ = boundary(chat)
    rows = [("q", "a", "b"), ("q " + LONG, "a", "b")]
    long_prompt = prompt + len(tokens(chat, " " + LONG)) - 1
    said = rf"line 2: prompt: wanted fewer than data.max_length = {long_prompt} tokens, got {long_prompt}"
    for overflow in ("error", "truncate"):
        with pytest.raises(UserError, match=said):
            prepared(rows, max_length=long_prompt, overflow=overflow)
    with pytest.raises(UserError, match=said):
        prepared(rows, max_length=long_prompt, overflow="error", on_bad_row="skip")
    for settings in ({"overflow": "drop"}, {"overflow": "truncate", "on_bad_row": "skip"}):
        data = prepared(rows, max_length=long_prompt, **settings)
        assert data.account.pairs == 1 and data.skipped_lines()[0]["reason"] in said.replace("line 2: ", "")


def test_a_cut_completion_keeps_room_for_at_least_one_token(prepared: Any, chat: ChatTokenizer) -> None:
    prompt, _ = boundary(chat)
    data = prepared([("q", "a b", "no a")], max_length=prompt + 1, overflow="truncate")
    assert data.lengths(0).tolist() == [prompt, 1, 1] and data.account.truncated == 2


def test_bad_rows_are_listed_with_file_line_and_reason(prepared: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"id": "g", "prompt": "q", "chosen": "a", "rejected": "b"})
    empty = json.dumps({"prompt": "q", "chosen": " ", "rejected": "b"})
    ended = json.dumps({"prompt": "q", "chosen": "a<|im_end|>b", "rejected": "b"})
    path.write_text("\n".join([good, "nope", "", empty, ended]))
    data = prepared(path, on_bad_row="skip")
    assert [(line["where"], line["reason"].partition(":")[0]) for line in data.skipped_lines()] == [
        (f"{path} line 2", "row"), (f"{path} line 4", "chosen"), (f"{path} line 5", "chosen"),
    ]  # fmt: skip
    assert all(set(line) == {"where", "id", "reason"} for line in data.skipped_lines())
    json.dumps(data.skipped_lines(), ensure_ascii=False).encode()
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: row: wanted a JSON object"):
        prepared(path)


def test_a_broken_image_is_a_bad_row_for_each_of_its_pairs(
    prepared: Any, vision_chat: ChatTokenizer, vision_pairs: Any, tmp_path: Path
) -> None:
    path = vision_pairs(tmp_path / "v", 6, images=(1,), per_prompt=(3,))
    (tmp_path / "v" / "images" / "0.png").write_bytes(b"text")
    data = prepared(path, model=vision_chat, on_bad_row="skip")
    assert [line["where"].rpartition(" ")[2] for line in data.skipped_lines()] == ["1", "2", "3"]
    assert "images: wanted an image, got" in data.skipped_lines()[0]["reason"]
    assert (data.account.pairs, data.account.images) == (3, 1)
    with pytest.raises(
        UserError, match=r"line 1: images: wanted an image, got .*0\.png \(not a file of type"
    ):
        prepared(path, model=vision_chat)


def test_images_belong_to_the_group_that_first_held_them(
    prepared: Any, vision_chat: ChatTokenizer, vision_pairs: Any, tmp_path: Path, tiny_models: ModuleType
) -> None:
    path = vision_pairs(tmp_path / "v", 20)
    rows = tiny_models.read_rows(path)
    data = prepared(path, model=vision_chat, limit=11, seed=3)
    for group in data:
        row = rows[int(group.where.rpartition(" ")[2]) - 1]
        names = [path.parent / name for name in row.get("images", [])]
        assert [ref.path for ref in data.images(group.number)] == [name.resolve() for name in names]
        assert data.image_count(group.number) == len(names)
        assert (group.prompt_ids == vision_chat.image_token_id).sum() == 16 * len(names)
    assert data.account.images == sum(data.image_count(number) for number in range(len(data)))


@pytest.mark.parametrize("seed", [0, 1])
def test_limits_are_exact_and_nested(seed: int, prepared: Any, text_pairs: Any, tmp_path: Path) -> None:
    path = text_pairs(tmp_path / "rows.jsonl", 60, per_prompt=(1, 4, 2, 7))
    everything = Counter(all_pairs(prepared(path)))
    before: Counter[Any] = Counter()
    for limit in (1, 2, 10, 25, 59, 60):
        data = prepared(path, limit=limit, seed=seed)
        chosen = Counter(all_pairs(data))
        assert data.account.pairs == chosen.total() == limit
        assert before <= chosen <= everything
        lines = [int(group.where.rpartition(" ")[2]) for group in data]
        assert lines == sorted(lines)  # groups stand in file order
        before = chosen
    assert prepared(path, limit=1000).account.pairs == 60


def test_another_seed_limits_to_other_pairs_and_the_same_seed_to_the_same(
    prepared: Any, text_pairs: Any, tmp_path: Path
) -> None:
    path = text_pairs(tmp_path / "rows.jsonl", 60)
    samples = [all_pairs(prepared(path, limit=12, seed=seed)) for seed in (5, 5, 6)]
    assert samples[0] == samples[1] != samples[2]


def test_a_limit_counts_usable_pairs_only(prepared: Any, chat: ChatTokenizer) -> None:
    rows = [(f"q{n}", LONG if n % 2 else "a", "b") for n in range(40)]
    data = prepared(rows, limit=15, overflow="drop", max_length=boundary(chat)[1] - 2)
    assert data.account.pairs == 15 and len(data) == 15


def test_data_without_a_usable_pair_is_the_users_mistake(prepared: Any) -> None:
    with pytest.raises(
        UserError, match=r"pairs\.jsonl: wanted at least one usable pair, got none \(chosen: wanted"
    ):
        prepared([("q", "", "b")], on_bad_row="skip")
    with pytest.raises(
        UserError, match=r"wanted at least one usable pair, got none \(prompt: wanted fewer than"
    ):
        prepared([("q", "a", "b")], max_length=2, overflow="drop")


def test_a_dropped_group_leaves_no_pairs_and_corrects_the_account(
    prepared: Any, vision_chat: ChatTokenizer, vision_pairs: Any, tmp_path: Path
) -> None:
    data = prepared(vision_pairs(tmp_path / "v", 9, images=(2, 1), per_prompt=(3,)), model=vision_chat)
    account = data.account
    assert (account.pairs, account.groups, account.images) == (9, 3, 5)
    data.drop(2, "images: broken")
    assert (account.pairs, account.groups, account.images) == (6, 2, 3)
    assert data.pair_count(2) == 0 and data.pairs(2).shape == (0, 2) and len(data) == 3
    assert data.skipped_lines()[-1]["reason"] == "images: broken (3 pair(s) of its group)"


def test_token_ids_are_mapped_not_held(prepared: Any) -> None:
    data = prepared([(f"q{n}", "a", "b") for n in range(50)])
    assert isinstance(data._tokens, np.memmap) and data.group(49).prompt_ids.base is not None
