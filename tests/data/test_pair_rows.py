"""Rows of pair files: every accepted form means the same pair, and what cannot be used is named by its field."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path
from typing import Any

import pytest

from fasttrain.data.bad_row import BadRow
from fasttrain.data.images import ImageRef
from fasttrain.data.pairs import IMAGE, Pair, check_images, read_example, read_pair
from fasttrain.data.plain_rows import PlainPair, PlainRows

SHORT = {"prompt": "What is it?", "chosen": "a bar", "rejected": "a line"}


def png(seed: int = 0, size: tuple[int, int] = (9, 7)) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, (seed, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "deep/c.png")):
        (folder / name).write_bytes(png(number))
    (tmp_path / "outside.png").write_bytes(png(9))
    return folder


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def read(row: dict[str, Any], root: Path) -> Pair:
    return read_pair(row, "pairs.jsonl line 3", root)


def refused(row: dict[str, Any], root: Path) -> str:
    """What is said about a bad row, after the place it is in."""
    with pytest.raises(BadRow) as caught:
        check_images(read(row, root))
    assert str(caught.value) == f"pairs.jsonl line 3: {caught.value.reason}"
    caught.value.reason.encode()  # can be written to skipped.jsonl
    return caught.value.reason


def meaning(pair: Pair) -> tuple[Any, ...]:
    return pair.messages, tuple(ref.path or ref.content for ref in pair.images), pair.chosen, pair.rejected


# One text pair in every accepted form.
QUESTION = [turn("user", "What is it?")]
PARTS = [turn("user", [text("What is it?")])]
TEXT_FORMS: dict[str, dict[str, Any]] = {
    "short": SHORT,
    "explicit, strings": {
        "prompt": QUESTION,
        "chosen": [turn("assistant", "a bar")],
        "rejected": [turn("assistant", "a line")],
    },
    "explicit, parts": {
        "prompt": PARTS,
        "chosen": [turn("assistant", [text("a bar")])],
        "rejected": [turn("assistant", [text("a line")])],
    },
    "answers in several parts": {
        "prompt": PARTS,
        "chosen": [turn("assistant", [text("a "), text("bar")])],
        "rejected": "a line",
    },
    "implicit prompt": {
        "chosen": [*QUESTION, turn("assistant", "a bar")],
        "rejected": [*QUESTION, turn("assistant", "a line")],
    },
    "null fields as Arrow fills them": {
        "id": None,
        "image": None,
        "images": None,
        "tools": None,
        "prompt": [{"role": "user", "content": [text("What is it?", image=None)], "name": None}],
        "chosen": [turn("assistant", [text("a bar", image=None)]) | {"tool_calls": None, "thinking": None}],
        "rejected": [
            turn("assistant", [text("a line", image=None)]) | {"tool_calls": [], "reasoning_content": ""}
        ],
    },
    "no images given": {**SHORT, "images": []},
    "no tools given": {**SHORT, "tools": []},
    "no videos and no audios": {**SHORT, "videos": [], "audios": None},
    "no options of the template": {**SHORT, "chat_template_kwargs": {}},
    "no variables of the template": {
        **SHORT,
        "chat_template_kwargs": {"enable_thinking": None},
        "tools": "null",
    },
    "no tools given, as text": {**SHORT, "tools": ""},
    "no tools given, as LLaMA-Factory writes it": {**SHORT, "tools": "[]"},
}


@pytest.mark.parametrize("form", TEXT_FORMS)
def test_every_form_of_a_text_row_means_the_same(form: str, root: Path) -> None:
    pair = read(TEXT_FORMS[form], root)
    assert meaning(pair) == ((("user", (("text", "What is it?"),)),), (), "a bar", "a line")
    assert PlainPair.of(pair).key() == PlainPair.of(read(SHORT, root)).key()


# One pair with one image in every accepted form.
IMAGE_FORMS: dict[str, dict[str, Any]] = {
    "short, placeholder put in front": {**SHORT, "images": ["a.png"]},
    "image instead of images": {**SHORT, "image": "a.png"},
    "one path instead of a list": {**SHORT, "images": "a.png"},
    "image beside empty images": {**SHORT, "image": "a.png", "images": []},
    "path in a dict, as datasets gives it": {**SHORT, "images": [{"path": "a.png", "bytes": None}]},
    "literal placeholder in front": {**SHORT, "prompt": "<image>\nWhat is it?", "images": ["a.png"]},
    "literal placeholder without line break": {**SHORT, "prompt": "<image>What is it?", "images": ["a.png"]},
    "explicit placeholder": {
        **SHORT,
        "prompt": [turn("user", [{"type": "image"}, text("What is it?")])],
        "images": ["a.png"],
    },
    "explicit placeholder with null text": {
        **SHORT,
        "prompt": [turn("user", [{"type": "image", "text": None}, text("What is it?")])],
        "images": ["a.png"],
    },
    "no placeholder in a conversation": {**SHORT, "prompt": QUESTION, "images": ["a.png"]},
    "implicit prompt": {
        "chosen": [*PARTS, turn("assistant", "a bar")],
        "rejected": [*PARTS, turn("assistant", "a line")],
        "images": ["a.png"],
    },
    "roundabout path": {**SHORT, "images": ["deep/../a.png"]},
}


@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_every_form_of_an_image_row_means_the_same(form: str, root: Path) -> None:
    messages, images, *answers = meaning(read(IMAGE_FORMS[form], root))
    assert messages == (("user", (IMAGE, ("text", "What is it?"))),)
    assert images == ((root / "a.png").resolve(),) and answers == ["a bar", "a line"]


@pytest.mark.parametrize(
    "image",
    [
        {"bytes": png(), "path": "elsewhere/a.png"},
        {"bytes": png(), "path": None},
        {"bytes": {"base64": base64.b64encode(png()).decode()}},
    ],
)
def test_embedded_bytes_are_the_image_whatever_the_path_says(image: dict[str, Any], root: Path) -> None:
    pair = read({**SHORT, "images": [image]}, root)
    assert pair.images == (ImageRef(content=png()),)
    check_images(pair)


def test_several_images_keep_their_places_over_several_turns(root: Path) -> None:
    prompt = [
        turn("system", "Be brief."),
        turn("user", [{"type": "image"}, text("first"), {"type": "image"}]),
        turn("assistant", "yes"),
        turn("user", [text("second"), {"type": "image"}]),
    ]
    pair = read({**SHORT, "prompt": prompt, "images": ["b.png", "a.png", "deep/c.png"]}, root)
    assert pair.messages == (
        ("system", (("text", "Be brief."),)),
        ("user", (IMAGE, ("text", "first"), IMAGE)),
        ("assistant", (("text", "yes"),)),
        ("user", (("text", "second"), IMAGE)),
    )
    assert [ref.path for ref in pair.images] == [
        (root / n).resolve() for n in ("b.png", "a.png", "deep/c.png")
    ]


def test_unplaced_images_go_in_front_of_the_first_user_turn(root: Path) -> None:
    prompt = [turn("system", "x"), turn("user", "one"), turn("assistant", "two"), turn("user", "three")]
    messages = read({**SHORT, "prompt": prompt, "images": ["a.png", "b.png"]}, root).messages
    assert messages[1] == ("user", (IMAGE, IMAGE, ("text", "one")))
    assert [part for _, parts in (messages[0], *messages[2:]) for part in parts if part == IMAGE] == []


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("<image>\nWhat?", (IMAGE, ("text", "What?"))),
        ("What?\n<image>", (("text", "What?"), IMAGE)),
        ("What?<image>", (("text", "What?"), IMAGE)),
        ("Left <image> of", (("text", "Left "), IMAGE, ("text", " of"))),
        ("<image>", (IMAGE,)),
        ("<image>\n\nWhat?", (IMAGE, ("text", "\nWhat?"))),
    ],
)
def test_a_literal_placeholder_becomes_an_image_and_takes_its_line_break(
    prompt: str, parts: tuple[Any, ...], root: Path
) -> None:
    assert read({**SHORT, "prompt": prompt, "images": ["a.png"]}, root).messages == (("user", parts),)


def test_two_literal_placeholders_stand_for_two_images(root: Path) -> None:
    row = {**SHORT, "prompt": "<image>\n<image>\nWhich?", "images": ["a.png", "b.png"]}
    assert read(row, root).messages == (("user", (IMAGE, IMAGE, ("text", "Which?"))),)


def test_a_prompt_may_be_an_image_alone(root: Path) -> None:
    assert IMAGE in read({**SHORT, "prompt": "", "images": ["a.png"]}, root).messages[0][1]
    assert read({**SHORT, "prompt": [turn("user", [{"type": "image"}])], "images": ["a.png"]}, root)


def test_a_placeholder_in_a_row_without_images_stays_text(root: Path) -> None:
    assert read({**SHORT, "prompt": "the tag <image>"}, root).messages == (
        ("user", (("text", "the tag <image>"),)),
    )


def test_a_pair_is_named_by_its_id_or_its_place(root: Path) -> None:
    assert read({**SHORT, "id": "x-1"}, root).id == "x-1"
    assert read({**SHORT, "id": 17}, root).id == "17"
    assert read({**SHORT, "id": None}, root).id == read(SHORT, root).id == "pairs.jsonl line 3"
    assert read({**SHORT, "id": "\ud800"}, root).id == "\\ud800"


def test_keys_tell_prompts_apart(root: Path) -> None:
    prompts = [
        "What is it?",
        "What is it? ",
        [turn("system", "What is it?"), turn("user", "")],
        [turn("user", [text("What is"), text(" it?")])],
        [turn("user", "What is it?"), turn("assistant", "x"), turn("user", "y")],
        [turn("user", "What is it?"), turn("assistant", "y"), turn("user", "x")],
    ]
    keys = {PlainPair.of(read({**SHORT, "prompt": prompt}, root)).key() for prompt in prompts}
    assert len(keys) == len(prompts)
    with_image = read({**SHORT, "images": ["a.png"]}, root)
    assert PlainPair.of(with_image).key() not in keys


LONG_TURNS = [turn("user", "a"), turn("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "chosen": "a"}, "rejected: wanted an answer, got nothing; the row has prompt, chosen"),
        ({"prompt": "q", "chosen": None, "rejected": "a"}, "chosen: wanted an answer, got nothing"),
        ({"chosen": "q a", "rejected": "q b"}, "prompt: wanted a prompt, got nothing"),
        ({**SHORT, "chosen": ""}, "chosen: wanted a non-empty answer, got ''"),
        ({**SHORT, "rejected": " \n"}, "rejected: wanted a non-empty answer, got ' \\n'"),
        ({**SHORT, "chosen": 3}, "chosen: wanted text, got 3"),
        ({**SHORT, "chosen": "\ud800"}, "chosen: wanted valid Unicode, got a lone surrogate"),
        ({**SHORT, "prompt": "a\udfff"}, "prompt: wanted valid Unicode, got a lone surrogate"),
        ({**SHORT, "rejected": "a bar"}, "rejected: wanted an answer that differs from chosen, got the same"),
        ({**SHORT, "rejected": [turn("assistant", [text("a bar")])]}, "rejected: wanted an answer that differs"),
        ({**SHORT, "chosen": [turn("user", "a")]}, "chosen: wanted one message by the assistant"),
        ({**SHORT, "chosen": []}, "chosen: wanted one message by the assistant"),
        ({**SHORT, "chosen": [*LONG_TURNS, *LONG_TURNS]}, "chosen: wanted one message by the assistant"),
        ({**SHORT, "chosen": [turn("assistant", [{"type": "image"}])]}, "chosen: wanted text only, got an image"),
        ({"prompt": "q", "completion": "a"}, "chosen: wanted a pair, got one answer to learn, which is for fasttrain sft"),
        ({**SHORT, "prompt": ""}, "prompt: wanted some text or an image, got an empty prompt"),
        ({**SHORT, "prompt": []}, "prompt: wanted text or a list of messages, got []"),
        ({**SHORT, "prompt": 3}, "prompt: wanted text or a list of messages, got 3"),
        ({**SHORT, "prompt": ["q"]}, "prompt: wanted messages with role and content, got q"),
        ({**SHORT, "prompt": [{"content": "q"}]}, "prompt: wanted messages with role and content"),
        ({**SHORT, "prompt": [turn("user", None)]}, "prompt: wanted text or a list of parts, got None"),
        ({**SHORT, "prompt": [turn("user", [text(None)])]}, "prompt: wanted text, got None"),
        ({**SHORT, "prompt": [turn("\ud800", "q")]}, "prompt: wanted valid Unicode"),
        ({**SHORT, "prompt": LONG_TURNS}, "prompt: wanted a last message by the user, got one by 'assistant'"),
        (
            {**SHORT, "prompt": [turn("user", [{"type": "image_url", "image_url": "x"}])]},
            'prompt: wanted parts of type "text" or "image", and image files under images, got {',
        ),
        (
            {**SHORT, "prompt": [turn("user", "a"), turn("assistant", "") | {"tool_calls": [{}]}, turn("tool", "b")]},
            "prompt: wanted messages without tool_calls",
        ),
        *(
            ({**SHORT, field: [turn(role, text) | {name: value}]}, f"{field}: wanted messages without {name}, got ")
            for name, value in (("tool_calls", [{}]), ("reasoning_content", "so"), ("thinking", "so"), ("reasoning", "so"))
            for field, role, text in (("prompt", "user", "q"), ("chosen", "assistant", "a"), ("rejected", "assistant", None))
        ),
        (
            {"chosen": [*QUESTION, turn("assistant", "x") | {"thinking": "so"}], "rejected": [*QUESTION, turn("assistant", "y")]},
            "chosen: wanted messages without thinking, got so",
        ),
        ({**SHORT, "tools": [{"type": "function"}]}, "tools: wanted a row without tools, got [{'type': 'function'}]"),
        ({**SHORT, "tools": '[{"type": "function"}]'}, "tools: wanted a row without tools, got [{"),
        ({**SHORT, "videos": ["a.mp4"]}, "videos: wanted a row without videos, got ['a.mp4']"),
        (
            {**SHORT, "chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs: wanted a row without chat_template_kwargs, got {'enable_thinking': False}",
        ),
        ({**SHORT, "audios": ["a.wav"]}, "audios: wanted a row without audios, got ['a.wav']"),
        (
            {"chosen": [turn("user", "a"), turn("assistant", "x")], "rejected": [turn("user", "b"), turn("assistant", "y")]},
            "prompt: wanted a prompt, or conversations that begin alike, got neither",
        ),
        (
            {"chosen": [*QUESTION, turn("assistant", "x")], "rejected": [*QUESTION, turn("assistant", "x")]},
            "rejected: wanted an answer that differs from chosen",
        ),
        ({**SHORT, "prompt": "<image>", "images": ["a.png", "b.png"]}, "images: wanted as many images as placeholders in the prompt (1), got 2"),
        ({**SHORT, "prompt": "<image><image>", "images": ["a.png"]}, "images: wanted as many images as placeholders in the prompt (2), got 1"),
        ({**SHORT, "prompt": [turn("user", [{"type": "image"}, text("q")])]}, "(1), got none under images or image"),
        ({**SHORT, "image": "a.png", "images": ["a.png"]}, "image: wanted one of image and images, got both"),
        ({**SHORT, "images": [None]}, "images: wanted an image path or embedded bytes, got None"),
        ({**SHORT, "images": [""]}, "images: wanted an image path or embedded bytes, got ''"),
        ({**SHORT, "image": 3}, "image: wanted an image path or embedded bytes, got 3"),
        ({**SHORT, "images": [{"bytes": "iVBORw0KGgo="}]}, "images: wanted an image path or embedded bytes"),
        ({**SHORT, "images": [{"bytes": {"base64": "a"}}]}, "images: wanted base64 image bytes, got broken base64"),
        ({**SHORT, "images": [{"bytes": {"base64": "é"}}]}, "images: wanted base64 image bytes, got broken base64"),
        ({**SHORT, "images": [{"bytes": b"text"}]}, "images: wanted an image, got embedded image ("),
        ({**SHORT, "images": ["none.png"]}, "images: wanted an existing image file, got "),
        ({**SHORT, "images": ["deep"]}, "images: wanted an existing image file, got "),
        ({**SHORT, "images": ["a.png/x"]}, "images: wanted an existing image file, got "),
        ({**SHORT, "images": [400 * "A"]}, "images: wanted the path of an image (File name too long)"),
        ({**SHORT, "images": ["a\0.png"]}, "images: wanted a path without NUL characters"),
        ({**SHORT, "images": ["\ud800.png"]}, "images: wanted a path without NUL characters and lone surrogates"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named_by_its_field(row: dict[str, Any], said: str, root: Path) -> None:
    assert said in refused(row, root)


@pytest.mark.parametrize(
    "name", ["../outside.png", "deep/../../outside.png", "{tmp}/outside.png", "link.png"]
)
def test_a_path_that_leaves_the_image_root_is_refused(name: str, root: Path) -> None:
    (root / "link.png").symlink_to(root.parent / "outside.png")
    row = {**SHORT, "images": [name.format(tmp=root.parent)]}
    assert "images: wanted a path inside the image root" in refused(row, root)


def test_a_linked_folder_that_leaves_the_image_root_is_refused(root: Path) -> None:
    (root / "elsewhere").symlink_to(root.parent)
    assert "inside the image root" in refused({**SHORT, "images": ["elsewhere/outside.png"]}, root)


def test_links_and_absolute_paths_inside_the_image_root_are_fine(root: Path) -> None:
    (root / "link.png").symlink_to("deep/c.png")
    for name in ("link.png", str(root / "deep/c.png")):
        assert read({**SHORT, "images": [name]}, root).images[0].path == (root / "deep/c.png").resolve()


def test_a_long_value_is_shown_in_part(root: Path) -> None:
    assert len(refused({**SHORT, "chosen": [turn("user", "x" * 10_000)]}, root)) < 250


def test_a_prompt_that_the_conversations_repeat_is_read_once(root: Path) -> None:
    """ultrafeedback_binarized has the question as a column and in both conversations."""
    shared = [turn("system", "Be brief."), turn("user", "Why?")]
    row = {
        "prompt": "Why?",
        "chosen": [*shared, turn("assistant", "good")],
        "rejected": [*shared, turn("assistant", "bad")],
    }
    parts = [turn("system", "Be brief."), turn("user", [{"type": "text", "text": "Why?"}])]
    in_parts = {key: value if key == "prompt" else [*parts, value[-1]] for key, value in row.items()}
    for read_one in (read, lambda row, root: read_example(row, "x line 1", root)):
        assert read_one(in_parts, root) == read_one(row, root)
        pair = read_one(row, root)
        assert [(role, parts) for role, parts in pair.messages] == [
            ("system", (("text", "Be brief."),)),
            ("user", (("text", "Why?"),)),
        ]
        assert pair.chosen == "good"
        with pytest.raises(
            BadRow, match="prompt: wanted the last question that the conversations share, or none"
        ):
            read_one(row | {"prompt": "How?"}, root)
    with pytest.raises(BadRow, match="prompt: wanted a prompt, or conversations that begin alike"):
        read(row | {"chosen": row["chosen"][1:]}, root)


def test_an_unwanted_answer_of_unpaired_preferences_is_not_learned(root: Path) -> None:
    row = {"prompt": QUESTION, "completion": [turn("assistant", "a bar")]}
    with pytest.raises(BadRow, match="label: wanted an answer to learn, got false: one that is not wanted"):
        read_example(row | {"label": False}, "x line 1", root)
    for label in (True, None, 0, "no"):  # 0 and words are classes of other data
        assert read_example(row | {"label": label}, "x line 1", root).chosen == "a bar"


def test_an_answer_to_learn_is_refused_with_what_would_not_be_learned(root: Path) -> None:
    row = {"prompt": QUESTION, "completion": [turn("assistant", "a bar") | {"reasoning_content": "so"}]}
    with pytest.raises(BadRow, match="completion: wanted messages without reasoning_content, got so"):
        read_example(row, "answers.jsonl line 3", root)
    with pytest.raises(BadRow, match="tools: wanted a row without tools"):
        read_example({"prompt": QUESTION, "completion": "a bar", "tools": [{}]}, "answers.jsonl line 3", root)


def test_the_quick_way_reads_what_read_pair_reads_and_nothing_that_it_refuses(root: Path) -> None:
    """Rows put together at random from sound and unsound pieces, by the thousand."""
    rng = random.Random(5)
    texts = ["What is it?", "a bar", " ", "", "a\ud800", "é <image>", "<image>", 7, None]
    names = ["a.png", "b.png", "none.png", "../a.png", "", 3, {"path": "a.png"}]

    def part(value: Any) -> Any:
        return rng.choice([text(value), {"type": "image"}, {"type": "video"}, value, {"text": value}])

    def content() -> Any:
        value = rng.choice(texts[: rng.choice([1, 1, 1, 2, 2, 9])])
        return rng.choice(
            [
                value,
                [text(value)],
                [text(value)],
                [{"type": "image"}, text(value)],
                [part(value), part(value)],
                [],
            ]
        )

    def message(role: str) -> Any:
        made = {"role": rng.choice([role] * 9 + ["system", "tool", 3]), "content": content()}
        more = {
            rng.choice(["tool_calls", "reasoning_content", "thinking", "name"]): rng.choice([None, "x", [1]])
        }
        return rng.choice([made] * 14 + [{**made, **more}] * 2 + [{"content": "x"}, "x"])

    def row() -> dict[str, Any]:
        made: dict[str, Any] = {
            "prompt": rng.choice(
                [content(), [message("user")], [message("system"), message("user")], [message("user")] * 2]
            ),
            "chosen": rng.choice([content(), [message("assistant")]]),
            "rejected": rng.choice(["a line"] * 6 + [content(), [message("assistant")], [text("no")]]),
        }
        if rng.random() < 0.5:
            made["images"] = rng.choice(
                [None, [], "a.png", *([rng.choice(names[: rng.choice([1, 2, 7])])] * n for n in (1, 1, 2))]
            )
        if rng.random() < 0.1:
            made["image"] = rng.choice(names)
        if rng.random() < 0.05:
            made[rng.choice(["tools", "videos"])] = rng.choice([None, [], "", "[]", [{}], "[{}]"])
        return {key: value for key, value in made.items() if rng.random() < 0.98}

    plain = PlainRows()
    quick = refused = 0
    for _ in range(6000):
        made = row()
        found = plain.read(made, root)
        try:
            truth = PlainPair.of(read(made, root))
        except BadRow:
            truth, refused = None, refused + 1
        assert found is None or found == truth, made
        quick += found is not None
    assert quick > 150 and refused > 1000
