"""Groups of large files get their tokens late: everything about the data is what tokenizing it at the start would give."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fasttrain.config import DataConfig
from fasttrain.data import ahead, prepared, row_index
from fasttrain.data import prepare as preparing
from fasttrain.data.pairs import read_example, read_pair
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.errors import UserError
from fasttrain.files import HashMemo

# Templates that join, trim, put the system prompt elsewhere, think first, look at texts, or cannot be followed.
TRIMS = (
    "{% for m in messages %}{{ '<' ~ m['role'] ~ '>' ~ (m['content'] | trim) ~ '<|im_end|>' + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MACRO = (
    "{% macro said(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p.text }}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}{% set content = said(m.content) | trim %}{{ '[' + m.role + '] ' + content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
LOOKS = (
    "{% for m in messages %}{% set content = m.content %}{% if 'value' in content %}{% set content = content | upper %}{% endif %}"
    "{{ '[' + m.role + '] ' + content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SHORTENS = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'][:200] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
# Asks with <think>, which only answers that think begin with, and leaves out their thoughts.
LEAVES = (
    "{% for m in messages %}{{ '<|im_start|>' if m['role'] == 'assistant' else m['role'] + ': ' }}"
    "{{ (m['content'].split('</think>') | last) + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|><think>\n' }}{% endif %}"
)
TEXTS = (
    "<think>\nso", "<think>\nor", "<think>\nso</think>it is", "so</think>",
    "the bar", "the bar ", " the bar", "the bar\n", "line", "chart shows 42", "value", "e\u0301cole", "\u00e9cole", "中文 表", "中文 图",
    "the <|im_end|>", "<|im_end|>", "a <|im_end|> b", "<image>", "two <image> of them", "<unk>", "\u2581x", "x", "tab\there", "nul\0",
    "\x04", "left " * 120, "left " * 450 + "right", "left " * 450 + "blue", "ﬁ", "\U00050000",
)  # fmt: skip


@pytest.fixture
def memo(tmp_path: Path) -> Iterator[HashMemo]:
    memo = HashMemo(tmp_path / "hashes.sqlite")
    yield memo
    memo.close()


def said(text: str, form: int) -> Any:
    return [
        text,
        [{"role": "assistant", "content": text}],
        [{"role": "assistant", "content": [{"type": "text", "text": text}]}],
    ][form % 3]


def some_rows(seed: int, count: int) -> list[str]:
    """Lines of all sorts: most are plain, the others are broken, odd, too long, or equal in one way or another."""
    rng = random.Random(seed)
    lines = []
    for number in range(count):
        plain = rng.random() < 0.7
        one, other = (
            f"{rng.choice('abc')} {rng.randrange(9)}" if plain else rng.choice(TEXTS) for _ in range(2)
        )
        asked = (f"is it {number // 2}?", f"why {number // 3}") if plain else ("q", "q ", *TEXTS)
        question = rng.choice(asked)
        prompt: Any = [
            question,
            [{"role": "user", "content": question}],
            [{"role": "user", "content": [{"type": "text", "text": question}]}],
            [{"role": "system", "content": "be brief"}, {"role": "user", "content": question}],
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": question},
            ],
        ][rng.randrange(5)]
        row: dict[str, Any] = {
            "prompt": prompt,
            "chosen": said(one, rng.randrange(3)),
            "rejected": said(other, rng.randrange(3)),
        }
        if rng.random() < 0.3:
            row["id"] = number
        odd = rng.random()
        if odd < 0.02:
            row["images"] = ["none.png"]
        elif odd < 0.04:
            row["prompt"] = [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "q"}, {"type": "text", "text": question}],
                }
            ]
        elif odd < 0.06:
            row["prompt"] = [{"role": "tool", "content": question}]
        elif odd < 0.08:
            row.pop(rng.choice(["prompt", "chosen", "rejected"]))
        line = json.dumps(row, ensure_ascii=rng.random() < 0.5)
        lines.append(rng.choice(["", "not json", line + " ", '"text"']) if odd > 0.97 else line)
    return lines


def described(data: prepared.PreparedData) -> dict[str, Any]:
    groups = [
        (g.where, g.prompt_ids.tolist(), [c.tolist() for c in g.completion_ids], g.pairs.tolist(),
         data.lengths(g.number).tolist(), data.pairs(g.number).tolist(), data.images(g.number), data.image_count(g.number))
        for g in data
    ]  # fmt: skip
    counts = [data.pair_count(n) for n in range(len(data))]
    assert data.pair_counts().tolist() == counts
    return {"groups": groups, "account": dataclasses.asdict(data.account), "counts": counts}


@pytest.fixture
def both(
    tmp_path: Path, memo: HashMemo, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, prepared.PreparedData | None]]:
    """Prepares a file whole and lazily and compares everything; the description, or what was said, and the lazy data."""

    def run(
        path: Path,
        chat: ChatTokenizer,
        limit: int | None = None,
        read: Any = read_pair,
        workers: int = 0,
        **settings: Any,
    ) -> tuple[Any, prepared.PreparedData | None]:
        config = DataConfig(train=str(path), **settings)
        found: list[Any] = []
        data = None
        monkeypatch.setattr(row_index, "_CHUNK", 13)
        for rows in (1 << 40, 1):
            monkeypatch.setattr(preparing, "LAZY_FROM", rows)
            if rows == 1 and workers:
                monkeypatch.setattr(row_index, "_SEVERAL", 1)
                monkeypatch.setattr(preparing, "SEVERAL", 1)
                monkeypatch.setattr(prepared, "SEVERAL", 1)
                monkeypatch.setattr(ahead, "processes", lambda: workers)
                monkeypatch.setattr(row_index, "processes", lambda: workers)
                monkeypatch.setattr(preparing, "processes", lambda: workers)
                monkeypatch.setattr(prepared, "processes", lambda: workers)
            before = chat.appended_end
            try:
                data = preparing.prepare(str(path), config, chat, memo, seed=3, limit_pairs=limit, read=read)
                notes = chat.appended_end - before
                found.append(described(data) | ({"notes": notes} if not limit else {}))
            except UserError as error:
                found.append(str(error))
                data = None
        assert found[1] == found[0]
        return found[1], data

    return run


@pytest.fixture
def text_chat(tiny_models: ModuleType) -> Callable[..., ChatTokenizer]:
    def build(
        template: str | None = None, change: Callable[[dict[str, Any]], None] | None = None
    ) -> ChatTokenizer:
        from tokenizers import Tokenizer

        tokenizer = tiny_models.build_tokenizer(template or tiny_models.CHATML, eos="<|im_end|>")
        if change is not None:
            about = json.loads(tokenizer.backend_tokenizer.to_str())
            change(about)
            tokenizer._tokenizer = Tokenizer.from_str(json.dumps(about))
        return ChatTokenizer(tokenizer, [tokenizer.eos_token_id])

    return build


def composes(about: dict[str, Any]) -> None:
    about["normalizer"] = {"type": "NFC"}


def marks_blanks(about: dict[str, Any]) -> None:
    """As LLaMA's: blanks become ▁, one is put in front, and bytes stand for what has no token."""
    vocabulary = {token["content"]: token["id"] for token in about["added_tokens"]}
    for piece in (
        "\u2581",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"abcdefghijklmnopqrstuvwxyz",
        "\u2581t",
        "\u2581th",
        "th",
    ):
        vocabulary.setdefault(piece, len(vocabulary))
    about["model"] |= {"vocab": vocabulary, "merges": [["\u2581", "t"], ["t", "h"], ["\u2581t", "h"]],
                       "byte_fallback": True, "unk_token": "<unk>"}  # fmt: skip
    steps = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    about |= {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": None,
    }


def lazy_share(data: prepared.PreparedData) -> float:
    return float(np.mean([data.is_lazy(number) for number in range(len(data))]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings",
    [
        {"overflow": "drop", "max_length": 400},
        {"overflow": "truncate", "max_length": 400},
        {"overflow": "truncate", "max_length": 300, "limit": 31},
        {"overflow": "drop", "max_length": 420, "limit": 9},
        {"overflow": "error", "max_length": 3000},
        {"overflow": "error", "max_length": 400},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_late_tokens_change_nothing(
    seed: int, settings: dict[str, Any], both: Any, text_chat: Any, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(some_rows(seed, 160)), encoding="utf-8")
    result, data = both(path, text_chat(), on_bad_row="skip", **settings)
    if settings["overflow"] == "error" and settings["max_length"] < 3000:
        assert "wanted at most data.max_length = 400 tokens with its prompt" in result
        return
    assert 0.2 < lazy_share(data) < 1 + ("limit" in settings)
    if settings["overflow"] == "truncate" and "limit" not in settings:
        assert result["account"]["truncated"]


@pytest.mark.parametrize("seed", range(8))
def test_the_first_bad_row_is_the_same(seed: int, both: Any, text_chat: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(some_rows(seed, 160)[10 * seed :]), encoding="utf-8")
    said, _ = both(path, text_chat(), on_bad_row="stop", overflow="drop", workers=2 * (seed == 0))
    assert "pairs.jsonl line" in said


@pytest.mark.parametrize("change", [None, composes, marks_blanks], ids=["bytes", "composed", "blanks"])
@pytest.mark.parametrize(
    ("template", "lazily"),
    [
        (None, True),
        (TRIMS, True),
        (MACRO, True),
        (LOOKS, True),
        (NO_END, True),
        (SHORTENS, False),
        (LEAVES, True),
        (LEAVES.replace("<|im_start|>", "A: "), False),
    ],
    ids=["chatml", "trims", "macro", "looks", "no end", "shortens", "leaves", "leaves within text"],
)
def test_late_tokens_change_nothing_whatever_template_and_tokenizer(
    template: str | None,
    lazily: bool,
    change: Any,
    both: Any,
    text_chat: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(some_rows(20, 120)), encoding="utf-8")
    _, data = both(path, text_chat(template, change), on_bad_row="skip", overflow="truncate", max_length=400)
    assert data.lazy is lazily
    assert ("rows are tokenized before the first step" in capsys.readouterr().err) is not lazily


def test_most_of_a_plain_file_waits_for_its_step(
    both: Any, text_chat: Any, text_pairs: Any, tmp_path: Path
) -> None:
    _, data = both(text_pairs(tmp_path / "pairs.jsonl", 60), text_chat(), workers=2)
    assert lazy_share(data) == 1
    assert data.index_bytes() < 100 * len(data)


def test_other_processes_find_and_tokenize_the_same(both: Any, text_chat: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(some_rows(5, 160)), encoding="utf-8")
    _, data = both(path, text_chat(), workers=2, on_bad_row="skip", overflow="truncate", max_length=400)
    assert 0.2 < lazy_share(data) < 1


def test_answers_to_learn_get_late_tokens_too(both: Any, text_chat: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(some_rows(6, 120)), encoding="utf-8")
    _, data = both(path, text_chat(), read=read_example, on_bad_row="skip", overflow="drop", max_length=400)
    assert lazy_share(data) > 0.2


def test_tokenizing_all_later_gives_the_same(both: Any, text_chat: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(some_rows(7, 120)), encoding="utf-8")
    truth, data = both(path, text_chat(), workers=2, on_bad_row="skip", overflow="drop", max_length=400)
    most = data.longest()
    data.complete()
    assert not data.lazy and described(data) == {
        name: truth[name] for name in ("groups", "account", "counts")
    }
    lengths = [np.array(group[4]) for group in truth["groups"]]
    assert data.longest() == (max(map(sum, lengths)), max(one[0] + one[1:].max() for one in lengths))
    assert most[0] >= data.longest()[0] and most[1] >= data.longest()[1]
    assert data.completions() == sum(len(one) - 1 for one in lengths)


def test_the_longest_group_and_sequence_are_found_where_they_matter(
    both: Any, text_chat: Any, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(some_rows(8, 120)), encoding="utf-8")
    truth, data = both(path, text_chat(), on_bad_row="skip", overflow="drop", max_length=200)
    longest = max(sum(group[4]) for group in truth["groups"])
    for tokens in (1, longest - 1, longest, longest + 1):
        assert data.longest_beyond(tokens) == max(tokens, longest)
    longest = max(group[4][0] + max(group[4][1:]) for group in truth["groups"])
    for tokens in (1, longest - 1, longest, longest + 1):
        assert data.longest_sequence_beyond(tokens) == max(tokens, longest)


@pytest.mark.parametrize("template", [None, LEAVES])
def test_the_bound_of_a_large_group_holds_what_stands_around_its_answers(
    template: str | None, both: Any, text_chat: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": "q", "chosen": f"{n}", "rejected": f"-{n}"} for n in range(150)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    truth, data = both(tmp_path / "pairs.jsonl", text_chat(template))
    assert data.lazy and data.longest()[0] >= sum(truth["groups"][0][4])


# Images: their tokens are known, or depend on sizes that headers tell; files are shared, missing, broken or no images.


def image_rows(folder: Path, seed: int, tiny_models: ModuleType) -> Path:
    rng = random.Random(seed)
    for number in range(6):
        tiny_models.draw_image(folder / "images" / f"{number}.png", seed=number)
    shutil.copy(folder / "images" / "0.png", folder / "images" / "copy.png")
    (folder / "images" / "broken.png").write_bytes(b"no image")
    lines = []
    for _ in range(120):
        names = [
            f"images/{rng.choice((0, 0, 1, 2, 3, 4, 5, 'copy'))}.png"
            for _ in range(rng.choice((0, 1, 1, 1, 2)))
        ]
        if rng.random() < 0.06:
            names = [rng.choice(("images/broken.png", "images/none.png", "../out.png", ""))]
        question = {"type": "text", "text": rng.choice(("what?", "which?"))}
        prompt: Any = [{"role": "user", "content": [{"type": "image"}] * len(names) + [question]}]
        if rng.random() < 0.3:
            prompt = rng.choice(("what?", "<image>" * len(names) + "what?"))
        row = {"prompt": prompt, "chosen": f"good {rng.randrange(5)}", "rejected": f"bad {rng.randrange(5)}"}
        if len(names) == 1 and rng.random() < 0.3:
            row["image"] = names[0]
        elif names or rng.random() < 0.2:
            row["images"] = names
        lines.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def vision_chats(
    tiny_models: ModuleType, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ChatTokenizer]:
    from fasttrain.config import ModelConfig
    from fasttrain.model.load import load_processor, stop_token_ids

    spec = importlib.util.spec_from_file_location(
        "tiny_families", Path(__file__).parent.parent / "tiny_families.py"
    )
    assert spec is not None and spec.loader is not None
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)

    def build(name: str) -> ChatTokenizer:
        folder = tiny_llava
        if name != "llava":
            folder = families.save(tiny_models, tmp_path_factory.mktemp("vision") / name, name)
        processor = load_processor(folder, ModelConfig(name=str(folder)), True)
        return ChatTokenizer(processor, stop_token_ids(processor, folder))

    return build


@pytest.mark.parametrize("name", ["llava", "LLaVA-NeXT", "Qwen2-VL", "Idefics3"])
def test_images_are_placed_counted_and_grouped_the_same(
    name: str, both: Any, vision_chats: Any, tiny_models: ModuleType, tmp_path: Path
) -> None:
    chat = vision_chats(name)
    assert chat.sizes_matter is (name != "llava")
    path = image_rows(tmp_path / "data", 1, tiny_models)
    for settings in ({"on_bad_row": "skip"}, {"on_bad_row": "skip", "limit": 20}, {"on_bad_row": "stop"}):
        result, data = both(path, chat, max_length=2000, overflow="drop", **settings)
        if settings == {"on_bad_row": "skip"}:
            assert lazy_share(data) > 0.5, name
            assert len({entry["reason"].split(",")[0] for entry in result["account"]["skipped"]}) >= 3


def test_a_text_model_still_refuses_images(
    both: Any, text_chat: Any, tiny_models: ModuleType, tmp_path: Path
) -> None:
    result, _ = both(image_rows(tmp_path / "data", 2, tiny_models), text_chat(), on_bad_row="skip")
    assert any(
        "a text-only row for a model that is run on text only (docs/models.md)" in entry["reason"]
        for entry in result["account"]["skipped"]
    )


def test_a_broken_image_beyond_the_headers_looked_at_stops_when_it_is_met(
    vision_chats: Any, memo: HashMemo, vision_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data.on_bad_row stop only so many files are opened at the start; with skip all are."""
    path = vision_pairs(tmp_path / "v", 9, images=(1,), per_prompt=(3,))
    (tmp_path / "v" / "images" / "2.png").write_bytes(b"text")
    monkeypatch.setattr(preparing, "LAZY_FROM", 1)
    monkeypatch.setattr(preparing, "HEADERS", 2)
    chat = vision_chats("llava")
    data = preparing.prepare(str(path), DataConfig(train=str(path)), chat, memo, seed=0)
    assert data.account.pairs == 9
    with pytest.raises(
        UserError, match=r"line 7: images: wanted an image, got .*2\.png \(not a file of type"
    ):
        data.group(2)
    left = preparing.prepare(str(path), DataConfig(train=str(path), on_bad_row="skip"), chat, memo, seed=0)
    assert left.account.pairs == 6 and len(left.account.skipped) == 3


def test_embedded_images_and_foreign_layouts_get_late_tokens_too(
    both: Any, vision_chats: Any, tiny_models: ModuleType, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image_rows(tmp_path, 3, tiny_models)
    contents = [(tmp_path / "images" / f"{n}.png").read_bytes() for n in (0, 1, 2, "copy", "broken")]
    rows = [
        {
            "prompt": f"q{n % 3}",
            "images": [{"bytes": contents[n % 5], "path": None}],
            "chosen": f"a{n}",
            "rejected": "b",
        }
        for n in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet", row_group_size=7)
    chat = vision_chats("llava")
    _, data = both(tmp_path / "pairs.parquet", chat, on_bad_row="skip")
    assert 0.5 < lazy_share(data) <= 1
    sharegpt = [
        {"conversations": [{"from": "human", "value": f"<image>q{n % 3}"}], "images": [str(tmp_path / "images" / f"{n % 3}.png")],
         "chosen": {"from": "gpt", "value": f"a{n}"}, "rejected": {"from": "gpt", "value": "b"}}
        for n in range(20)
    ]  # fmt: skip
    (tmp_path / "pairs.json").write_text(json.dumps(sharegpt))
    _, data = both(tmp_path / "pairs.json", chat, image_root=str(tmp_path))
    assert lazy_share(data) == 1


def test_a_file_that_changes_under_a_run_is_noticed(
    text_chat: Any, memo: HashMemo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "q", "chosen": "aa", "rejected": "bb"}\n')
    monkeypatch.setattr(preparing, "LAZY_FROM", 1)
    data = preparing.prepare(str(path), DataConfig(train=str(path)), text_chat(), memo, seed=0)
    with path.open("r+") as file:
        file.write('{"prompt": "q", "chosen": "bb"')
    with pytest.raises(
        UserError,
        match=r"line 1: rejected: wanted .* \(the file has changed since its rows were first read\)",
    ):
        data.group(0)
