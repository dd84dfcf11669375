"""What tests of token ids share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from fasttrain.data.tokens import ChatTokenizer


@pytest.fixture
def text_chat(tiny_models: ModuleType) -> Callable[..., ChatTokenizer]:
    """A chat tokenizer of a text model with a template; `end` is its end-of-turn token."""

    def build(template: str | None = None, end: str = "<|im_end|>") -> ChatTokenizer:
        tokenizer = tiny_models.build_tokenizer(template or tiny_models.CHATML, eos=end)
        return ChatTokenizer(tokenizer, [tokenizer.eos_token_id])

    return build
