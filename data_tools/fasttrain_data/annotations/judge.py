"""The one seam between annotation and SDKs: a judge takes a request and brings back a reply."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, Protocol

from fasttrain_data.annotations.reply import Reply
from fasttrain_data.annotations.request import JudgeRequest
from fasttrain_data.calls.api_key import key_from_environment
from fasttrain_data.errors import UserError

Sdk = Literal["google-genai", "google-generativeai"]


class Judge(Protocol):
    """Makes calls; several threads at once."""

    def ask(self, request: JudgeRequest) -> Reply:
        """One call, one attempt. CallFailed when the server gave no reply."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where and how calls go. api_key never appears in a representation of this object."""

    api_key: str
    base_url: str | None = None
    api_version: str | None = None
    timeout_s: float = 120.0

    def __repr__(self) -> str:
        return f"Endpoint(base_url={self.base_url!r}, api_version={self.api_version!r}, timeout_s={self.timeout_s})"


def endpoint_from_environment(base_url: str | None, api_version: str | None, timeout_s: float) -> Endpoint:
    """Key from GEMINI_API_KEY or GOOGLE_API_KEY, server also from GOOGLE_GEMINI_BASE_URL."""
    api_key = key_from_environment("GEMINI_API_KEY", "GOOGLE_API_KEY")
    if not api_key:
        raise UserError(
            "wanted an API key in the environment variable GEMINI_API_KEY or GOOGLE_API_KEY, got none"
        )
    base_url = base_url or os.environ.get("GOOGLE_GEMINI_BASE_URL") or None
    if base_url and not base_url.startswith(("http://", "https://")):
        raise UserError(f"--base-url: wanted http://... or https://..., got {base_url!r}")
    return Endpoint(api_key=api_key, base_url=base_url, api_version=api_version, timeout_s=timeout_s)


def open_judge(sdk: Sdk, endpoint: Endpoint) -> Judge:
    """A judge of the named SDK; UserError if that is not installed."""
    if sdk == "google-genai":
        from fasttrain_data.annotations.sdk_genai import GenaiJudge

        return GenaiJudge(endpoint)
    from fasttrain_data.annotations.sdk_legacy import LegacyJudge

    return LegacyJudge(endpoint)
