"""Chat templates whose generation prompt some answers do not continue: where a prompt ends, and what its answers keep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fasttrain.config import DataConfig
from fasttrain.data.group_tokens import Outcome, tokenize_group
from fasttrain.data.pairs import Message, Pair
from fasttrain.data.tokens import ChatTokenizer, common_start

# Asks with <think>: answers without it leave the generation prompt, as in DeepSeek-R1's distilled models.
ASKS_TO_THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
LOSES_THOUGHTS = ASKS_TO_THINK.replace("m['content']", "m['content'].split('</think>')[-1]")
# As Nemotron 3: the generation prompt is left within what stands before an answer.
NO_THOUGHTS = ASKS_TO_THINK.replace(
    "m['content']",
    "('' if m['role'] == 'user' or '<think>' in m['content'] else '<think></think>') + m['content']",
)
# As Qwen 3.5 without thinking: answers that think leave it.
ASKS_NOT_TO_THINK = ASKS_TO_THINK.replace("<think>\n'", "<think>\n\n</think>\n\n'").replace(
    "m['content']",
    "('' if m['role'] == 'user' or '<think>' in m['content'] else '<think>\n\n</think>\n\n') + m['content']",
)

QUESTION: tuple[Message, ...] = (("user", (("text", "what is it?"),)),)


def tokenized(chat: ChatTokenizer, *rows: tuple[str, str], **settings: Any) -> Outcome:
    """What the rows of one prompt become: (chosen, rejected) each."""
    pairs = [
        Pair(where=f"line {n}", id=str(n), messages=QUESTION, images=(), chosen=chosen, rejected=rejected)
        for n, (chosen, rejected) in enumerate(rows)
    ]
    files = SimpleNamespace(pair=pairs.__getitem__, where=str)
    return tokenize_group(files, list(range(len(rows))), chat, DataConfig(train="x", **settings))  # type: ignore[arg-type]


THOUGHT, PLAIN = "<think>\nlet me see\n</think>\n\na bar", "a red bar"


@pytest.mark.parametrize(
    ("template", "left_out"),
    [(ASKS_TO_THINK, "<think>\n"), (LOSES_THOUGHTS, "<think>\n"), (NO_THOUGHTS, "\n"), (ASKS_NOT_TO_THINK, "\n</think>\n\n")],
    ids=["not written", "thoughts left out", "empty thoughts", "no thinking"],
)  # fmt: skip
def test_a_prompt_ends_where_its_answers_leave_the_generation_prompt_as_in_trl(
    template: str, left_out: str, text_chat: Any
) -> None:
    chat = text_chat(template)
    assert chat.left_out.endswith(left_out) and chat.loses_thoughts is (template == LOSES_THOUGHTS)
    question = [{"role": "user", "content": "what is it?"}]

    def ids(*answer: str, ask: bool = False) -> list[int]:
        turns = question + [{"role": "assistant", "content": text} for text in answer]
        text = chat.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
        return list(chat.tokenizer(text.removesuffix("\n") if answer else text)["input_ids"])

    rows = [
        (PLAIN, "no"),
        (THOUGHT, "no"),
        (PLAIN, THOUGHT),
        (THOUGHT, THOUGHT.upper().replace("THINK", "think")),
    ]
    for row in rows:
        sequences = [ids(answer) for answer in row]
        cut = min(common_start(ids(ask=True), sequence) for sequence in sequences)
        tokens = tokenized(chat, row).tokens
        assert tokens is not None and tokens.prompt.tolist() == ids(ask=True)[:cut]
        assert [part.tolist() for part in tokens.completions] == [sequence[cut:] for sequence in sequences]
    together = tokenized(chat, *rows).tokens  # rows of one prompt share what all of their answers follow
    assert together is not None and [ids(answer) for answer in dict.fromkeys(sum(rows, ()))] == [
        [*together.prompt.tolist(), *part.tolist()] for part in together.completions
    ]


def test_answers_that_leave_the_generation_prompt_are_cut_where_their_sequence_is_full(
    text_chat: Any,
) -> None:
    chat = text_chat(ASKS_TO_THINK)
    whole = tokenized(chat, (PLAIN, THOUGHT)).tokens
    assert whole is not None
    longest = len(whole.prompt) + max(map(len, whole.completions))
    assert tokenized(chat, (PLAIN, THOUGHT), max_length=longest).truncated == 0
    cut = tokenized(chat, (PLAIN, THOUGHT), max_length=longest - 1, overflow="truncate")
    assert cut.truncated == 1 and cut.tokens is not None
    assert len(cut.tokens.prompt) + max(map(len, cut.tokens.completions)) == longest - 1


@pytest.mark.parametrize("template", [ASKS_TO_THINK, NO_THOUGHTS, ASKS_NOT_TO_THINK])
def test_generation_begins_behind_the_whole_generation_prompt(template: str, text_chat: Any) -> None:
    chat = text_chat(template)
    prompt = chat.prompt(QUESTION, "x")
    assert chat.tokenizer.decode(prompt.ids).endswith(chat.left_out) and prompt.text.endswith("\n")
