"""The two ways to a judge: Gemini through google-genai, or any OpenAI-compatible server."""

from __future__ import annotations

import os
import re
from typing import Any, Protocol

from fasttrain.evaluate.judging.options import OPENAI_SERVER, JudgeOptions
from fasttrain.evaluate.judging.request import JudgeRequest
from fasttrain_data.annotations.reply import Reply, without_depths
from fasttrain_data.calls.api_key import key_from_environment
from fasttrain_data.calls.chat_server import KEY_VARIABLE, chat_url, post_chat
from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.errors import UserError

_FINISH = {"stop": "STOP", "length": "MAX_TOKENS", "content_filter": "SAFETY"}


class Client(Protocol):
    """Makes calls; several threads at once."""

    notes: set[str]

    def ask(self, request: JudgeRequest) -> Reply:
        """One call, one attempt. CallFailed when the server gave no reply."""

    def close(self) -> None: ...


def open_client(options: JudgeOptions) -> Client:
    """UserError when a key, an SDK or an address is missing."""
    return GeminiClient(options) if options.api == "gemini" else OpenAIClient(options)


class GeminiClient:
    """google-genai without retries of its own."""

    def __init__(self, options: JudgeOptions) -> None:
        from fasttrain_data.annotations.judge import endpoint_from_environment
        from fasttrain_data.annotations.sdk_genai import open_client as open_genai

        endpoint = endpoint_from_environment(options.base_url, options.api_version, options.timeout_s)
        self._key = endpoint.api_key
        self._client = open_genai(endpoint)
        self.notes: set[str] = set()

    def ask(self, request: JudgeRequest) -> Reply:
        from google.genai import types

        from fasttrain_data.annotations.sdk_genai import generate

        return generate(
            self._client,
            self._key,
            request.model,
            [types.Part(text=request.prompt)],
            system_instruction=request.system,
            temperature=request.temperature,
            max_output_tokens=request.max_output_tokens,
        )

    def close(self) -> None:
        self._client.close()


class OpenAIClient:
    """Chat completions over HTTP.

    Newer models of OpenAI refuse `max_tokens` (they want `max_completion_tokens`) or any temperature but their own. What
    a server refuses by name is asked for in the other way from then on, and `notes` says so.
    """

    def __init__(self, options: JudgeOptions) -> None:
        import httpx

        server = options.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_SERVER
        self._url = chat_url(server, "--judge-url")
        self._key = key_from_environment(KEY_VARIABLE)
        if not self._key and server == OPENAI_SERVER:
            raise UserError(f"wanted an API key in the environment variable {KEY_VARIABLE}, got none")
        width = options.limits.in_flight
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=options.timeout_s,
            limits=httpx.Limits(max_connections=width, max_keepalive_connections=width),
        )
        self._limit_name, self._send_temperature = "max_tokens", True
        self.notes: set[str] = set()

    def ask(self, request: JudgeRequest) -> Reply:
        while True:
            asked_with = (self._limit_name, self._send_temperature)
            try:
                return _reply(post_chat(self._client, self._url, self._body(request, *asked_with), self._key))
            except CallFailed as failure:
                if not self._adapts_to(failure, asked_with):
                    raise

    def _body(self, request: JudgeRequest, limit_name: str, send_temperature: bool) -> dict[str, Any]:
        system = [{"role": "system", "content": request.system}] if request.system else []
        body: dict[str, Any] = {
            "model": request.model,
            "messages": [*system, {"role": "user", "content": request.prompt}],
            limit_name: request.max_output_tokens,
            "n": 1,
        }
        if send_temperature:
            body["temperature"] = request.temperature
        return body

    def _adapts_to(self, failure: CallFailed, asked_with: tuple[str, bool]) -> bool:
        """Whether another way of asking answers this refusal; another thread may have found it meanwhile."""
        if failure.status != "refused_request" or not failure.message.startswith("400"):
            return False
        if "max_completion_tokens" in failure.message and asked_with[0] == "max_tokens":
            self._limit_name = "max_completion_tokens"
            return True
        if re.search(r"\btemperature\b", failure.message) and asked_with[1]:
            self._send_temperature = False
            self.notes.add("the judge's server refuses a temperature; its own was used")
            return True
        return False

    def close(self) -> None:
        self._client.close()


def _reply(body: dict[str, Any]) -> Reply:
    choice = body["choices"][0]
    message, usage = choice["message"], body.get("usage") or {}
    finish = str(choice.get("finish_reason") or "stop")
    refused = message.get("refusal") and not message.get("content")
    thoughts = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return Reply(
        text=message.get("content"),
        finish_reason="SAFETY" if refused else _FINISH.get(finish, finish.upper()),
        block_reason=None,
        model_version=body.get("model"),
        usage={
            "prompt": int(usage.get("prompt_tokens") or 0),
            "output": int(usage.get("completion_tokens") or 0) - int(thoughts),
            "thoughts": int(thoughts),
            "cached": int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
        },
        raw=without_depths(body),
    )
