"""One request to an OpenAI-compatible chat server: its address, its reply, its errors as typed failures."""

from __future__ import annotations

import base64
import json
import time
from typing import Any
from urllib.parse import urlsplit

from fasttrain_data.calls.failures import CallFailed, failure_of, without_key
from fasttrain_data.errors import UserError

KEY_VARIABLE = "OPENAI_API_KEY"
_LONGEST_BYTES = 1 << 26  # of a reply, unpacked; answers have thousands
_LOOKED_AT = 100_000  # characters of a server's words, of which some hundred are told


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


def _secrets(url: str, key: str | None) -> list[str | None]:
    """What a request to `url` holds and nothing else may: the key; the address's password, alone and as it is sent."""
    import httpx

    address = httpx.URL(url)
    basic = base64.b64encode(f"{address.username}:{address.password}".encode()).decode()
    return [key, *((basic, address.password) if address.password else ())]


def post_chat(client: Any, url: str, body: dict[str, Any], key: str | None) -> dict[str, Any]:
    """The server's reply with at least one choice that holds a message; CallFailed when there is none.

    The message's content is text or None, whatever the server made of it: parts of text are joined, and any other
    content is a failure. Names that are not text and token counts that are not whole numbers are left out.
    client: an httpx.Client with the authorization header set. A refusal keeps the server's words in the failure, but none of what
    the request is authorized by.
    """
    import httpx

    secrets = _secrets(url, key)
    try:
        response, content = _post(client, url, body)
    except httpx.TimeoutException as error:
        raise CallFailed("timeout", f"no reply in time ({type(error).__name__})", retry=True) from None
    except httpx.HTTPError as error:
        raise CallFailed(
            "server_error", without_key(f"connection failed: {error}", *secrets), retry=True
        ) from None
    if response.has_redirect_location:
        place = without_key(without_credentials(response.headers["location"]), *secrets)
        told = f"{response.status_code}: wanted the server's own address, got one that leads to {place}"
        raise CallFailed("refused_request", told, fatal=True)
    if response.status_code != 200:
        message, code = _error_of(content.decode(errors="replace"), secrets)
        if response.status_code == 429 and code == "insufficient_quota":
            raise CallFailed("quota", f"429: {message}", stop=True)
        raise failure_of(response.status_code, message, [], dict(response.headers))
    try:
        reply: dict[str, Any] = json.loads(content)
        message = reply["choices"][0]["message"]
        message["content"] = _text_of(message.get("content"))
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        told = _told(content.decode(errors="replace"), secrets, 200)
        raise CallFailed("malformed", f"unreadable reply: {told!r}", retry=True) from None
    _keep_text(reply, "model", "system_fingerprint")
    _keep_text(reply["choices"][0], "finish_reason")
    reply["usage"] = _whole_counts(reply.get("usage"))
    return reply


def _post(client: Any, url: str, body: dict[str, Any]) -> tuple[Any, bytes]:
    """The response and its whole content; CallFailed if that is longer than a reply is, or longer under way than a call may take."""
    content, started_s = bytearray(), time.monotonic()
    with client.stream("POST", url, json=body) as response:
        for part in response.iter_bytes():
            content += part
            if len(content) > _LONGEST_BYTES:
                raise CallFailed("malformed", f"wanted a reply of at most {_LONGEST_BYTES:,} bytes, got more")
            if client.timeout.read is not None and time.monotonic() - started_s > client.timeout.read:
                raise CallFailed("timeout", "no whole reply in time", retry=True)
    return response, bytes(content)


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
        elif not key.endswith("_tokens") or (
            isinstance(value, int) and not isinstance(value, bool) and value >= 0
        ):
            counts[key] = value
    return counts


def _told(text: str, secrets: list[str | None], longest: int = 300) -> str:
    """The start of a server's words; blotted before it is cut: of a key cut in two a part would stay."""
    return without_key(text[:_LOOKED_AT], *secrets)[:longest]


def _error_of(text: str, secrets: list[str | None]) -> tuple[str, str | None]:
    """(message, code) of an error body."""
    try:
        body = json.loads(text)
        error = body.get("error", body)
        if isinstance(error, dict):
            return _told(str(error.get("message", error)), secrets), error.get("code")
        return _told(str(error), secrets), None
    except (ValueError, RecursionError, AttributeError):
        return _told(text, secrets), None
