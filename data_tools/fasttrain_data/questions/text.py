"""Repairs of question text: image placeholders, attribute prompts, and normal forms for comparing."""

from __future__ import annotations

import re
import unicodedata

_PLACEHOLDER = re.compile(r"\s*<(?:image|img|ImageHere)>(?:</img>)?\s*", re.IGNORECASE)
_STEERLM = re.compile(
    r"\s*Please answer the question such that your response is in the following attributes in 5-point"
    r"\s+Likert\s+scale:\s*(?:[A-Z][a-z]+:\s*\d\s*,?\s*)+",
)
_ARTICLES = frozenset({"a", "an", "the"})
_BETWEEN_NUMBERS = re.compile(r"(?<=\d)\s*([-*])\s*(?=\d)")
_OPERATORS = {"-": "\N{MINUS SIGN}", "*": "\N{MULTIPLICATION SIGN}"}
_BESIDE_WORDS = re.compile(r"[^\w\s]")
_SAYS_SOMETHING = frozenset("/%#&@\\^")


def clean_text(text: str) -> tuple[str, list[str]]:
    """(text without image placeholders and attribute prompts, names of the repairs).

    A single placeholder in front is the usual form and no repair.
    """
    changed: list[str] = []
    found = _PLACEHOLDER.findall(text)
    if len(found) > 1:
        changed.append("several placeholders")
    stripped = text.strip()
    if len(found) == 1 and not re.match(_PLACEHOLDER, stripped):
        changed.append("placeholder moved to the front")
    text = _PLACEHOLDER.sub(" ", text) if found else text
    without = _STEERLM.sub("", text)
    if without != text:
        changed.append("attribute prompt removed")
    return without.strip(), changed


def normal_form(text: str) -> str:
    """Case, punctuation, accents' encoding and articles put aside: equal for trivially different questions.

    Signs that mean something are words of their own: those of arithmetic and currencies, emoji.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = _BETWEEN_NUMBERS.sub(lambda match: _OPERATORS[match[1]], folded)
    words = _BESIDE_WORDS.sub(_sign, folded).split()
    return " ".join(word for word in words if word not in _ARTICLES)


def _sign(match: re.Match[str]) -> str:
    """What stands for a character that is no letter, digit or blank."""
    kind = unicodedata.category(match[0])
    if kind == "Cf" or match[0] in "\N{VARIATION SELECTOR-15}\N{VARIATION SELECTOR-16}":
        return ""  # nobody sees it
    if kind in ("Mn", "Mc"):  # vowels and tones of many scripts
        return match[0]
    return f" {match[0]} " if kind in ("Sm", "Sc", "So") or match[0] in _SAYS_SOMETHING else " "


def trigrams(normal: str) -> frozenset[tuple[str, ...]]:
    """Word trigrams of a normal form; the whole form when it is shorter."""
    words = normal.split()
    if len(words) < 3:
        return frozenset({tuple(words)})
    return frozenset(zip(words, words[1:], words[2:]))


def similarity(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Jaccard index of two sets of trigrams."""
    return len(one & other) / len(one | other)
