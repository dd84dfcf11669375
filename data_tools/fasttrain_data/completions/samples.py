"""The samples a questions file needs, each with its own seed and key, and the journal that knows which are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.errors import UserError
from fasttrain_data.ids import content_hash, seed_of
from fasttrain_data.image_files import ImageFile
from fasttrain_data.records import Question


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What decides the text of a sample, besides model and question.

    bos: of a local model, as `model.bos` in a recipe: whether a prompt begins as the template says, or with the token that
    the tokenizer puts in front of a text also where the template does not write it.
    """

    model: str
    samples: int = 4
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0
    bos: Literal["template", "tokenizer"] = "template"
    image_root: Path | None = None

    def __post_init__(self) -> None:
        for name, got, right, wanted in (
            ("--model", self.model, bool(self.model.strip()), "a model"),
            ("--samples", self.samples, self.samples >= 1, "at least 1"),
            ("--temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
        ):
            if not right:
                raise UserError(f"{name}: wanted {wanted}, got {got!r}")


@dataclass(frozen=True)
class Sample:
    """One completion to be drawn: sample number `index` of a question."""

    key: str
    question: Question
    images: tuple[ImageFile, ...] = field(repr=False)
    index: int
    seed: int


@dataclass(frozen=True)
class Drawn:
    """A completion as it came: its text without special tokens, why it ended ("stop" or "length"), its length."""

    text: str
    finish_reason: str | None
    tokens: int | None
    model_version: str | None


class Sampler(Protocol):
    """Draws samples. Known before the first of them: which model this is, for the journal's keys."""

    model_version: str | None
    prompt_hash: str | None

    def draw(self, samples: Iterator[list[Sample]], done: Done) -> None:
        """Draw all samples, given question by question; tell `done` of each as it comes.

        UserError for a model, key or address that does not work for any sample.
        """


class Done(Protocol):
    def __call__(self, sample: Sample, result: Drawn | CallFailed, /) -> None: ...


def samples_of(
    question: Question,
    images: tuple[ImageFile, ...],
    settings: SampleSettings,
    version: str | None,
    prompt_hash: str | None = None,
) -> list[Sample]:
    """All samples of a question. A seed follows from the question and the sample's number alone.

    version, prompt_hash: the sampler's; a template that changed gives other samples as weights do.
    """
    samples = []
    begun: list[Any] = [] if settings.bos == "template" else [["bos", settings.bos]]
    begun += [["template", prompt_hash]] if prompt_hash else []
    for index in range(settings.samples):
        seed = seed_of("complete", settings.seed, question.id, index)
        key = content_hash(
            [image.sha256 for image in images],
            [[turn.role, turn.text] for turn in question.history],
            question.question,
            [settings.model, version],
            [settings.temperature, settings.top_p, settings.max_new_tokens],
            seed,
            *begun,
        )
        samples.append(Sample(key, question, images, index, seed))
    return samples


def messages_of(question: Question, images: int) -> list[dict[str, object]]:
    """The conversation as roles and parts; images stand in the first user turn, in front."""
    turns = [(turn.role, turn.text) for turn in question.history] + [("user", question.question)]
    first_user = next(index for index, (role, _) in enumerate(turns) if role == "user")
    messages: list[dict[str, object]] = []
    for index, (role, text) in enumerate(turns):
        shown = [{"type": "image"}] * (images if index == first_user else 0)
        messages.append({"role": role, "content": [*shown, {"type": "text", "text": text}]})
    return messages
