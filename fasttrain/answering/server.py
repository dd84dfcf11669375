"""Answers from an OpenAI-compatible server: many questions in flight, the turns of one after each other."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

from fasttrain.answering.decoding import Decoding, Reply
from fasttrain.answering.questions import Question, image_hashes, next_turn
from fasttrain.answering.run import Done, Failed, NotAsked
from fasttrain.data.pairs import IMAGE, Message
from fasttrain.errors import UserError
from fasttrain.files import HashMemo, cache_root


class ServerModel:
    """Answers with the model a server knows by `name`. limits: a `CallLimits` of fasttrain_data.

    The key, if the server wants one, is read from $OPENAI_API_KEY and stands in no file and no message.
    """

    def __init__(self, url: str, name: str, limits: Any, timeout_s: float = 300.0) -> None:
        from fasttrain_data.calls.api_key import key_from_environment
        from fasttrain_data.calls.chat_server import KEY_VARIABLE, chat_url

        self.url, self.name, self.limits, self.timeout_s = chat_url(url), name, limits, timeout_s
        self._key = key_from_environment(KEY_VARIABLE)
        self.memo = HashMemo(cache_root() / "hashes.sqlite")

    @property
    def version(self) -> str:
        """Address and name: what the server runs under the name is its own affair."""
        from fasttrain_data.calls.chat_server import without_credentials

        return f"{without_credentials(self.url)} {self.name}"

    def images_of(self, questions: Sequence[Question]) -> list[tuple[str, ...]]:
        hashes = list(image_hashes(questions, self.memo))
        self.memo.save()
        return hashes

    def answer(self, questions: Sequence[Question], decoding: Decoding, done: Done) -> None:
        """Ask all questions; a wrong address, key or model is a UserError, a question without answer is `Failed`.

        A spent quota ends the run: what is left then is `NotAsked`.
        """
        import httpx

        from fasttrain_data.calls.dispatch import Dispatcher
        from fasttrain_data.calls.failures import CallFailed

        told: set[int] = set()

        def settled(question: Question, result: Any) -> None:
            told.add(id(question))
            done(
                question,
                Failed(f"{result.status}: {result.message}") if isinstance(result, CallFailed) else result,
            )

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        pool = httpx.Limits(
            max_connections=self.limits.in_flight, max_keepalive_connections=self.limits.in_flight
        )
        with httpx.Client(headers=headers, timeout=self.timeout_s, limits=pool) as client:
            dispatcher = Dispatcher(
                lambda question: self._turns(client, question, decoding), settled, self.limits
            )
            dispatcher.run(iter(questions))
        if (stopped := dispatcher.stopped) is None:
            return
        if stopped.fatal:
            raise UserError(f"the server refuses: {stopped.message}")
        for question in questions:
            if id(question) not in told:
                done(question, NotAsked(f"{stopped.status}: {stopped.message}"))

    def _turns(self, client: Any, question: Question, decoding: Decoding) -> list[Reply]:
        from fasttrain_data.calls.chat_server import post_chat

        messages = question.messages
        replies: list[Reply] = []
        for turn in range(question.turns):
            if turn:
                messages = next_turn(messages, replies[-1].text, question.later_turns[turn - 1])
            body = {
                "model": self.name,
                "messages": openai_messages(question, messages),
                "temperature": decoding.temperature_of(question),
                "top_p": decoding.top_p,
                "max_tokens": decoding.max_new_tokens,
                "seed": decoding.seed_of(question, turn),
                "n": 1,
            }
            reply = post_chat(client, self.url, body, self._key)
            choice = reply["choices"][0]
            text = (choice["message"].get("content") or "").strip()
            tokens = (reply.get("usage") or {}).get("completion_tokens") or 0
            replies.append(Reply(text, choice.get("finish_reason") or "stop", int(tokens)))
        return replies

    def close(self) -> None:
        self.memo.close()


def openai_messages(question: Question, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """The conversation as chat completions take it; images as data URLs, turns without images as plain text."""
    urls = _data_urls(question)
    result: list[dict[str, Any]] = []
    for role, parts in messages:
        if IMAGE not in parts:
            result.append({"role": role, "content": "".join(text for _, text in parts)})
            continue
        content = [
            {"type": "image_url", "image_url": {"url": next(urls)}}
            if part == IMAGE
            else {"type": "text", "text": part[1]}
            for part in parts
        ]
        result.append({"role": role, "content": content})
    return result


def _data_urls(question: Question) -> Iterator[str]:
    from fasttrain_data.calls.failures import CallFailed
    from fasttrain_data.image_files import BadImage, as_sent, check_image

    for image in question.images:
        try:
            sent = as_sent(check_image(image.read(), image.name()))
        except BadImage as problem:
            raise CallFailed("bad_image", str(problem)) from None
        yield f"data:{sent.mime_type};base64,{base64.b64encode(sent.content).decode()}"
