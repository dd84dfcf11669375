"""What can be told about a row's tokens without tokenizing it: that it fits, that its answers differ, that nothing is wrong.

Every token of the tokenizers admitted here covers at least one byte of text, and their tokens put together give the text again.
So a text has at most as many tokens as bytes, and texts that differ (by more than blanks at their ends) differ as tokens. With
a chat template that treats every text alike (`template_trace`), most rows of most files can be proven usable by their lengths
and a few searches; the others are tokenized, as all rows are where a model's tokenizer or template allows no proof.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.data.bad_row import BadRow
from fasttrain.data.images import ImageRef, image_size
from fasttrain.data.pairs import IMAGE, Message
from fasttrain.data.plain_rows import PlainPair
from fasttrain.data.template_date import CLOCK
from fasttrain.data.template_trace import Rendered, TemplateTracer, Unknown, placeholder
from fasttrain.data.tokens import ChatTokenizer, common_start

_MOST_NFC = 3  # bytes that a byte can become when text is composed (Unicode's own bound for UTF-8)
_PROBES = ("a first probe", "Größe, 中文", "1 + 2 = 3\n\nand more")
_UNASSIGNED = (0xF1, 0xF2)  # first bytes of characters from U+40000 to U+BFFFF, of which there are none
_BEYOND = re.compile("[\U00040000-\U000bffff]")
_REMEMBERED = 20_000
_DOES_NOT_DROP = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


@dataclass(frozen=True)
class Bound:
    """Most tokens of a row's prompt with its longer answer, and of one of its answers more."""

    sequence: int
    answers: int


@dataclass(frozen=True)
class _Shape:
    """What the template writes around the texts of messages of certain roles and parts."""

    literal_bytes: int
    answer_bytes: int  # of what stands around each answer
    times: int  # how often a text appears at most
    forbidden: tuple[str, ...]
    appends_end: bool


class TokenBounds:
    """Bounds for rows of one model and `max_length`. `Unknown` when it is made, if there are none for that model."""

    def __init__(self, chat: ChatTokenizer, max_length: int) -> None:
        self.chat, self.max_length = chat, max_length
        self._composes, self._forbidden = _look_at_tokenizer(chat.tokenizer)
        self.appended_end = 0
        if not chat.leaves_surely:
            raise Unknown("answers leave the generation prompt where no added token stands")
        source = chat.processor.chat_template
        if not isinstance(source, str):
            raise Unknown("the model has several chat templates")
        self._tracer = TemplateTracer(
            source, {**chat.tokenizer.special_tokens_map, CLOCK: chat.today.strftime}
        )
        self._shapes: dict[tuple[Any, ...], _Shape | None] = {}
        self._sizes: dict[Path, tuple[int, int]] = {}
        usual = (("user", (("text", "x"),)),)
        if self._shape(usual) is None:
            raise Unknown("the chat template cannot be followed for a plain question")

    def of(self, pair: PlainPair) -> Bound | None:
        """The bound of a row that is certainly usable; None for one that has to be tokenized to know."""
        shape = self._shape(pair.messages)
        if shape is None or pair.later:
            return None
        answers = (pair.chosen,) if pair.rejected is None else (pair.chosen, pair.rejected)
        texts = [text for _, parts in pair.messages for part, text in parts if part == "text"]
        everything = "\0".join([*texts, *answers])
        for text in shape.forbidden:
            if text in everything:
                return None
        plain = everything.isascii()
        if not plain and _BEYOND.search(everything):
            return None
        if pair.rejected is not None and not self._differ(pair.chosen, pair.rejected):
            return None
        size = len if plain else self._bytes
        sizes = [size(answer) for answer in answers]
        prompt = shape.literal_bytes + (len(self.chat.bos_ids) if self.chat.bos == "tokenizer" else 0)
        for text in texts:
            if not text or text.isspace():
                return None
            prompt += shape.times * size(text)
        try:
            prompt += self._image_tokens(pair) if pair.images else 0
        except (OSError, ValueError):
            return None
        longest = prompt + max(sizes)
        if longest > self.max_length:
            return None
        self.appended_end += shape.appends_end * len(answers)
        return Bound(longest, sum(sizes) + len(sizes) * shape.answer_bytes)

    def _bytes(self, text: str) -> int:
        if text.isascii():
            return len(text)
        return len(text.encode()) * (_MOST_NFC if self._composes else 1)

    def _differ(self, chosen: str, rejected: str) -> bool:
        chosen, rejected = chosen.strip(), rejected.strip()
        if self._composes and not (chosen.isascii() and rejected.isascii()):
            chosen, rejected = (unicodedata.normalize("NFC", text) for text in (chosen, rejected))
        return chosen != rejected

    def _image_tokens(self, pair: PlainPair) -> int:
        """Tokens in place of a row's images, and bytes of the text around them; OSError or ValueError for a broken image."""
        placeholders = self.chat.placeholders
        assert placeholders is not None
        sizes = [self._size(ref) for ref in pair.images] if placeholders.fixed is None else None
        text, runs = placeholders.expand(placeholders.token * len(pair.images), sizes)
        return len(text.encode()) + sum(runs)

    def _size(self, ref: ImageRef) -> tuple[int, int]:
        if ref.path is None:
            return image_size(ref)
        if ref.path not in self._sizes:
            if len(self._sizes) >= _REMEMBERED:
                self._sizes.clear()
            self._sizes[ref.path] = image_size(ref)
        return self._sizes[ref.path]

    def _shape(self, messages: tuple[Message, ...]) -> _Shape | None:
        key = tuple((role, *(kind for kind, _ in parts)) for role, parts in messages)
        if key not in self._shapes:
            if len(self._shapes) >= _REMEMBERED:
                self._shapes.clear()
            try:
                self._shapes[key] = self._traced(messages)
            except (Unknown, BadRow):
                self._shapes[key] = None
        return self._shapes[key]

    def _traced(self, messages: tuple[Message, ...]) -> _Shape:
        """What the template writes around messages like these; Unknown if it looks at their texts, or does not suit."""
        chat = self.chat
        if chat.pixels is None and any(IMAGE in parts for _, parts in messages):
            raise Unknown("images for a text model")
        conversation = (*messages, ("assistant", (("text", ""),)))
        marked, count = self._with_texts(conversation, placeholder)
        before, asked = self._tracer.render(marked[:-1], True)
        whole, asked_too = self._tracer.render(marked, False)
        self._check_against_the_template(conversation, before, whole)
        *inside, answer, behind = whole.parts
        between = inside.pop()
        told = (*before.parts[:-1],)
        if (
            tuple(inside) != told
            or answer != count - 1
            or not isinstance(between, str)
            or not isinstance(behind, str)
        ):
            raise Unknown("an answer does not follow the prompt that asks for it")
        asked_with = before.literals[-1]
        kept = common_start(between, asked_with)
        if len(asked_with) - kept > len(chat._unwritten) or not behind.endswith(chat._suffix):
            raise Unknown("an answer does not follow the prompt that asks for it")
        self._check_placeholders(before, sum(part == IMAGE for _, parts in messages for part in parts))
        reserved = chat.placeholders.reserved if chat.placeholders else ()
        return _Shape(
            # twice: a tokenizer may put a blank where a text begins, which is once or twice for each of these literals
            literal_bytes=2 * sum(len(literal.encode()) for literal in whole.literals) + 2 * len(whole.parts),
            answer_bytes=4
            + 2 * len((between[max(0, len(asked_with) - len(chat.left_out)) :] + behind).encode()),
            times=max([1, *(whole.texts.count(text) for text in whole.texts)]),
            forbidden=tuple(sorted({*self._forbidden, *asked, *asked_too, *chat.end_tokens, *reserved})),
            appends_end=not any(token in chat._suffix for token in chat.end_tokens),
        )

    def _with_texts(
        self, messages: tuple[Message, ...], text: Callable[[int], str]
    ) -> tuple[list[dict[str, Any]], int]:
        """The messages as the template gets them, every text replaced, and how many texts there are."""
        number = itertools.count()
        replaced = tuple(
            (role, tuple(part if part == IMAGE else ("text", text(next(number))) for part in parts))
            for role, parts in messages
        )
        return [self.chat._message(message) for message in replaced], next(number)

    def _check_against_the_template(
        self, messages: tuple[Message, ...], before: Rendered, whole: Rendered
    ) -> None:
        for shift in range(len(_PROBES)):

            def probe(number: int, shift: int = shift) -> str:
                return f"{_PROBES[(number + shift) % len(_PROBES)]} {number}"

            told, count = self._with_texts(messages, probe)
            texts = [probe(number) for number in range(count)]
            for rendered, asked, generation in ((before, told[:-1], True), (whole, told, False)):
                if self.chat._render(asked, generation, "") != rendered.filled(texts):
                    raise Unknown("the chat template writes something else than was traced")

    def _check_placeholders(self, before: Rendered, images: int) -> None:
        """As many image placeholders as images among what the template writes, and none that a text could complete."""
        for token in self.chat.placeholders.reserved if self.chat.placeholders else ():
            wanted = images if token == self.chat.image_token else 0
            if sum(literal.count(token) for literal in before.literals) != wanted:
                raise Unknown("the template writes other placeholders than the images'")
            if "" in before.literals[1:-1]:
                raise Unknown("two texts stand together")
            for literal, cut in itertools.product(before.literals, range(1, len(token))):
                if literal.endswith(token[:cut]) or literal.startswith(token[cut:]):
                    raise Unknown("a text could complete a placeholder")


def _look_at_tokenizer(tokenizer: Any) -> tuple[bool, tuple[str, ...]]:
    """Whether it composes characters (NFC), and texts whose tokens do not tell them; Unknown if its tokens prove nothing."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Unknown("the tokenizer has no fast form")
    for probe in _PROBES:
        if (
            tokenizer(probe, add_special_tokens=False)["input_ids"]
            != backend.encode(probe, add_special_tokens=False).ids
        ):
            raise Unknown("the tokenizer does more than its fast form")
    about = json.loads(backend.to_str())
    model, added = about["model"], about["added_tokens"] or []
    if model["type"] != "BPE" or model.get("dropout") or about.get("truncation"):
        raise Unknown(f"a tokenizer of type {model['type']}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise Unknown("a tokenizer that marks the parts of words")
    if any(len(token["content"]) < 2 for token in added):
        raise Unknown("a tokenizer with added tokens of one character")
    blanks = tuple(token["content"] for token in added if token["lstrip"] or token["rstrip"])
    steps = [*_steps(about["normalizer"], "normalizers"), *_steps(about["pre_tokenizer"], "pretokenizers")]
    kinds = {step["type"] for step in steps}
    vocabulary = model["vocab"]
    if any(step["type"] == "Split" and step["behavior"] not in _DOES_NOT_DROP for step in steps):
        raise Unknown("a tokenizer that leaves characters out")
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Split", "Digits", "NFC"}:
        return "NFC" in kinds, (*blanks, *_without_tokens(vocabulary))
    if model.get("byte_fallback") and kinds <= {"Prepend", "Replace", "Metaspace", "Split"}:
        if not {"\u2581", *(f"<0x{byte:02X}>" for byte in range(256))} <= set(vocabulary):
            raise Unknown("a tokenizer without tokens for all bytes")
        if not all(_only_marks_blanks(step) for step in steps):
            raise Unknown("a tokenizer that rewrites text")
        return False, (*blanks, "\u2581", "<0x")
    raise Unknown(f"a tokenizer with {', '.join(sorted(kinds)) or 'no steps'}")


def _without_tokens(vocabulary: dict[str, int]) -> tuple[str, ...]:
    """Characters that a vocabulary of bytes leaves out, as SmolLM2's does with some controls; a text loses them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    missing = {byte for byte, name in bytes_to_unicode().items() if name not in vocabulary}
    missing -= {0xC0, 0xC1, *range(0xF5, 0x100)}  # in no UTF-8
    if not all(byte < 0x80 or byte in _UNASSIGNED for byte in missing):
        raise Unknown("a tokenizer without tokens for all bytes")
    return tuple(chr(byte) for byte in sorted(missing) if byte < 0x80)


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return (
        [step for one in part[inner] for step in _steps(one, inner)] if part["type"] == "Sequence" else [part]
    )


def _only_marks_blanks(step: dict[str, Any]) -> bool:
    if step["type"] == "Prepend":
        return step["prepend"] == "\u2581"
    if step["type"] == "Replace":
        return step["pattern"] == {"String": " "} and step["content"] == "\u2581"
    return step["type"] == "Split" or step["replacement"] == "\u2581"
