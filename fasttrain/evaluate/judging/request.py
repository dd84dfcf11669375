"""One question to a judge: everything that decides the reply, and the key it is remembered by."""

from __future__ import annotations

from dataclasses import dataclass, field

from fasttrain_data.ids import content_hash


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """about: what is judged, for messages and the journal; it is not part of the key.

    server: where the model is asked, if not at its API's own server: one name may be two models. likely_tokens: a guess at the reply's length before the first one is known. sample: tells apart requests that
    would otherwise share one reply.
    """

    model: str
    system: str | None
    prompt: str
    temperature: float
    max_output_tokens: int
    about: str
    server: str = ""
    likely_tokens: int = 300
    sample: int = 0
    images: tuple[()] = field(default=(), repr=False)

    @property
    def key(self) -> str:
        """The journal's key: equal only for requests that may share one reply."""
        return content_hash(
            "judge",
            self.model,
            self.system,
            self.prompt,
            self.temperature,
            self.max_output_tokens,
            self.sample,
            *([self.server] if self.server else []),
        )

    def prompt_chars(self) -> int:
        return len(self.system or "") + len(self.prompt)

    def likely_output_tokens(self) -> int:
        return min(self.likely_tokens, self.max_output_tokens)
