"""Calls that brought no reply: what they are named, whether to try again, and how long the server said to wait."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from fasttrain_data.errors import visible
from fasttrain_data.records import Status

_LONGEST_DELAY_S = 86_400.0  # a daily quota comes back sooner, and timers overflow at some length


class CallFailed(Exception):
    """status: what a row is marked with if the call stays without reply.

    retry: whether another attempt may help. delay_s: how long the server said to wait. slow_down: every other
    call should wait as well. stop: no further call makes sense now (a daily quota). fatal: a mistake in key,
    model or address that no row can help.
    """

    def __init__(
        self,
        status: Status,
        message: str,
        *,
        retry: bool = False,
        delay_s: float | None = None,
        slow_down: bool = False,
        stop: bool = False,
        fatal: bool = False,
    ) -> None:
        message = visible(message)  # perhaps a server's words
        super().__init__(message)
        self.status, self.message = status, message
        self.retry, self.delay_s, self.slow_down = retry, delay_s, slow_down
        self.stop, self.fatal = stop, fatal


def failure_of(
    code: int, message: str, details: Any = (), headers: Mapping[str, str] | None = None
) -> CallFailed:
    """The failure behind an HTTP error of a Google-style API: `details` are its error.details, in whatever form."""
    details = _objects(details)
    told_s = retry_info_s(details) or retry_after_s(headers or {})
    delay_s = min(told_s, _LONGEST_DELAY_S) if told_s else None  # 0 and a date gone by tell nothing
    text = f"{code}: {message}"
    if code == 429:
        if _is_daily(details, message):
            return CallFailed("quota", text, stop=True)
        return CallFailed("rate_limited", text, retry=True, delay_s=delay_s, slow_down=True)
    if code in (408, 504):
        return CallFailed("timeout", text, retry=True, delay_s=delay_s)
    if code >= 500:
        return CallFailed("server_error", text, retry=True, delay_s=delay_s)
    if code in (401, 403, 404) or _is_key_problem(details, message):
        return CallFailed("refused_request", text, fatal=True)
    if code == 400 and re.search(r"\bimage\b", message, re.IGNORECASE):
        return CallFailed("bad_image", text)
    return CallFailed("refused_request", text)


def retry_info_s(details: Iterable[dict[str, Any]]) -> float | None:
    """Seconds of google.rpc.RetryInfo, as JSON ("3.5s") or as a dict of seconds and nanos."""
    for item in details:
        delay = item.get("retryDelay", item.get("retry_delay"))
        if isinstance(delay, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)s", delay)):
            return float(match[1])
        if isinstance(delay, dict):
            return whole_number(delay.get("seconds")) + whole_number(delay.get("nanos")) / 1e9
    return None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, given as a number or a date."""
    value = next((headers[key] for key in headers if key.lower() == "retry-after"), None)
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _is_daily(details: Iterable[dict[str, Any]], message: str) -> bool:
    """Whether a violated quota is one that renews only the next day."""
    names = [message]
    for item in details:
        names += [
            str(violation.get("quotaId", violation.get("quota_id", "")))
            for violation in _objects(item.get("violations"))
        ]
        metadata = item.get("metadata")
        names += [str(value) for value in metadata.values()] if isinstance(metadata, dict) else []
    return any(re.search(r"per\s*_?day", name, re.IGNORECASE) for name in names)


def _is_key_problem(details: Iterable[dict[str, Any]], message: str) -> bool:
    reasons = [str(item.get("reason", "")) for item in details]
    return any("API_KEY" in reason for reason in reasons) or "API key" in message


def _objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; none if it is no list, as proxies between us and the API may have it."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list | tuple) else []


def whole_number(value: Any) -> int:
    """A whole number that JSON gave as a number or as digits; 0 for anything else."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"[0-9]{1,15}", value) else 0
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def without_key(text: str, *keys: str | None) -> str:
    """The text with API keys and passwords blotted out, whatever wrote them there: as they are, or as JSON and addresses escape them."""
    for key in filter(None, keys):
        characters = [rf"(?:\\*{re.escape(c)}|(?i:\\+u{ord(c):04x}|%{ord(c):02x}))" for c in key]
        text = re.sub("".join(characters), "[key]", text)
    return text
