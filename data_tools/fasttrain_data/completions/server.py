"""Sampling from an OpenAI-compatible server (vLLM and others): one request per sample, many in flight."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import chain
from typing import Any

from fasttrain_data.calls.api_key import key_from_environment
from fasttrain_data.calls.chat_server import KEY_VARIABLE, chat_url, post_chat
from fasttrain_data.calls.dispatch import CallLimits, Dispatcher
from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.completions.samples import Done, Drawn, Sample, SampleSettings, messages_of
from fasttrain_data.errors import UserError
from fasttrain_data.image_files import BadImage, as_sent


class ServerSampler:
    """A `Sampler` over HTTP. The server's own version is not known beforehand, so keys hold the model's name alone."""

    model_version: str | None = None
    prompt_hash: str | None = None

    def __init__(
        self, url: str, settings: SampleSettings, limits: CallLimits, timeout_s: float = 300.0
    ) -> None:
        self.url = chat_url(url)
        self.settings, self.limits = settings, limits
        self.timeout_s = timeout_s
        self._key = key_from_environment(KEY_VARIABLE)

    def draw(self, samples: Iterator[list[Sample]], done: Done) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        pool = httpx.Limits(
            max_connections=self.limits.in_flight, max_keepalive_connections=self.limits.in_flight
        )
        with httpx.Client(headers=headers, timeout=self.timeout_s, limits=pool) as client:
            dispatcher = Dispatcher(lambda sample: self._ask(client, sample), done, self.limits)
            dispatcher.run(chain.from_iterable(samples))
        if dispatcher.stopped is not None and dispatcher.stopped.fatal:
            raise UserError(f"the server refuses: {dispatcher.stopped.message}")

    def _ask(self, client: Any, sample: Sample) -> Drawn:
        """One request; CallFailed if it brought no text."""
        body = post_chat(client, self.url, self._body(sample), self._key)
        choice = body["choices"][0]
        return Drawn(
            text=choice["message"].get("content") or "",
            finish_reason=choice.get("finish_reason"),
            tokens=(body.get("usage") or {}).get("completion_tokens"),
            model_version=body.get("system_fingerprint") or body.get("model"),
        )

    def _body(self, sample: Sample) -> dict[str, Any]:
        settings = self.settings
        return {
            "model": settings.model,
            "messages": _openai_messages(sample),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "seed": sample.seed,
            "n": 1,
        }


def _openai_messages(sample: Sample) -> list[dict[str, Any]]:
    """Images as data URLs; turns without images as plain text, which every server takes."""
    try:
        sent = [as_sent(image) for image in sample.images]
    except BadImage as problem:
        raise CallFailed("bad_image", str(problem)) from None
    urls = iter(f"data:{image.mime_type};base64,{base64.b64encode(image.content).decode()}" for image in sent)
    messages: list[dict[str, Any]] = messages_of(sample.question, len(sample.images))
    for turn in messages:
        parts = turn["content"]
        if len(parts) == 1:
            turn["content"] = parts[0]["text"]
            continue
        turn["content"] = [
            {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part
            for part in parts
        ]
    return messages
