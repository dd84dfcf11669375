"""One request to an OpenAI-compatible chat server: its address, its reply, its errors as typed failures."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

from fasttrain_data.calls.failures import CallFailed, failure_of, without_key
from fasttrain_data.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"


def chat_url(server: str, option: str = "--server") -> str:
    """The address of chat completions: `http://host` and `http://host/v1` mean the same, a full path is taken as it is."""
    if not server.startswith(("http://", "https://")):
        raise UserError(f"{option}: wanted http://... or https://..., got {server!r}")
    if not _names_a_host(server):
        raise UserError(f"{option}: wanted an address with a host, got {server!r}")
    base = server.rstrip("/")
    if base.endswith("/chat/completions"):
        return base
    return f"{base if base.endswith('/v1') else base + '/v1'}/chat/completions"


def without_credentials(server: str) -> str:
    """The address as files may hold it: without the user and password that can stand before its host."""
    parts = urlsplit(server)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _names_a_host(url: str) -> bool:
    import httpx

    try:
        host = httpx.URL(url).host
        host.encode("idna")  # as a connection will: labels of more than 63 characters fail there
    except (httpx.InvalidURL, UnicodeError):
        return False
    return bool(host)


def post_chat(client: Any, url: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
    """The server's reply with at least one choice that holds a message; CallFailed when there is none.

    The message's content is text or None, whatever the server made of it: parts of text are joined, and any other
    content is a failure. Names that are not text and token counts that are not whole numbers are left out.
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
    if response.has_redirect_location:
        place = without_key(without_credentials(response.headers["location"]), key)
        told = f"{response.status_code}: wanted the server's own address, got one that leads to {place}"
        raise CallFailed("refused_request", told, fatal=True)
    text = without_key(response.text, key)  # before it is cut: of a key cut in two a part would stay
    if response.status_code != 200:
        message, code = _error_of(text)
        if response.status_code == 429 and code == "insufficient_quota":
            raise CallFailed("quota", f"429: {message}", stop=True)
        raise failure_of(response.status_code, message, [], dict(response.headers))
    try:
        reply: dict[str, Any] = response.json()
        message = reply["choices"][0]["message"]
        message["content"] = _text_of(message.get("content"))
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        raise CallFailed("malformed", f"unreadable reply: {text[:200]!r}", retry=True) from None
    _keep_text(reply, "model", "system_fingerprint")
    _keep_text(reply["choices"][0], "finish_reason")
    reply["usage"] = _whole_counts(reply.get("usage"))
    return reply


def _text_of(content: Any) -> str | None:
    """Content as text; TypeError or KeyError if it is something else."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or any(part["type"] != "text" for part in content):
        raise TypeError("no text")
    return "".join(part["text"] for part in content)


def _keep_text(row: dict[str, Any], *keys: str) -> None:
    for key in keys:
        if not isinstance(row.get(key, ""), str):
            del row[key]


def _whole_counts(usage: Any) -> dict[str, Any]:
    """A usage object whose `..._tokens` are whole numbers and whose `..._details` are such objects."""
    counts: dict[str, Any] = {}
    for key, value in usage.items() if isinstance(usage, dict) else ():
        if key.endswith("_details"):
            counts[key] = _whole_counts(value)
        elif not key.endswith("_tokens") or (isinstance(value, int) and not isinstance(value, bool)):
            counts[key] = value
    return counts


def _error_of(text: str) -> tuple[str, str | None]:
    """(message, code) of an error body."""
    try:
        body = json.loads(text)
        error = body.get("error", body)
        if isinstance(error, dict):
            return str(error.get("message", error))[:300], error.get("code")
        return str(error)[:300], None
    except (ValueError, RecursionError, AttributeError):
        return text[:300], None
