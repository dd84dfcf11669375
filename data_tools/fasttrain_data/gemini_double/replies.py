"""Bodies of the double: replies with their faults, and Google's error objects."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from fasttrain_data.annotations.request import REASON
from fasttrain_data.gemini_double.faults import Fault
from fasttrain_data.gemini_double.judges import JudgeFunction, Scores
from fasttrain_data.records import ATTRIBUTES

Body = dict[str, Any]
_STANDARD_ALPHABET = str.maketrans("-_", "+/")
_INTS = {"SAFETY": 3, "RECITATION": 4, "MAX_TOKENS": 2, "STOP": 1}


class AskedFor:
    """A generateContent request, taken apart: the question, the images, the labelled answers."""

    def __init__(self, body: Body) -> None:
        self.question, self.chars = "", 0
        self.answers: list[str] = []
        self.images: list[bytes] = []
        for content in body.get("contents", []):
            for part in content.get("parts", []):
                self._take(part)
        instruction = body.get("systemInstruction", body.get("system_instruction")) or {}
        self.chars += sum(len(part.get("text", "")) for part in instruction.get("parts", []))

    def _take(self, part: Body) -> None:
        data = part.get("inlineData", part.get("inline_data"))
        if data:
            # Google takes both alphabets of base64; google-genai writes the URL-safe one.
            self.images.append(base64.b64decode(data["data"].translate(_STANDARD_ALPHABET)))
            return
        text = part.get("text", "")
        self.chars += len(text)
        label, newline, rest = text.partition("\n")
        if newline and label.startswith("Answer ") and label.endswith(":"):
            self.answers.append(rest)
        else:
            self.question = text.partition("Question:\n")[2] or text


def judged(
    asked: AskedFor,
    judge: JudgeFunction,
    fault: Fault | None,
    model_version: str,
    free: Callable[[str], str] | None = None,
) -> Body:
    """The 200 body for a request: the judge's scores, or free text, spoilt by a content fault."""
    if fault == "blocked_prompt":
        return {
            "promptFeedback": {"blockReason": "SAFETY"},
            "modelVersion": model_version,
            "usageMetadata": _usage(asked, 0),
        }
    text, finish = _text(asked, judge, fault, free)
    candidate: Body = {"finishReason": finish, "index": 0}
    if text is not None:
        thoughts = [{"text": "Answer 1 {is", "thought": True}] if fault == "thoughts" else []
        candidate["content"] = {"role": "model", "parts": [*thoughts, {"text": text}]}
    body: Body = {
        "candidates": [candidate],
        "modelVersion": model_version,
        "responseId": f"double-{asked.chars}-{len(asked.answers)}",
        "usageMetadata": _usage(asked, len(text or "") // 4),
    }
    if fault == "max_tokens_thinking":
        body["usageMetadata"]["thoughtsTokenCount"] = 8000
        body["usageMetadata"]["totalTokenCount"] += 8000
    return body


def _text(
    asked: AskedFor, judge: JudgeFunction, fault: Fault | None, free: Callable[[str], str] | None
) -> tuple[str | None, str]:
    if fault in ("blocked_answer", "recitation"):
        return None, {"blocked_answer": "SAFETY", "recitation": "RECITATION"}[fault]
    if fault == "max_tokens_thinking":
        return None, "MAX_TOKENS"
    if fault == "empty":
        return None, "STOP"
    if free is not None:
        said = free(asked.question)
        return (said[: len(said) // 2], "MAX_TOKENS") if fault == "max_tokens" else (said, "STOP")
    if fault == "prose":
        return "Answer 1 is helpful, I would say.", "STOP"
    entries = _entries(judge(asked.question, asked.images, asked.answers))
    _spoil(entries, fault)
    text = json.dumps({"answers": entries}, ensure_ascii=False)
    if fault in ("cut_json", "max_tokens"):
        return text[: len(text) * 2 // 3], "MAX_TOKENS" if fault == "max_tokens" else "STOP"
    if fault == "fenced":
        text = f"```json\n{text}\n```"
    return text, "STOP"


def _entries(scores: Scores) -> list[Body]:
    entries = []
    for number, row in enumerate(scores, start=1):
        named = dict(row) if isinstance(row, dict) else dict(zip(ATTRIBUTES, row, strict=True))
        reason = named.pop("reason", f"scripted assessment of answer {number}")
        entries.append({"answer": number, REASON: reason, **named})
    return entries


def _spoil(entries: list[Body], fault: Fault | None) -> None:
    if fault == "missing_answer":
        entries.pop()
    elif fault == "extra_answer":
        entries.append({**entries[-1], "answer": len(entries) + 1})
    elif fault == "missing_score":
        del entries[-1]["coherence"]
    elif fault in ("out_of_range", "float_score", "string_score"):
        entries[-1]["correctness"] = {"out_of_range": 7, "float_score": 2.5, "string_score": "3"}[fault]
    elif fault == "constant":
        for entry in entries:
            entry.update(dict.fromkeys(ATTRIBUTES, 3))
    elif fault == "reversed":
        entries.reverse()


def _usage(asked: AskedFor, output: int) -> Body:
    prompt = asked.chars // 4 + 258 * len(asked.images)
    return {
        "promptTokenCount": prompt,
        "candidatesTokenCount": output,
        "totalTokenCount": prompt + output,
    }


def enums_as_ints(body: Body) -> Body:
    """The form the older SDK asks for with `$alt=json;enum-encoding=int`."""
    for candidate in body.get("candidates", []):
        candidate["finishReason"] = _INTS[candidate["finishReason"]]
    if "promptFeedback" in body:
        body["promptFeedback"]["blockReason"] = 1
    return body


def error_body(code: int, status: str, message: str, *details: Body) -> Body:
    return {"error": {"code": code, "message": message, "status": status, "details": list(details)}}


def fault_error(fault: Fault, retry_delay_s: float, key: str) -> tuple[int, Body]:
    """(HTTP status, body) of a transport fault that is an error reply."""
    quota = "type.googleapis.com/google.rpc.QuotaFailure"
    if fault in ("rate_limit", "rate_limit_header", "daily_quota"):
        period = "Day" if fault == "daily_quota" else "Minute"
        violation = {"quotaId": f"GenerateRequestsPer{period}PerProjectPerModel-FreeTier"}
        details: list[Body] = [{"@type": quota, "violations": [violation]}]
        if fault == "rate_limit":
            delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{retry_delay_s:g}s"}
            details.append(delay)
        return 429, error_body(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota.", *details)
    if fault == "bad_key":
        info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
        message = f"API key not valid: {key}. Please pass a valid API key."  # a server that echoes the key
        return 400, error_body(400, "INVALID_ARGUMENT", message, info)
    code, status, message = {
        "server_error": (500, "INTERNAL", "An internal error has occurred."),
        "unavailable": (503, "UNAVAILABLE", "The model is overloaded. Please try again later."),
        "bad_request": (400, "INVALID_ARGUMENT", "Request contains an invalid argument."),
        "bad_image": (400, "INVALID_ARGUMENT", "Unable to process input image."),
        "forbidden": (403, "PERMISSION_DENIED", "The caller does not have permission."),
        "not_found": (404, "NOT_FOUND", "The model is not found for this API version."),
    }[fault]
    return code, error_body(code, status, message)
