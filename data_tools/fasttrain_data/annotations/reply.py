"""A judge's reply -> a status and, when that is ok, five integers per answer. Nothing is guessed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from fasttrain_data.annotations.request import REASON
from fasttrain_data.records import ATTRIBUTES, Status

_REASON_KEYS = (REASON, "reason", "reasoning", "rationale", "comment")
_LABEL_KEYS = ("answer", "answer_number", "number", "index", "label", "id")
_LABEL = re.compile(r"(?:(?:answer|response)[\s_#-]*)?#?(\d{1,9}|[a-z])[.:)]?", re.IGNORECASE)
_BRACKET = re.compile(r"[\[{]")
_BLOCKED = frozenset({"SAFETY", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "IMAGE_SAFETY"})


@dataclass(frozen=True)
class Reply:
    """What an SDK brought back from a call that the server answered.

    text: None when there is no candidate or it has no text. finish_reason, block_reason: Gemini's names.
    raw: the whole reply as JSON, kept in the journal. unreadable: why nothing could be read from it, if so.
    """

    text: str | None
    finish_reason: str | None
    block_reason: str | None
    model_version: str | None
    usage: dict[str, int]
    raw: dict[str, Any]
    unreadable: str | None = None


def without_depths(value: Any, levels: int = 100) -> Any:
    """A reply's JSON with a note for what lies deeper: the thread that journals it may not nest as far as the one that read it."""
    if isinstance(value, dict | list) and not levels:
        return "nested too deeply to be kept"
    if isinstance(value, dict):
        return {key: without_depths(item, levels - 1) for key, item in value.items()}
    return [without_depths(item, levels - 1) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Verdict:
    """status ok: one row of five scores and one reason per answer, in the order shown. Else detail says why."""

    status: Status
    detail: str | None = None
    scores: tuple[tuple[int, ...], ...] = ()
    reasons: tuple[str, ...] = ()


class _Problem(Exception):
    def __init__(self, status: Status, detail: str) -> None:
        self.status, self.detail = status, detail


def withheld(reply: Reply) -> Verdict | None:
    """Why the server kept its answer back; None if it did not."""
    if reply.block_reason and reply.text is None:
        return Verdict("blocked_prompt", reply.block_reason)
    if reply.finish_reason == "RECITATION":
        return Verdict("recitation", "the judge's answer was withheld as recitation")
    if reply.finish_reason in _BLOCKED:
        return Verdict("blocked_answer", reply.finish_reason)
    return None


def judge_reply(reply: Reply, answers: int) -> Verdict:
    """Status and scores of a reply to a request with so many answers."""
    if reply.unreadable:
        return Verdict("malformed", reply.unreadable)
    if (verdict := withheld(reply)) is not None:
        return verdict
    finish = reply.finish_reason or ""
    if finish == "MAX_TOKENS":
        return Verdict("truncated", "the reply reached --max-output-tokens")
    if not (reply.text or "").strip():
        return Verdict("empty", f"no text (finish reason {finish or 'none'})")
    try:
        entries = _entries(_parse(reply.text or ""), answers)
        return Verdict(
            "ok",
            None,
            tuple(_scores(entry, number) for number, entry in enumerate(entries, start=1)),
            tuple(_reason(entry) for entry in entries),
        )
    except _Problem as problem:
        return Verdict(problem.status, problem.detail)


def _parse(text: str) -> Any:
    """The reply's JSON; words and fences may stand around it, but no bracket that could begin another."""
    begin = _BRACKET.search(text)
    try:
        value, end = _DECODER.raw_decode(text, begin.start() if begin else 0)
    except (ValueError, RecursionError) as error:  # not JSON, or a number of thousands of digits
        raise _Problem("malformed", f"not JSON: {error}") from None
    if _BRACKET.search(text, end):
        raise _Problem("malformed", "wanted one JSON value, got brackets behind it")
    return value


def _told_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are different, also as they are read: of two grades none is the right one."""
    if len({key.strip().lower() for key, _ in pairs}) < len(pairs):
        raise _Problem("malformed", f"wanted different keys, got {[key for key, _ in pairs]}")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_told_once)


def _entries(value: Any, answers: int) -> list[dict[str, Any]]:
    """One object per answer, in the order shown; by their labels where they have them, else by place."""
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if not lists and answers == 1 and ATTRIBUTES[0] in value:
            lists = [[value]]
        if not lists and value and all(isinstance(item, dict) for item in value.values()):
            lists = [[{_LABEL_KEYS[0]: label, **item} for label, item in value.items()]]
        if len(lists) != 1:
            raise _Problem("malformed", f"wanted one list of answers, got keys {sorted(value)}")
        value = lists[0]
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise _Problem("malformed", "wanted a list of objects")
    if len(value) != answers:
        raise _Problem("missing_scores", f"wanted {answers} answers graded, got {len(value)}")
    labels = [_label(entry) for entry in value]
    if all(label is None for label in labels) or (answers == 1 and isinstance(labels[0], str)):
        return value
    by_label = dict(zip(labels, value, strict=True))
    for first in (1, 0):  # some judges count from 0
        if set(by_label) == set(range(first, first + answers)):
            return [by_label[number] for number in range(first, first + answers)]
    raise _Problem("missing_scores", f"wanted answers 1 to {answers}, got {labels}")


def _label(entry: dict[str, Any]) -> int | str | None:
    """The answer's number, "B" being 2; what stands there if it is none; None for an entry without a label."""
    told = [entry[key] for key in _LABEL_KEYS if entry.get(key) is not None]
    for value in told:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and (match := _LABEL.fullmatch(value.strip())):
            mark = match[1].lower()
            return int(mark) if mark.isdecimal() else 1 + ord(mark) - ord("a")
    return str(told[0])[:40] if told else None


def _scores(entry: dict[str, Any], number: int) -> tuple[int, ...]:
    """JSON's 3 and 3.0 are one number; "3" and true are none."""
    named = {str(key).strip().lower(): value for key, value in entry.items()}
    scores = []
    for attribute in ATTRIBUTES:
        value = named.get(attribute)
        what = f"answer {number}: {attribute}"
        if value is None:
            raise _Problem("missing_scores", f"{what} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _Problem("malformed", f"{what}: wanted a number, got {value!r}")
        if value not in (0, 1, 2, 3, 4):
            raise _Problem("out_of_range", f"{what}: wanted a whole number from 0 to 4, got {value!r}")
        scores.append(int(value))
    return tuple(scores)


def _reason(entry: dict[str, Any]) -> str:
    value = next((entry[key] for key in _REASON_KEYS if isinstance(entry.get(key), str)), "")
    return value.strip()
