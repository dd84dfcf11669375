"""Prompts and completions as token ids, through the model's own chat template, tokenizer and processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from hashlib import blake2b
from typing import Any

import numpy as np

from fasttrain.data.bad_row import BadRow
from fasttrain.data.images import PixelMaker
from fasttrain.data.pairs import IMAGE, Message
from fasttrain.data.placeholders import Placeholders, placeholder
from fasttrain.data.template_date import dated, writes_date
from fasttrain.errors import UserError

_PROBE = "probe of the template"
_ANSWER = "answer to the probe"
_THOUGHT = f"<think>\n{_ANSWER}\n</think>\n\nno more"


def common_start(one: Any, other: Any) -> int:
    """How many items, or characters, two sequences begin with alike."""
    pairs = enumerate(zip(one, other))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, as ids, if the tokenizer puts it, and nothing else, in front of a text."""
    with_it, without = (tokenizer(_PROBE, add_special_tokens=add)["input_ids"] for add in (True, False))
    bos = tokenizer.bos_token_id
    begins = bos is not None and list(with_it[: 1 + len(without)]) == [bos, *without]
    return [bos] if begins else []


@dataclass(frozen=True)
class EncodedPrompt:
    """text: as rendered, images as placeholders. runs: how many tokens stand in place of each image token of its ids.

    open: so many of its last ids belong to the generation prompt only; an answer may begin in front of them.
    """

    text: str
    ids: np.ndarray
    expanded: str = ""
    runs: tuple[int, ...] = ()
    open: int = 0

    @property
    def fixed(self) -> int:
        """How many of its ids every answer follows."""
        return len(self.ids) - self.open


class ChatTokenizer:
    """Renders with the chat template and tokenizes without adding anything the template does not write.

    `processor` is a processor (vision model) or a tokenizer (text model). `end_tokens` are the texts of the tokens that end
    an assistant turn. With bos="tokenizer" a prompt begins with what the tokenizer puts in front of a text, if it does and the
    template does not. A template that writes the date writes that of `today`, however long the object lives.
    """

    sees_prompts_whole = False  # set for models where all of a prompt sees all of it

    def __init__(
        self, processor: Any, end_token_ids: list[int], bos: str = "template", today: date | None = None
    ) -> None:
        self.processor = processor
        self.today = today or date.today()
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.bos = bos
        self.bos_ids = beginning(self.tokenizer)
        self.pixels = PixelMaker(processor) if hasattr(processor, "image_processor") else None
        written = self.pixels is not None and getattr(processor, "image_token", None)
        self.image_token = placeholder(processor) if written else None
        ends = [self.tokenizer.convert_ids_to_tokens(i) for i in end_token_ids if i >= 0]
        # a config may name ids that no token has
        self.end_tokens = [token for token in ends if token is not None]
        self.appended_end = 0  # completions whose template wrote no end-of-turn token
        self.split_boundary = 0  # completions whose first token would have merged with the prompt
        if not getattr(processor, "chat_template", None):
            got = "a tokenizer without one"
            if processor is not self.tokenizer:
                got = "a processor without one"
                if getattr(self.tokenizer, "chat_template", None):
                    got += " (its tokenizer has one, for text: put the processor's into chat_template.jinja)"
            raise UserError(f"model.name: wanted a model with a chat template, got {got}")
        if not self.end_tokens:
            raise UserError("model.name: wanted a tokenizer with an end-of-sequence token, got none")
        self._parts_as_list = self._takes_lists()
        question, self._suffix = self._written_after_answers()
        self.loses_thoughts = False  # the template leaves out what an answer says before </think>
        self._unwritten = ""  # the end of the generation prompt that some answers are rendered without
        self._open: list[int] = []  # its last ids, which some answers do not follow
        self.leaves_surely = True  # no text of a prompt can move the token where they leave it
        self._find_where_answers_leave(question)
        self.own_end = self._find_own_end()
        self.end_tokens += self.own_end
        self.placeholders = Placeholders(processor) if self.image_token else None
        self.image_token_id = self.placeholders.feature_token_id if self.placeholders else None

    @property
    def sizes_matter(self) -> bool:
        """Whether the number of an image's tokens depends on its size, so that `prompt` needs the sizes."""
        return self.placeholders is not None and self.placeholders.fixed is None

    @property
    def written_date(self) -> str | None:
        """The day that the template writes into prompts; None if it writes none."""
        return self.today.isoformat() if writes_date(self.processor) else None

    def fingerprint(self) -> str:
        """Hash of everything besides prompt, completion and image bytes that decides a vision model's input."""
        settings = self.pixels.settings() if self.pixels else {}
        text = json.dumps(settings, sort_keys=True, default=str)
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def prompt(
        self, messages: tuple[Message, ...], where: str, sizes: Sequence[tuple[int, int]] | None = None
    ) -> EncodedPrompt:
        """Token ids up to where the assistant's turn begins; image placeholders expanded as the processor does.

        sizes: (width, height) of the images, in order; needed if `sizes_matter`.
        """
        if any(part == IMAGE for _, parts in messages for part in parts) and not self.pixels:
            raise BadRow(
                where,
                "images",
                "a text-only row for a model that is run on text only (docs/models.md)",
                "an image",
            )
        text = self._render([self._message(message) for message in messages], generation=True, where=where)
        self._check_placeholders(text, messages, where)
        expanded, runs = self._expand(text, sizes, where)
        ids = self._ids(expanded, runs, front=True)
        ends_alike = np.array_equal(ids[len(ids) - len(self._open) :], self._open)
        return EncodedPrompt(text, ids, expanded, tuple(runs), len(self._open) if ends_alike else 0)

    def _expand(
        self, text: str, sizes: Sequence[tuple[int, int]] | None, where: str
    ) -> tuple[str, list[int]]:
        if self.placeholders is None:
            return text, []
        try:
            return self.placeholders.expand(text, sizes)
        # as Pixtral's of a thin strip, of which 0 pixels are left
        except (ValueError, ArithmeticError, LookupError) as error:
            pixels = ", ".join(f"{width} x {height}" for width, height in sizes or ())
            raise BadRow(
                where, "images", "images that the model's processor takes", f"{pixels} pixels ({error})"
            ) from None

    def completion(
        self,
        messages: tuple[Message, ...],
        prompt: EncodedPrompt,
        answer: str,
        where: str,
        field: str = "answer",
    ) -> np.ndarray:
        """Token ids of an answer behind the prompt's `fixed` first, up to and including its end-of-turn token.

        `field` names it in errors.
        """
        for token in self.placeholders.reserved if self.placeholders else ():
            if token in answer:
                raise BadRow(where, field, "no image placeholder", f"{token} in the text")
        for token in self.end_tokens:
            if answer.rstrip().endswith(
                token
            ):  # data that was written with its end: the template adds it again
                answer = answer.rstrip().removesuffix(token)
            if token in answer:
                raise BadRow(
                    where, field, "no end-of-turn token, the template adds it", f"{token} in the text"
                )
        if not answer.strip():
            raise BadRow(where, field, "a non-empty answer", "only an end-of-turn token")
        turns = [self._message(message) for message in (*messages, ("assistant", (("text", answer),)))]
        full = self._render(turns, generation=False, where=where)
        continues = full.startswith(prompt.text)
        kept = len(prompt.text) if continues else common_start(full, prompt.text)
        unwritten = len(prompt.text) - kept
        if unwritten > (len(self._unwritten) if prompt.open else 0):
            raise BadRow(
                where, "prompt", "a chat template that continues its own generation prompt",
                f"{full[max(0, len(prompt.text) - 40) :][:80]!r} after {prompt.text[-40:]!r}",
            )  # fmt: skip
        text = self._end_turn(full[kept:], where, field)
        before = prompt.expanded[: len(prompt.expanded) - unwritten]
        ids = self._ids(before + text, prompt.runs, front=True)
        if len(ids) > prompt.fixed and np.array_equal(ids[: prompt.fixed], prompt.ids[: prompt.fixed]):
            return ids[prompt.fixed :]
        self.split_boundary += 1
        behind = self._ids_behind(text)
        if not prompt.open:
            return behind
        return np.concatenate([self._ids(before, prompt.runs, front=True)[prompt.fixed :], behind])

    def _end_turn(self, text: str, where: str, field: str) -> str:
        """The answer as rendered, with the first end-of-turn token behind it and nothing more."""
        if not text.endswith(self._suffix):
            got = f"{text[-40:]!r}, not {self._suffix!r}"
            raise BadRow(where, field, "a chat template that ends every answer alike", got)
        behind = len(text) - len(self._suffix)
        found = [(text.find(token, behind), token) for token in self.end_tokens]
        found = [(position, token) for position, token in found if position >= 0]
        if found:
            position, token = min(found)
            return text[: position + len(token)]
        self.appended_end += 1
        return text[:behind].rstrip() + self.end_tokens[0]

    @property
    def left_out(self) -> str:
        """The end of the generation prompt that some answers are trained without; empty for most templates."""
        return str(self.tokenizer.decode(self._open))

    def _find_where_answers_leave(self, question: list[dict[str, Any]]) -> None:
        """Compare the generation prompt with what is written before an answer, and before one that thinks first."""
        turns = [self._message(("assistant", (("text", answer),))) for answer in (_ANSWER, _THOUGHT)]
        try:
            asked, bare = (self._render(question, generation, "model.name") for generation in (True, False))
            rendered = [self._render([*question, turn], False, "model.name") for turn in turns]
        except BadRow:  # a template that wants other roles: each row will tell
            return
        ids = self._ids(asked)
        for answer, full in zip((_ANSWER, _THOUGHT), rendered):
            before, found, _ = full.partition(_ANSWER)
            kept = common_start(asked, before)
            if not found:
                self.loses_thoughts = True
            # else none of the generation prompt is written, or all of it, and what follows is the answer's own
            elif kept > len(bare) and (answer == _ANSWER or kept < len(asked)):
                fixed = common_start(ids, self._ids(before))
                self._unwritten = max(self._unwritten, asked[kept:], key=len)
                self._open = max(self._open, ids[fixed:].tolist(), key=len)
        if self._open:
            around = ids[len(ids) - len(self._open) - 1 :][:2].tolist()
            self.leaves_surely = any(number in self.tokenizer.added_tokens_decoder for number in around)

    def _written_after_answers(self) -> tuple[list[dict[str, Any]], str]:
        """A question, and what is written behind an answer to it, found with one that cannot be mistaken."""
        system, *turns = [
            self._message((role, (("text", _PROBE),))) for role in ("system", "user", "assistant")
        ]
        where = "model.name"
        try:
            text = self._render(turns, generation=False, where=where)
        except BadRow as refused:
            try:
                turns = [system, *turns]  # some want one
                text = self._render(turns, generation=False, where=where)
            except BadRow:
                raise refused from None
        before, probe, suffix = text.rpartition(_PROBE)
        if _PROBE not in before:
            raise UserError(f"{where}: wanted a chat template that renders assistant turns, got {text!r}")
        return turns[:-1], suffix

    def _find_own_end(self) -> list[str]:
        """The token that the template ends answers with, if it is none that the model stops at: of those behind an answer the last."""
        if any(token in self._suffix for token in self.end_tokens):
            return []
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        found = [(self._suffix.rfind(token), token) for token in added if token.strip()]
        place, token = max(found, default=(-1, ""))
        return [token] if place >= 0 else []

    def _message(self, message: Message) -> dict[str, Any]:
        role, parts = message
        if self._parts_as_list:
            content: Any = [
                {"type": "image"} if part == IMAGE else {"type": "text", "text": part[1]} for part in parts
            ]
        else:
            content = "".join(f"{self.image_token}\n" if part == IMAGE else part[1] for part in parts)
        return {"role": role, "content": content}

    def _render(self, messages: list[dict[str, Any]], generation: bool, where: str) -> str:
        try:
            with dated(self.processor, self.today):
                text: str = self.processor.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation
                )
        except Exception as error:  # noqa: BLE001 (a template may fail in any way it likes)
            roles = ", ".join(message["role"] for message in messages)
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            wanted = "roles that the model's chat template can render"
            raise BadRow(where, "prompt", wanted, f"{roles} ({problem})") from None
        return text

    def _takes_lists(self) -> bool:
        """Whether the template reads content as a list of parts; otherwise it wants a string."""
        if not self.pixels:
            return False
        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            with dated(self.processor, self.today):
                text = self.processor.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
        except Exception:  # noqa: BLE001 (a template may fail on a list in any way it likes)
            return False
        return "probe" in text and "'type'" not in text

    def _check_placeholders(self, text: str, messages: tuple[Message, ...], where: str) -> None:
        if self.image_token is None:
            return
        assert self.placeholders is not None
        images = sum(part == IMAGE for _, parts in messages for part in parts)
        for token in self.placeholders.reserved:
            wanted, found = images if token == self.image_token else 0, text.count(token)
            if found != wanted:
                raise BadRow(
                    where, "images", f"{wanted} placeholder(s) in the rendered prompt",
                    f"{found}: the text itself holds {token}, or the template renders no images",
                )  # fmt: skip

    def leaves_out_bos(self) -> bool:
        """Whether the tokenizer would begin a prompt with a token that the template does not write and that is left out."""
        text = self._render(
            [self._message(("user", (("text", _PROBE),)))], generation=True, where="model.name"
        )
        return bool(self.bos_ids) and self.bos == "template" and not text.startswith(self.tokenizer.bos_token)

    def _ids_behind(self, text: str) -> np.ndarray:
        """Token ids of a text that follows another: some tokenizers put a space in front of one that stands alone."""
        for before in ("\n", "a"):  # the one that the text does not merge with
            front, ids = self._ids(before), self._ids(before + text)
            if len(ids) > len(front) and np.array_equal(ids[: len(front)], front):
                return ids[len(front) :]
        return self._ids(text)

    def _ids(self, text: str, runs: Sequence[int] = (), front: bool = False) -> np.ndarray:
        """Token ids, every image token repeated as often as `runs` says; `front`: the text is that of a whole prompt."""
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        if (
            front
            and self.bos == "tokenizer"
            and self.bos_ids
            and not text.startswith(self.tokenizer.bos_token)
        ):
            # as ids: behind the token's text, the first word would lose the space that some tokenizers put before it
            ids = np.concatenate([np.asarray(self.bos_ids, np.int32), ids])
        if not runs:
            return ids
        times = np.ones(len(ids), np.int64)
        times[ids == self.image_token_id] = runs
        return np.repeat(ids, times)
