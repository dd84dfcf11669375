"""How answers are decoded, and what comes of it. No torch here: a server may do the work."""

from __future__ import annotations

from dataclasses import dataclass

from fasttrain.answering.questions import Question
from fasttrain_data.ids import seed_of


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """max_new_tokens: per turn. temperature 0 is greedy. seed: of the run; every turn of every question gets its own."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def temperature_of(self, question: Question) -> float:
        return self.temperature if question.temperature is None else question.temperature

    def seed_of(self, question: Question, turn: int) -> int:
        """31 bits that follow from the run's seed, the question's id and the number of the turn alone."""
        return seed_of("answer", self.seed, str(question.id), turn)


@dataclass(frozen=True)
class Reply:
    """One turn: its text without special tokens and surrounding space, why it ended (`stop`, `length`), its tokens."""

    text: str
    finish: str
    tokens: int
