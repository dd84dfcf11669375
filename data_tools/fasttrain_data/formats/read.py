"""Readers: one record of another project's layout -> one TRL vision row (or none, with a reason)."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fasttrain_data.errors import BadRow, UserError, shorten
from fasttrain_data.formats.detect import FORMATS, detect_format, first_keys
from fasttrain_data.formats.messages import (
    Message,
    Place,
    answer,
    check_answer,
    message,
    parts_of,
    place_images,
    turn_of,
    turns_of,
)
from fasttrain_data.formats.scored import read_helpsteer, read_helpsteer3, read_vlfeedback
from fasttrain_data.formats.table_rows import first_of, iterate_rows
from fasttrain_data.ids import content_hash
from fasttrain_data.image_files import data_url_bytes
from fasttrain_data.jsonl import Row, is_unicode

Skipped = Callable[[str, str], None]
_LOGPS = (
    "ref_win_logp",
    "ref_rej_logp",
    "ref_win_avg_logp",
    "ref_rej_avg_logp",
    "ref_win_per_token_logp",
    "ref_rej_per_token_logp",
)
_MS_SWIFT = (
    "messages",
    "system",
    "rejected_response",
    "rejected_messages",
    "images",
    "image",
    "rejected_images",
)


def read_pairs(
    path: Path | str,
    form: str | None = None,
    skipped: Skipped | None = None,
    bad: Callable[[BadRow], object] | None = None,
    split: str | None = None,
) -> Iterator[Row]:
    """TRL vision rows of a preference file, streamed; see the package's docstring for their keys.

    form: a name from FORMATS; None lets the first row decide. split: which of a folder's several, UserError if it is
    not named. BadRow (file, place, field, wanted, got) for the
    first row that is wrong, unless `bad` takes it and reading goes on. Records that hold no preference (ties, one answer only) are passed over and told to
    `skipped(where, reason)`. Scored candidates become pairs by the paper's rule (HelpSteer: margin 2 on
    helpfulness + correctness + coherence) or best against worst mean rating (VLFeedback).
    """
    path = Path(path)
    form = form or detect_format(path, split)
    if form is None:
        raise UserError(
            f"{path}: wanted a preference file of one of: {', '.join(FORMATS)}; got {shorten(first_keys(path, split))}"
        )
    if form not in FORMATS:
        raise UserError(f"--format: wanted one of {', '.join(FORMATS)}, got {form!r}")
    tell = skipped or (lambda where, reason: None)
    rows = iterate_rows(path, bad, split)
    if form == "helpsteer":
        yield from read_helpsteer(rows, tell, bad)
        return
    reader = _READERS[form]
    for file, name, row in rows:
        place = Place(file, name)
        try:
            result = reader(row, place)
            pair = result if isinstance(result, str) else _finish(row, result, place)
        except BadRow as error:
            if bad is None:
                raise
            bad(error)
            continue
        if isinstance(pair, str):
            tell(f"{file} {name}", pair)
        else:
            yield pair


def _finish(row: Row, pair: Row, place: Place) -> Row:
    """Check texts and images, give an id."""
    for key in ("chosen", "rejected"):
        check_answer(pair[key], key, place)
    if pair["chosen"] == pair["rejected"]:
        raise place.bad("rejected", "an answer that differs from chosen", "the same answer")
    images = images_of(pair.pop("images"), place)
    prompt = place_images(pair.pop("prompt"), len(images), place)
    chosen, rejected = pair.pop("chosen"), pair.pop("rejected")
    named = next((row[key] for key in ("id", "idx") if row.get(key) not in (None, "")), None)
    if named is None:
        paths = [image if isinstance(image, str) else image.get("path") for image in images]
        named = content_hash(paths, prompt, chosen, rejected)
    fixed = {"images": images, "prompt": prompt, "chosen": answer(chosen), "rejected": answer(rejected)}
    return {"id": str(named), **fixed, **{key: value for key, value in pair.items() if key != "id"}}


def images_of(value: Any, place: Place) -> list[Any]:
    """A list of paths and {"bytes", "path"} dicts from what a row has as image(s)."""
    if value is None:
        return []
    result: list[Any] = []
    for image in value if isinstance(value, list) else [value]:
        if isinstance(image, dict) and isinstance(image.get("bytes"), bytes) and image["bytes"]:
            result.append({"bytes": image["bytes"], "path": image.get("path")})
        elif isinstance(image, dict) and isinstance(image.get("path"), str):
            result.append(image["path"])
        elif isinstance(image, str) and image.startswith("data:"):
            content = data_url_bytes(image)
            if content is None:
                raise place.bad("images", "a data URL with base64", image)
            result.append({"bytes": content, "path": None})
        elif isinstance(image, str) and image and is_unicode(image):
            result.append(image)
        else:
            raise place.bad("images", "an image path or embedded bytes", image)
    return result


def other_columns(row: Row, *taken: str) -> Row:
    """The columns that have no meaning of their own here; log-probs under a name no trainer trusts."""
    rest = {key: value for key, value in row.items() if key not in taken and key not in _LOGPS}
    foreign = {key: row[key] for key in _LOGPS if row.get(key) is not None}
    if row.get("logps") is not None:
        foreign["logps"] = _parsed(rest.pop("logps"))
    return {**rest, **({"foreign_logps": foreign} if foreign else {})}


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _read_trl(row: Row, place: Place) -> Row | str:
    """Explicit or implicit prompt, or one that is also at the end of what the conversations share; messages or strings."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    said, whole = prompt, all(isinstance(side, list) and len(side) > 1 for side in (chosen, rejected))
    if prompt is None or (isinstance(prompt, str) and whole):
        if not (isinstance(chosen, list) and isinstance(rejected, list)):
            raise place.bad("prompt", "a prompt", None)
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        if not shared:
            raise place.bad("prompt", "a prompt, or conversations that begin alike", "neither")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if said is not None and _text_of(_messages(prompt, place)[-1]) != _text_of(message("user", said)):
            raise place.bad("prompt", "the last question that the conversations share, or none", said)
    return {
        **other_columns(row, "prompt", "chosen", "rejected", "images", "image"),
        "images": first_of(row, "images", "image"),
        "prompt": _messages(prompt, place),
        "chosen": _answer_text(chosen, "chosen", place),
        "rejected": _answer_text(rejected, "rejected", place),
    }


def _text_of(said: Message) -> str:
    return "".join(part["text"] for part in said["content"] if part["type"] == "text")


def _messages(prompt: Any, place: Place) -> list[Message]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise place.bad("prompt", "text or a list of messages", prompt)
    messages = []
    for turn in prompt:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise place.bad("prompt", "messages with role and content", turn)
        place.check_read(turn, "prompt")
        messages.append(
            {"role": turn["role"], "content": message_parts(turn.get("content"), "prompt", place)}
        )
    if messages[-1]["role"] != "user":
        raise place.bad("prompt", "a last message by the user", f"one by {messages[-1]['role']}")
    return messages


def message_parts(content: Any, field: str, place: Place) -> list[dict[str, str]]:
    """Content that is text, in which `<image>` stands for an image, or a list of parts."""
    if isinstance(content, str):
        return parts_of(content)
    if not isinstance(content, list):
        raise place.bad(field, "text or a list of parts", content)
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text":
            parts.append({"type": "text", "text": place.text(part.get("text"), field)})
        else:
            raise place.bad(field, 'parts of type "text" or "image", and image files under images', part)
    return parts


def _answer_text(value: Any, field: str, place: Place) -> str:
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            raise place.bad(field, "one message by the assistant", value)
        place.check_read(value[0], field)
        parts = message_parts(value[0].get("content"), field, place)
        if any(part["type"] == "image" for part in parts):
            raise place.bad(field, "text only", "an image")
        return "".join(part["text"] for part in parts)
    return place.text(value, field)


def _read_ultrafeedback(row: Row, place: Place) -> Row | str:
    """chosen and rejected are whole conversations, whose beginning, which they share, is the prompt."""
    if row.get("chosen-rating") == row.get("rejected-rating"):
        return "tie"
    whole = all(isinstance(row.get(key), list) and len(row[key]) > 1 for key in ("chosen", "rejected"))
    return _read_trl({**row, "prompt": None} if whole else row, place)


def _read_llama_factory(row: Row, place: Place) -> Row | str:
    field = "conversations" if "conversations" in row else "messages"
    turns = _with_system(turns_of(row.get(field), field, place), row, place)
    if not turns or turns[-1][0] != "user":
        raise place.bad(field, "a last turn by the human", turns[-1][0] if turns else None)
    return {
        **other_columns(row, field, "chosen", "rejected", "images", "image", "system"),
        "images": first_of(row, "images", "image"),
        "prompt": [message(role, text) for role, text in turns],
        "chosen": turn_of(row.get("chosen"), "chosen", place)[1],
        "rejected": turn_of(row.get("rejected"), "rejected", place)[1],
    }


def _with_system(turns: list[tuple[str, str]], row: Row, place: Place) -> list[tuple[str, str]]:
    """Turns behind the one that a column `system` stands for; a system turn counts before it, as for these projects."""
    if not row.get("system") or (turns and turns[0][0] == "system"):
        return turns
    return [("system", place.text(row["system"], "system")), *turns]


def _read_ms_swift(row: Row, place: Place) -> Row | str:
    turns = turns_of(row.get("messages"), "messages", place)
    if len(turns) < 2 or turns[-1][0] != "assistant" or turns[-2][0] != "user":
        raise place.bad(
            "messages", "a question by the user and the chosen answer at the end", [r for r, _ in turns]
        )
    refuse_boxes(row, (text for _, text in turns), place)
    images = first_of(row, "images", "image")
    if row.get("rejected_images") and row["rejected_images"] != images:
        raise place.bad("rejected_images", "the images of both answers", row["rejected_images"])
    rejected = row.get("rejected_response")
    if rejected is None:
        other = turns_of(row.get("rejected_messages"), "rejected_messages", place)
        if not other or other[-1][0] != "assistant" or other[:-1] != turns[:-1]:
            wanted = "the conversation of messages with another answer at its end"
            raise place.bad("rejected_messages", wanted, row.get("rejected_messages"))
        rejected = other[-1][1]
    if isinstance(rejected, list):
        if len(rejected) != 1:
            raise place.bad("rejected_response", "one rejected answer", f"{len(rejected)} of them")
        rejected = rejected[0]
    return {
        **other_columns(row, *_MS_SWIFT),
        "images": images,
        "prompt": [message(role, text) for role, text in _with_system(turns[:-1], row, place)],
        "chosen": turns[-1][1],
        "rejected": place.text(rejected, "rejected_response"),
    }


def refuse_boxes(row: Row, texts: Iterable[str], place: Place) -> None:
    """BadRow for tags in the texts that ms-swift replaces by names and boxes of `objects`."""
    if row.get("objects") and any(tag in text for text in texts for tag in ("<ref-object>", "<bbox>")):
        raise place.bad("objects", "names and boxes written out in the messages", row["objects"])


def _read_alpaca(row: Row, place: Place) -> Row | str:
    """LLaMA-Factory's rankings in the alpaca form; also Argilla's columns, as Axolotl's `icr` and `argilla` types read them."""
    sides = {
        side: side if row.get(side) is not None else f"{side}_response" for side in ("chosen", "rejected")
    }
    return {
        **other_columns(row, "instruction", "input", "history", "system", "images", "image", *sides.values()),
        "images": first_of(row, "images", "image"),
        "prompt": alpaca_prompt(row, place),
        **{side: place.text(row.get(key), key) for side, key in sides.items()},
    }


def alpaca_prompt(row: Row, place: Place) -> list[Message]:
    """System turn, earlier questions and answers, and the question: instruction, line break, input, as far as they are there."""
    question = "\n".join(place.text(row[key], key) for key in ("instruction", "input") if row.get(key))
    if not question:
        raise place.bad("instruction", "a question in instruction or input", row.get("instruction"))
    turns = []
    for said in row.get("history") or []:
        if not isinstance(said, list) or len(said) != 2:
            raise place.bad("history", "pairs of a question and its answer", said)
        turns += [("user", place.text(said[0], "history")), ("assistant", place.text(said[1], "history"))]
    turns = _with_system([*turns, ("user", question)], row, place)
    return [message(role, text) for role, text in turns]


def _read_mllm_dpo(row: Row, place: Place) -> Row | str:
    """The paper's release: question may be a turn or its Python literal, answers a turn or a conversation."""
    question = row.get("question")
    if isinstance(question, str) and question.lstrip().startswith("{"):
        try:
            question = ast.literal_eval(question)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise place.bad("question", "a turn or its Python literal", question) from None
    text = question if isinstance(question, str) else turn_of(question, "question", place)[1]
    return {
        **other_columns(row, "question", "chosen", "rejected", "image", "images"),
        "images": first_of(row, "image", "images"),
        "prompt": [message("user", text)],
        "chosen": _answer_to(text, row.get("chosen"), "chosen", place),
        "rejected": _answer_to(text, row.get("rejected"), "rejected", place),
    }


def _answer_to(question: str, value: Any, field: str, place: Place) -> str:
    """The text of a turn by gpt, alone or behind the question."""
    *before, (role, text) = turns_of(value if isinstance(value, list) and value else [value], field, place)
    if role != "assistant":
        raise place.bad(field, "a last turn by gpt", role)
    if [_said(turn) for _, turn in before] not in ([], [_said(question)]):
        raise place.bad(field, "an answer, or the question and its answer", value)
    return text


def _said(turn: str) -> str:
    """Its text, wherever image placeholders stand in it."""
    return "".join(part.get("text", "") for part in parts_of(turn)).strip()


def _read_rlaif_v(row: Row, place: Place) -> Row | str:
    """Also the text-only sets that have a `system` beside these columns, as Intel's orca pairs."""
    turns = _with_system([("user", place.text(row.get("question"), "question"))], row, place)
    return {
        **other_columns(row, "question", "chosen", "rejected", "image", "images", "system"),
        "images": first_of(row, "image", "images", "image_path"),
        "prompt": [message(role, text) for role, text in turns],
        "chosen": place.text(row.get("chosen"), "chosen"),
        "rejected": place.text(row.get("rejected"), "rejected"),
    }


def _read_llava_next(row: Row, place: Place) -> Row | str:
    return {
        **other_columns(row, "prompt", "chosen", "rejected", "image", "images"),
        "images": first_of(row, "image", "images"),
        "prompt": [message("user", place.text(row.get("prompt"), "prompt"))],
        "chosen": place.text(row.get("chosen"), "chosen"),
        "rejected": place.text(row.get("rejected"), "rejected"),
    }


_READERS: dict[str, Callable[[Row, Place], Row | str]] = {
    "ms-swift": _read_ms_swift,
    "llama-factory": _read_llama_factory,
    "mllm-dpo": _read_mllm_dpo,
    "rlaif-v": _read_rlaif_v,
    "vlfeedback": read_vlfeedback,
    "helpsteer3": read_helpsteer3,
    "ultrafeedback": _read_ultrafeedback,
    "llava-next": _read_llava_next,
    "alpaca": _read_alpaca,
    "trl": _read_trl,
}
