"""The judge behind google-generativeai 0.8, which is no longer developed: REST only, no seed, loose schemas."""

from __future__ import annotations

import contextlib
import json
import warnings
from typing import Any

from fasttrain_data.annotations.judge import Endpoint
from fasttrain_data.annotations.reply import Reply
from fasttrain_data.annotations.request import JudgeRequest, reply_schema, system_instruction
from fasttrain_data.calls.failures import CallFailed, failure_of, without_key
from fasttrain_data.errors import UserError


class LegacyJudge:
    """Several threads may ask at once. The SDK keeps its configuration in a global: one endpoint per process."""

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its import announces the end of support
                import google.generativeai as sdk
        except ImportError as error:
            raise UserError(
                f"google-generativeai is not installed ({error}): pip install 'fasttrain-dpo[gemini-legacy]'"
            ) from None
        if endpoint.api_version:
            raise UserError("--api-version: google-generativeai knows v1beta only; use --sdk google-genai")
        self._sdk, self._endpoint = sdk, endpoint
        options = {"api_endpoint": endpoint.base_url} if endpoint.base_url else None
        sdk.configure(api_key=endpoint.api_key, transport="rest", client_options=options)

    def ask(self, request: JudgeRequest) -> Reply:
        from google.api_core import exceptions, retry
        from google.protobuf.json_format import ParseError

        model = self._sdk.GenerativeModel(
            request.model,
            system_instruction=system_instruction(),
            generation_config={
                "temperature": request.temperature,
                "max_output_tokens": request.max_output_tokens,
                "response_mime_type": "application/json",
                "response_schema": _legacy_schema(reply_schema(len(request.answers))),
            },
        )
        parts: list[Any] = [{"mime_type": image.mime_type, "data": image.content} for image in request.images]
        parts += [{"text": text} for text in request.texts()]
        # Its default retries 503 for up to ten minutes, whatever the timeout.
        never = retry.Retry(predicate=lambda error: False)
        try:
            response = model.generate_content(
                [{"role": "user", "parts": parts}],
                request_options={"timeout": self._endpoint.timeout_s, "retry": never},
            )
        except (exceptions.GoogleAPIError, ParseError, OSError, ValueError) as error:
            raise _failure(error, self._endpoint.api_key) from None
        return _reply(response)


def _legacy_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The subset this SDK's Schema message has: no bounds on numbers, counts in snake case."""
    renamed = {"minItems": "min_items", "maxItems": "max_items"}
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("minimum", "maximum"):
            continue
        if key == "properties":
            value = {name: _legacy_schema(item) for name, item in value.items()}
        elif isinstance(value, dict):
            value = _legacy_schema(value)
        result[renamed.get(key, key)] = value
    return result


def _failure(error: Exception, key: str) -> CallFailed:
    import requests
    from google.api_core import exceptions

    if isinstance(error, exceptions.GoogleAPICallError) and error.code:
        details = [_detail(item) for item in error.details or []]
        headers = dict(getattr(error.response, "headers", None) or {})
        return failure_of(int(error.code), without_key(str(error.message), key), details, headers)
    cause = error if isinstance(error, requests.RequestException) else error.__cause__
    if (
        isinstance(error, requests.Timeout)
        or isinstance(cause, requests.Timeout)
        or "timed out" in str(error).lower()
    ):
        return CallFailed("timeout", f"no reply in time ({type(error).__name__})", retry=True)
    return CallFailed("server_error", without_key(f"call failed: {error}", key)[:300], retry=True)


def _detail(item: Any) -> dict[str, Any]:
    """An error detail as plain JSON: the SDK unpacks those it knows into messages."""
    if isinstance(item, dict):
        return item
    from google.protobuf.json_format import MessageToDict

    plain: dict[str, Any] = MessageToDict(item)
    return plain


def _reply(response: Any) -> Reply:
    raw = type(response._result).to_dict(response._result, use_integers_for_enums=False)
    candidate = (raw.get("candidates") or [None])[0]
    feedback, usage = raw.get("prompt_feedback") or {}, raw.get("usage_metadata") or {}
    parts = ((candidate or {}).get("content") or {}).get("parts") or []
    texts = [part["text"] for part in parts if part.get("text") is not None]
    block = feedback.get("block_reason")
    prompt, output, total = (
        int(usage.get(f"{name}_token_count") or 0) for name in ("prompt", "candidates", "total")
    )
    return Reply(
        text=_without_thoughts(texts),
        finish_reason=_finish_name(candidate.get("finish_reason")) if candidate else None,
        block_reason=None if block in (None, "BLOCK_REASON_UNSPECIFIED", 0) else str(block),
        model_version=raw.get("model_version") or None,
        usage={
            "prompt": prompt,
            "output": output,
            # it has no name for them, they are in the sum alone
            "thoughts": max(0, total - prompt - output),
            "cached": int(usage.get("cached_content_token_count") or 0),
        },
        raw=raw,
    )


def _without_thoughts(texts: list[str]) -> str | None:
    """The parts as one text; a reply that is JSON only behind its first parts began with thoughts, which this SDK does not mark."""
    for start in range(len(texts)):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(text := "".join(texts[start:]))
            return text
    return "".join(texts) if texts else None


def _finish_name(value: Any) -> str | None:
    return None if value in (None, "FINISH_REASON_UNSPECIFIED", 0) else str(value)
