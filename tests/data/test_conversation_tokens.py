"""Conversations as tokens: every answer is learned behind what its template writes before it, in as few sequences as that takes."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fasttrain.config import DataConfig
from fasttrain.data.answer_tokens import check_beginning, plain
from fasttrain.data.bad_row import BadRow
from fasttrain.data.group_tokens import GroupTokens, Outcome, tokenize_group
from fasttrain.data.pairs import Message, Pair
from fasttrain.data.tokens import EncodedPrompt

TURN = "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
AS_SAID = "{% for m in messages %}{{ " + TURN + " }}{% endfor %}" + ASK
# As Qwen 3: what an answer thought is left out once another turn follows.
FORGETS = AS_SAID.replace(
    "m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])"
)
# As Mistral 7B v0.3: the system's turn stands in front of the last question.
LAST_SYSTEM = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% set asked = (messages | selectattr('role', 'equalto', 'user') | list)[-1]['content'] %}"
    "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'user' and m['content'] == asked %}{{ system }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
) + ASK
# An end that earlier answers have not.
NO_ENDS = AS_SAID.replace(
    "+ '<|im_end|>\n'", "+ ('\n' if m['role'] == 'assistant' and not loop.last else '<|im_end|>\n')"
)

SAID = [
    ("system", "Be brief."),
    ("user", "what is it?"),
    ("assistant", "<think>\nlet me see\n</think>\n\na bar"),
    ("user", "which colour?"),
    ("assistant", "red"),
    ("user", "and how tall is it?"),
    ("assistant", "as tall as two of the others"),
]


def outcome(chat: Any, said: list[tuple[str, str]] = SAID, **settings: Any) -> Outcome:
    """The conversation of these turns, twice."""
    turns: list[Message] = [(role, (("text", text),)) for role, text in said]
    first = next(n for n, (role, _) in enumerate(said) if role == "assistant")
    later = tuple(((turns[n],), said[n + 1][1]) for n in range(first + 1, len(said), 2))
    pair = Pair(
        where="line 1", id="1", messages=tuple(turns[:first]), images=(), chosen=said[first][1], rejected=None, later=later
    )  # fmt: skip
    files = SimpleNamespace(pair=lambda row: pair, where=str)
    return tokenize_group(files, [0, 1], chat, DataConfig(train="x", **settings))  # type: ignore[arg-type]


def learned(tokens: GroupTokens) -> Counter[tuple[int, ...]]:
    """Every target with all ids before it, counted."""
    found: Counter[tuple[int, ...]] = Counter()
    for ids in tokens.completions:
        whole = [*tokens.prompt.tolist(), *plain(ids).tolist()]
        start = len(tokens.prompt)
        found.update(tuple(whole[: start + at + 1]) for at, target in enumerate(ids.tolist()) if target >= 0)
    return found


def truth(chat: Any, said: list[tuple[str, str]] = SAID) -> Counter[tuple[int, ...]]:
    """The same, each answer rendered by itself behind what was said before it."""
    found: Counter[tuple[int, ...]] = Counter()
    for number, (role, _) in enumerate(said):
        if role == "assistant":
            turns = [{"role": role, "content": text} for role, text in said[: number + 1]]
            asked = chat.tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
            text = chat.tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
            ids = chat.tokenizer(text)["input_ids"]
            found.update(
                tuple(ids[: at + 1]) for at in range(len(chat.tokenizer(asked)["input_ids"]), len(ids))
            )
    return found


@pytest.mark.parametrize(
    ("template", "sequences"),
    [(AS_SAID, 1), (FORGETS, 2), (LAST_SYSTEM, 3), (NO_ENDS, 3)],
    ids=["as said", "forgets thoughts", "system before the last question", "no ends"],
)
def test_every_answer_is_learned_behind_what_the_template_writes_before_it(
    template: str, sequences: int, text_chat: Any
) -> None:
    chat = text_chat(template)
    tokens = outcome(chat).tokens
    assert tokens is not None and learned(tokens) == truth(chat)
    assert len(tokens.completions) == sequences and (tokens.completions[0] >= 0).any()
    assert tokens.pairs.tolist() == [[n, n] for n in range(sequences)] * 2


def test_a_conversation_is_cut_where_its_sequence_is_full(text_chat: Any) -> None:
    chat = text_chat(AS_SAID)
    longest = max(map(len, truth(chat)))
    assert outcome(chat, max_length=longest).truncated == 0
    second = max(map(len, truth(chat, SAID[:5])))
    for room in (longest - 1, longest - 12, second + 1, second - 1):
        cut = outcome(chat, max_length=room, overflow="truncate")
        assert cut.tokens is not None and not cut.events and cut.truncated == 1
        assert learned(cut.tokens) == Counter({ids: 1 for ids in truth(chat) if len(ids) <= room})


def test_answers_that_are_too_long_are_dropped_and_those_before_them_learned(text_chat: Any) -> None:
    chat = text_chat(AS_SAID)
    room = max(map(len, truth(chat, SAID[:5])))
    found = outcome(chat, max_length=room, overflow="drop")
    assert found.tokens is not None and learned(found.tokens) == truth(chat, SAID[:5])
    assert [(kind, entry.reason.split(" tokens")[0]) for kind, entry in found.events] == [
        ("dropped", f"completion 3 of 3: {max(map(len, truth(chat)))}")
    ] * 2
    refused = outcome(chat, max_length=room, overflow="error")
    assert (
        refused.events[0].kind == "stop"
        and "completion 3 of 3: wanted at most" in refused.events[0].entry.reason
    )
    none = outcome(chat, max_length=max(map(len, truth(chat, SAID[:3]))) - 1, overflow="drop")
    assert none.tokens is None and [kind for kind, _ in none.events] == ["dropped"] * 2


def test_a_model_whose_prompts_see_what_is_asked_later_learns_one_answer_a_row(text_chat: Any) -> None:
    chat = text_chat(AS_SAID)
    chat.sees_prompts_whole = True
    [(kind, entry), _] = outcome(chat).events
    assert kind == "bad" and entry.reason.startswith("turns: wanted one answer a row")


@pytest.mark.parametrize(
    ("later", "told"),
    [
        (((), "red"), r"turns: wanted one answer a row with a chat template .*, got 2 answers"),
        (None, r"images: wanted data\.group_by prompt with a chat template .*, got image"),
    ],
)
def test_an_image_behind_another_beginning_is_refused_with_a_way_out(later: Any, told: str) -> None:
    """As of Pixtral, which moves the system's turn to the last question."""
    pair = Pair(
        where="line 1", id="1", messages=(), images=(), chosen="a bar", rejected=None, later=(later,) if later else ()
    )  # fmt: skip
    chat: Any = SimpleNamespace(image_token_id=9)
    first = EncodedPrompt("", np.array([1, 2, 9, 3]))
    assert check_beginning(first, np.array([~1, ~2, ~9, ~4, 5]), pair, chat) == 3
    with pytest.raises(BadRow, match=told):
        check_beginning(first, np.array([~1, ~9, ~3, 5]), pair, chat)
