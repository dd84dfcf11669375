"""The date that a chat template writes, as Llama 3.1's does, held at one day: a run past midnight stays the same run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import date
from typing import Any

CLOCK = "strftime_now"  # by this name transformers gives templates the time


def writes_date(processor: Any) -> bool:
    """Whether the chat template of a processor or tokenizer asks for the time."""
    return CLOCK in _template(processor)


@contextlib.contextmanager
def dated(processor: Any, today: date) -> Iterator[None]:
    """The chat template is rendered as on `today`, at midnight, while the block runs."""
    if not writes_date(processor):
        yield
        return
    from transformers.utils import chat_template_utils

    # no function reaches a template as a variable; compiled templates are kept, and have names of their own
    names = chat_template_utils._compile_jinja_template(_template(processor)).globals
    names[CLOCK] = today.strftime
    try:
        yield
    finally:
        del names[CLOCK]


def _template(processor: Any) -> str:
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template or ""
