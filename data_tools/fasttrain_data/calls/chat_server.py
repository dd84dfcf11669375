"""One request to an OpenAI-compatible chat server: its address, its reply, its errors as typed failures."""

from __future__ import annotations

import json
from typing import Any

from fasttrain_data.calls.failures import CallFailed, failure_of, without_key
from fasttrain_data.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"


def chat_url(server: str, option: str = "--server") -> str:
    """The address of chat completions: `http://host` and `http://host/v1` mean the same, a full path is taken as it is."""
    if not server.startswith(("http://", "https://")):
        raise UserError(f"{option}: wanted http://... or https://..., got {server!r}")
    base = server.rstrip("/")
    if base.endswith("/chat/completions"):
        return base
    return f"{base if base.endswith('/v1') else base + '/v1'}/chat/completions"


def post_chat(client: Any, url: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
    """The server's reply with at least one choice that holds a message; CallFailed when there is none.

    client: an httpx.Client with the authorization header set. A refusal keeps the server's words in the failure.
    """
    import httpx

    try:
        response = client.post(url, json=body)
    except httpx.TimeoutException as error:
        raise CallFailed("timeout", f"no reply in time ({type(error).__name__})", retry=True) from None
    except httpx.HTTPError as error:
        raise CallFailed(
            "server_error", without_key(f"connection failed: {error}", key), retry=True
        ) from None
    if response.status_code != 200:
        message, code = _error_of(response.text)
        message = without_key(message, key)
        if response.status_code == 429 and code == "insufficient_quota":
            raise CallFailed("quota", f"429: {message}", stop=True)
        raise failure_of(response.status_code, message, [], dict(response.headers))
    try:
        reply: dict[str, Any] = response.json()
        reply["choices"][0]["message"].get("content")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError):
        raise CallFailed("malformed", f"unreadable reply: {response.text[:200]!r}", retry=True) from None
    return reply


def _error_of(text: str) -> tuple[str, str | None]:
    """(message, code) of an error body."""
    try:
        body = json.loads(text)
        error = body.get("error", body)
        if isinstance(error, dict):
            return str(error.get("message", error))[:300], error.get("code")
        return str(error)[:300], None
    except (json.JSONDecodeError, AttributeError):
        return text[:300], None
