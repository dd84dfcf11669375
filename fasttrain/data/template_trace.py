"""What a chat template writes around messages, whatever their texts are: found by rendering placeholders that it cannot look into.

A placeholder is no string, so Jinja and Python can do only those things with it that are defined here: put it into the output,
join it to text, strip its ends, and ask whether it holds a given text. Such a question is answered with no and the text is
noted; for messages that hold none of the noted texts the template therefore takes the same way. Anything else a template tries
is an error here, and then nothing is known about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

_MARK = re.compile("\ue0f0([0-9]+)\ue0f1")
_seen: ContextVar[set[str]] = ContextVar("seen")  # what the rendering that runs has asked
_BLANK = " \t\n\r\x0b\x0c"


def placeholder(number: int) -> str:
    """What stands for text `number` in the messages that are to be traced."""
    return f"\ue0f0{number}\ue0f1"


class Unknown(Exception):
    """The template does something with a text that tracing does not follow."""


@dataclass(frozen=True)
class Rendered:
    """Literal text and numbers of the texts that stand between: `parts` alternate, beginning and ending with a literal.

    Every text appears whole but for blanks that may be stripped off its ends.
    """

    parts: tuple[str | int, ...]

    @property
    def literals(self) -> tuple[str, ...]:
        return self.parts[::2]  # type: ignore[return-value]

    @property
    def texts(self) -> tuple[int, ...]:
        return self.parts[1::2]  # type: ignore[return-value]

    def filled(self, texts: Sequence[str]) -> str:
        return "".join(part if isinstance(part, str) else texts[part] for part in self.parts)


class _Text:
    """Stands for texts that are not known, joined to literals. It is not empty, and neither is what strip leaves of it."""

    __slots__ = ("marked", "seen")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, marked: str, seen: set[str]) -> None:
        self.marked, self.seen = marked, seen

    def _with(self, marked: str) -> _Text:
        return _Text(marked, self.seen)

    def _unknown(self, *arguments: Any) -> Any:
        raise Unknown("its characters are asked for")

    __str__ = __repr__ = __format__ = __len__ = __iter__ = __getitem__ = __int__ = __float__ = __index__ = (
        _unknown
    )
    __lt__ = __le__ = __gt__ = __ge__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _unknown

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: Any) -> _Text:
        return self._with(self.marked + _marked(other))

    def __radd__(self, other: Any) -> _Text:
        return self._with(_marked(other) + self.marked)

    def _holds(self, text: Any) -> bool:
        if not isinstance(text, str) or _MARK.search(text):
            raise Unknown("it is compared with something that is no fixed text")
        if not text.strip():
            raise Unknown("it is searched for blanks")
        for literal in _MARK.sub("\0", self.marked).split("\0"):
            if literal:
                raise Unknown("a text that was joined to others is searched")
        self.seen.add(text)
        return False

    __contains__ = _holds

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _Text):
            raise Unknown("two texts are compared")
        if other is None or other == "":
            return False
        return self._holds(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def startswith(self, text: Any) -> bool:
        return self._holds(text)

    endswith = startswith

    def strip(self, characters: Any = None) -> _Text:
        if characters is not None and (not isinstance(characters, str) or characters.strip(_BLANK)):
            raise Unknown("more than blanks is stripped off")
        return self._with(self.marked.strip(characters))

    def lstrip(self, characters: Any = None) -> _Text:
        return self._with(self.strip(characters).marked + self.marked[len(self.marked.rstrip(characters)) :])

    def rstrip(self, characters: Any = None) -> _Text:
        return self._with(
            self.marked[: len(self.marked) - len(self.marked.lstrip(characters))]
            + self.strip(characters).marked
        )

    def split(self, text: Any, limit: Any = -1) -> list[_Text]:
        self._holds(text)
        return [self]

    def replace(self, old: Any, new: Any) -> _Text:
        self._holds(old)
        return self


def _marked(value: Any) -> str:
    if isinstance(value, _Text):
        return value.marked
    if isinstance(value, str):
        return value
    raise Unknown(f"it is joined to {type(value).__name__}")


def _joined(text: str) -> str | _Text:
    return _Text(text, _seen.get()) if _MARK.search(text) else text


def _also_for_texts(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, _Text) or test(value)


def _trim(value: Any, characters: Any = None) -> Any:
    from jinja2.filters import do_trim

    return value.strip(characters) if isinstance(value, _Text) else do_trim(value, characters)


def _joins_by_adding(tree: Any) -> Any:
    """Jinja's `~` asks its operands for their characters; `+` does not."""
    from jinja2 import nodes, visitor

    class Adding(visitor.NodeTransformer):
        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            first: Any
            first, *rest = [nodes.Filter(part, "string", [], [], None, None) for part in node.nodes]
            for part in rest:
                first = nodes.Add(first, part)
            return first

    return Adding().visit(tree)


def _traced_template(source: str) -> Any:
    from transformers.utils import chat_template_utils

    plain = chat_template_utils._compile_jinja_template(source).environment
    tracer = plain.overlay(finalize=lambda value: value.marked if isinstance(value, _Text) else value)
    tracer.tests = plain.tests | {
        name: _also_for_texts(plain.tests[name]) for name in ("string", "iterable", "sequence")
    }
    tracer.filters = plain.filters | {
        "trim": _trim,
        "string": lambda v: v if isinstance(v, _Text) else str(v),
    }
    tracer.concat = lambda pieces: _joined("".join(pieces))  # also what a macro or a block set returns
    return tracer.from_string(_joins_by_adding(tracer.parse(source)))


class TemplateTracer:
    """Traces a chat template for messages of any shape. `variables` are what the tokenizer gives to its template."""

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        self._template, self._variables = _traced_template(source), variables

    def render(self, messages: list[dict[str, Any]], generation: bool) -> tuple[Rendered, frozenset[str]]:
        """What is written, and texts that no message may hold for that to be so. Texts are written as `placeholder`s.

        Unknown if the template does more with a text than tracing follows, or refuses these messages.
        """
        seen: set[str] = set()
        token = _seen.set(seen)

        def placed(value: Any) -> Any:
            if isinstance(value, str):
                return _joined(value)
            if isinstance(value, list):
                return [placed(part) for part in value]
            return {key: placed(part) for key, part in value.items()} if isinstance(value, dict) else value

        try:
            text = self._template.render(
                messages=placed(messages),
                tools=None,
                documents=None,
                add_generation_prompt=generation,
                **self._variables,
            )
        except Exception as error:  # noqa: BLE001 (a template may fail in any way it likes)
            raise Unknown(str(error)) from None
        finally:
            _seen.reset(token)
        parts = enumerate(_MARK.split(_marked(text)))
        return Rendered(tuple(part if n % 2 == 0 else int(part) for n, part in parts)), frozenset(seen)
