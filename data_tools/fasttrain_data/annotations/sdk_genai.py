"""The judge behind google-genai."""

from __future__ import annotations

import logging
from typing import Any

from fasttrain_data.annotations.judge import Endpoint
from fasttrain_data.annotations.reply import Reply
from fasttrain_data.annotations.request import JudgeRequest, reply_schema, system_instruction
from fasttrain_data.calls.failures import CallFailed, failure_of, whole_number, without_key
from fasttrain_data.errors import UserError


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
        import httpx2
        from google.genai import errors, types

        images = [
            types.Part.from_bytes(data=image.content, mime_type=image.mime_type) for image in request.images
        ]
        parts = images + [types.Part(text=text) for text in request.texts()]
        try:
            response = self.client.models.generate_content(
                model=request.model,
                contents=[types.Content(role="user", parts=parts)],
                config=types.GenerateContentConfig(
                    system_instruction=system_instruction(),
                    temperature=request.temperature,
                    seed=request.seed,
                    max_output_tokens=request.max_output_tokens,
                    response_mime_type="application/json",
                    response_json_schema=reply_schema(len(request.answers)),
                ),
            )
        except (errors.APIError, httpx2.HTTPError, ValueError) as error:
            raise genai_failure(error, self.api_key) from None
        return reply_from_genai(response)


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


def reply_from_genai(response: Any) -> Reply:
    """A GenerateContentResponse as a Reply."""
    candidate = (response.candidates or [None])[0]
    feedback, usage = response.prompt_feedback, response.usage_metadata
    parts = (candidate.content.parts or []) if candidate and candidate.content else []
    texts = [part.text for part in parts if part.text is not None and not part.thought]
    raw = response.model_dump(
        mode="json",
        exclude_none=True,
        exclude={"sdk_http_response", "automatic_function_calling_history", "parsed"},
    )
    return Reply(
        text="".join(texts) if texts else None,
        finish_reason=_name(candidate.finish_reason) if candidate else None,
        block_reason=_name(feedback.block_reason) if feedback else None,
        model_version=response.model_version,
        usage={
            "prompt": (usage.prompt_token_count or 0) if usage else 0,
            "output": (usage.candidates_token_count or 0) if usage else 0,
            "thoughts": (usage.thoughts_token_count or 0) if usage else 0,
            "cached": (usage.cached_content_token_count or 0) if usage else 0,
        },
        raw=raw,
    )


def _name(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value))
