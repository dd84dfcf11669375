"""MMBench's rules: which option an answer names, and right only if right in every rotation of the options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

ROTATION = 1_000_000  # the row of rotation k has the index of the question + k times this
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_NEGATIONS = {"not", "isn't", "except", "nor", "neither", "never", "cannot", "can't", "without"}
_BEFORE_A_LETTER = {"option", "answer", "choice", "letter"}
_AFTER_A_LETTER = {"is", "because", "since", "as", "and", "or", "would", "seems"}
Verdict = Literal["right", "wrong", "undecided"]


def option_of(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that the answer names, None where only a judge could tell.

    First the letter: exactly one option's letter stands as a word of its own, and is not the article "A". Then the text:
    exactly one option's text is in the answer, which is at most twice as long as all options. A negation right before
    the letter, or anywhere before a matched text, is left to a judge.
    """
    words = answer.translate(_PUNCTUATION).split()
    letters = [
        letter for letter in options if letter in words and not (letter == "A" and _is_article(answer, words))
    ]
    if len(letters) != 1:
        return _option_by_text(answer, options)
    before = words[: words.index(letters[0])][-2:]
    return None if _NEGATIONS & {word.lower() for word in before} else letters[0]


def _is_article(answer: str, words: list[str]) -> bool:
    """Whether the word "A" goes with a noun: "A dog", but not "A. dog", "(A)", "option A is right", "A is right"."""
    at = words.index("A")
    follower = words[at + 1] if at + 1 < len(words) else ""
    if not re.search(r"(?<![\w'])A [a-z]", answer) or follower in _AFTER_A_LETTER:
        return False
    return at == 0 or words[at - 1].lower() not in _BEFORE_A_LETTER


def _option_by_text(answer: str, options: Mapping[str, str]) -> str | None:
    said = answer.lower()
    if len(said) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in said]
    if len(named) != 1:
        return None
    before = said[: said.index(options[named[0]].lower())]
    return None if _NEGATIONS & set(before.translate(_PUNCTUATION).split()) else named[0]


def base_index(index: int) -> int:
    """The question that a row, rotated or not, belongs to."""
    return index % ROTATION


def rotated(options: Mapping[str, str], answer: str | None, turn: int) -> tuple[dict[str, str], str | None]:
    """The options moved up by `turn` places under the same letters, and the letter of the right one after that."""
    letters, texts = list(options), list(options.values())
    moved = {letter: texts[(place + turn) % len(texts)] for place, letter in enumerate(letters)}
    if answer is None:
        return moved, None
    return moved, letters[(letters.index(answer) - turn) % len(letters)]


def circular_verdict(named: Sequence[str | None], right: Sequence[str]) -> Verdict:
    """One question over its rotations: wrong as soon as one is; undecided if none is and a judge must read one."""
    pairs = list(zip(named, right, strict=True))
    if any(said is not None and said != wanted for said, wanted in pairs):
        return "wrong"
    return "undecided" if any(said is None for said, _ in pairs) else "right"
