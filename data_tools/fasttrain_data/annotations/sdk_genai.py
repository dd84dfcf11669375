"""The judge behind google-genai."""

from __future__ import annotations

import json
import logging
from typing import Any

from fasttrain_data.annotations.judge import Endpoint
from fasttrain_data.annotations.reply import Reply, without_depths
from fasttrain_data.annotations.request import JudgeRequest, reply_schema, system_instruction
from fasttrain_data.calls.failures import CallFailed, failure_of, whole_number, without_key
from fasttrain_data.errors import UserError
from fasttrain_data.jsonl import Row


def open_client(endpoint: Endpoint) -> Any:
    """A client without retries of its own: they ignore what the server says about delays."""
    try:
        from google import genai
        from google.genai import types
    except ImportError as error:
        raise UserError(
            f"google-genai is not installed ({error}): pip install 'fasttrain-dpo[gemini]'"
        ) from None
    options = types.HttpOptions(
        base_url=endpoint.base_url,
        api_version=endpoint.api_version,
        timeout=max(1, int(endpoint.timeout_s * 1000)),
    )
    talk = logging.getLogger("google_genai._api_client")
    talkative, talk.disabled = (
        talk.disabled,
        True,
    )  # it names a key from the environment that is not the one used
    try:
        return genai.Client(api_key=endpoint.api_key, vertexai=False, http_options=options)
    finally:
        talk.disabled = talkative


class GenaiJudge:
    """Thread-safe: the SDK's synchronous client is, and it is kept for the judge's life."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.api_key = endpoint.api_key
        self.client = open_client(endpoint)

    def ask(self, request: JudgeRequest) -> Reply:
        from google.genai import types

        images = [
            types.Part.from_bytes(data=image.content, mime_type=image.mime_type) for image in request.images
        ]
        return generate(
            self.client,
            self.api_key,
            request.model,
            images + [types.Part(text=text) for text in request.texts()],
            system_instruction=system_instruction(),
            temperature=request.temperature,
            seed=request.seed,
            max_output_tokens=request.max_output_tokens,
            response_mime_type="application/json",
            response_json_schema=reply_schema(len(request.answers)),
        )


def generate(client: Any, key: str, model: str, parts: list[Any], **config: Any) -> Reply:
    """One call, one attempt: the reply to a user's turn of so many parts; CallFailed when none came.

    The reply is taken as JSON, not as the SDK's types: those refuse what they do not know, and it is paid for.
    """
    import httpx2
    from google.genai import errors, types

    try:
        response = client.models.generate_content(
            model=model,
            contents=[types.Content(role="user", parts=parts)],
            config=types.GenerateContentConfig(should_return_http_response=True, **config),
        )
        return reply_from_json(json.loads(response.sdk_http_response.body))
    except (errors.APIError, httpx2.HTTPError, ValueError, RecursionError) as error:
        raise genai_failure(error, key) from None


def genai_failure(error: Exception, key: str) -> CallFailed:
    """What an exception of the SDK means: an error reply, a broken connection, or a body it cannot read."""
    import httpx2
    from google.genai import errors

    if isinstance(error, errors.APIError):
        body = error.details if isinstance(error.details, dict) else {}
        inner = body.get("error", body)
        details = inner.get("details") if isinstance(inner, dict) else None
        headers = dict(getattr(error.response, "headers", None) or {})
        # Proxies send {"error": "text"}, in which the SDK finds no message.
        words = error.message or (inner if isinstance(inner, str) else None) or error.status or ""
        return failure_of(whole_number(error.code), without_key(str(words), key), details, headers)
    if isinstance(error, httpx2.TimeoutException):
        return CallFailed("timeout", f"no reply in time ({type(error).__name__})", retry=True)
    what = "connection failed" if isinstance(error, httpx2.HTTPError) else "unreadable reply"
    return CallFailed("server_error", without_key(f"{what}: {error}", key)[:300], retry=True)


def reply_from_json(response: Any) -> Reply:
    """A GenerateContentResponse in the REST API's JSON as a Reply.

    Whatever form it has is kept.
    """
    response = without_depths(response)
    body = _object(response)
    usage = _object(body.get("usageMetadata"))
    version = body.get("modelVersion")
    what = f"unreadable reply: {json.dumps(response)[:200]}"
    unreadable = None if isinstance(response, dict) else what
    text = finish = block = None
    try:
        candidate = (body.get("candidates") or [{}])[0]
        parts = (candidate.get("content") or {}).get("parts") or []
        texts = [part["text"] for part in parts if part.get("text") is not None and not part.get("thought")]
        text = "".join(texts) if texts else None
        finish = candidate.get("finishReason")
        block = (body.get("promptFeedback") or {}).get("blockReason")
    except (AttributeError, KeyError, TypeError):
        unreadable = what
    return Reply(
        text=text,
        finish_reason=None if finish is None else str(finish),
        block_reason=None if block is None else str(block),
        model_version=version if isinstance(version, str) else None,
        usage={
            "prompt": whole_number(usage.get("promptTokenCount")),
            "output": whole_number(usage.get("candidatesTokenCount")),
            "thoughts": whole_number(usage.get("thoughtsTokenCount")),
            "cached": whole_number(usage.get("cachedContentTokenCount")),
        },
        raw=body or {"response": response},
        unreadable=unreadable,
    )


def _object(value: Any) -> Row:
    return value if isinstance(value, dict) else {}
