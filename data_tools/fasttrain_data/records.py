"""The records that stages hand to each other: question, completion, annotation, pair, demonstration.

Every record says how it was made. Keys of other tools are kept. Written by hand, a record needs only the
fields without a default; `image` is read as a one-element `images`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fasttrain_data.errors import BadRow
from fasttrain_data.ids import content_hash
from fasttrain_data.jsonl import Row

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
Score = Annotated[int, Field(ge=0, le=4)]
Text = Annotated[str, StringConstraints(pattern=r"\S")]
Status = Literal[
    "ok",
    "blocked_prompt",
    "blocked_answer",
    "recitation",
    "truncated",
    "empty",
    "malformed",
    "missing_scores",
    "out_of_range",
    "bad_image",
    "quota",
    "rate_limited",
    "server_error",
    "timeout",
    "refused_request",
]
TRANSIENT: frozenset[str] = frozenset({"quota", "rate_limited", "server_error", "timeout"})
_SILENT_WHEN_EMPTY = ("history", "changed", "flags", "calls", "image_sha256")
AnyRecord = TypeVar("AnyRecord", bound="Record")


class Record(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def row(self) -> Row:
        """As written to a file: fields that say nothing are left out."""
        row = self.model_dump(mode="json", exclude_none=True)
        return {key: value for key, value in row.items() if value != [] or key not in _SILENT_WHEN_EMPTY}


class Turn(BaseModel):
    """An earlier message of the conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    text: str


class Prompted(Record):
    """What question, completion and annotation share: the images, the question, what was said before it."""

    images: list[str] = Field(default=[], description="image paths relative to the file or the image root")
    question: Text = Field(description="the user's last turn, without image placeholders")
    history: list[Turn] = Field(default=[], description="earlier turns of the conversation, oldest first")

    @model_validator(mode="before")
    @classmethod
    def _accept_image(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("image") is not None and not data.get("images"):
            data = {**data, "images": [data["image"]]}
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if key != "image"}
        return data

    def prompt_key(self) -> str:
        """Equal exactly for equal images, history and question: never group by image alone."""
        turns = [[turn.role, turn.text] for turn in self.history]
        return content_hash(self.images, turns, self.question)


class Question(Prompted):
    id: str = Field(description="hash of image bytes, history and question")
    source: str | None = Field(default=None, description="the data set it was taken from")
    source_file: str | None = None
    source_place: str | None = Field(default=None, description="line or row in source_file")
    source_id: str | None = Field(default=None, description="the id that the data set gives it")
    category: str | None = None
    reference_answer: str | None = Field(default=None, description="the data set's own answer, if any")
    image_sha256: list[str | None] = Field(default=[], description="null where the image was not at hand")
    changed: list[str] = Field(default=[], description="what was repaired on the way in")
    seed: int | None = Field(default=None, description="seed of the sampling that chose it")
    tool: str | None = Field(default=None, description="what wrote the record, with its version")
    created: str | None = Field(default=None, description="UTC, ISO 8601")


class Completion(Prompted):
    id: str = Field(description="hash of question, text and settings")
    question_id: str
    text: str
    model: str | None = None
    model_version: str | None = Field(default=None, description="as the server or the checkpoint reports it")
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = Field(default=None, description="seed of the first of `count` equal completions")
    seeds: list[int] | None = Field(default=None, description="seeds of all of them")
    count: int = Field(default=1, ge=1, description="how many samples gave this very text")
    finish_reason: str | None = None
    tokens: int | None = Field(default=None, description="length in tokens of the model")
    prompt_hash: str | None = Field(default=None, description="hash of the chat template that was used")
    tool: str | None = None
    created: str | None = None


class Usage(BaseModel):
    """Tokens as the server counted them."""

    model_config = ConfigDict(extra="allow")
    prompt: int = 0
    output: int = 0
    thoughts: int = 0
    cached: int = 0


class Call(BaseModel):
    """One judge call: which answers it saw in which order, what came back, what it cost."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    key: str = Field(description="content hash under which the journal keeps the reply")
    vote: int
    recheck: bool = Field(default=False, description="made only to measure agreement, not part of the median")
    order: list[int] = Field(description="index into `completions` of Answer 1, Answer 2, ...")
    order_seed: int | None = None
    status: Status
    detail: str | None = None
    scores: list[list[Score]] | None = Field(
        default=None, description="per answer as presented: helpfulness .. verbosity"
    )
    model_version: str | None = None
    usage: Usage | None = None
    cost_usd: float | None = None
    latency_s: float | None = None
    created: str | None = None


class Scored(Record):
    """One completion and its five scores, 0 to 4; the median over votes."""

    id: str | None = None
    text: str
    count: int = Field(default=1, ge=1)
    helpfulness: Score | None = None
    correctness: Score | None = None
    coherence: Score | None = None
    complexity: Score | None = None
    verbosity: Score | None = None
    reason: str | None = None

    def scores(self) -> tuple[int, int, int, int, int] | None:
        """The five scores in the order of ATTRIBUTES; None if one is missing."""
        values = [getattr(self, name) for name in ATTRIBUTES]
        return None if None in values else tuple(values)  # type: ignore[return-value]


class Annotation(Prompted):
    id: str | None = Field(default=None, description="hash of question, completions and annotator settings")
    question_id: str | None = None
    completions: list[Scored] = Field(min_length=1)
    status: Status = "ok"
    detail: str | None = Field(default=None, description="what went wrong, in words")
    flags: list[str] = Field(default=[], description="suspicious but not wrong, e.g. constant_scores")
    model: str | None = None
    model_version: str | None = None
    sdk: str | None = None
    temperature: float | None = None
    seed: int | None = None
    votes: int | None = None
    mode: Literal["together", "single"] | None = None
    guide_version: str | None = None
    prompt_hash: str | None = Field(default=None, description="hash of instructions, guide and schema")
    cost_usd: float | None = None
    calls: list[Call] = []
    tool: str | None = None
    created: str | None = None

    @field_validator("calls")
    @classmethod
    def _check_calls(cls, calls: list[Call], info: ValidationInfo) -> list[Call]:
        """Calls speak of completions by their places: a completion taken out by hand leaves them without meaning."""
        places = range(len(info.data.get("completions") or []))
        for number, call in enumerate(calls if places else []):
            if not set(call.order) <= set(places):
                raise ValueError(f"call {number} to grade the {len(places)} completions here by their places")
            wanted = [len(ATTRIBUTES)] * len(call.order)
            if call.scores is not None and [len(row) for row in call.scores] != wanted:
                raise ValueError(f"call {number} with {len(ATTRIBUTES)} scores for each answer in its order")
        return calls


class Pair(Record):
    """A row in TRL's vision preference format, with where it came from."""

    id: str
    images: list[str] = []
    prompt: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    question_id: str | None = None
    chosen_id: str | None = None
    rejected_id: str | None = None
    score_chosen: float | None = None
    score_rejected: float | None = None
    margin: float | None = None
    scores_chosen: dict[str, int] | None = None
    scores_rejected: dict[str, int] | None = None
    chosen_chars: int | None = None
    rejected_chars: int | None = None
    rule: dict[str, Any] | None = Field(default=None, description="score, margin, rejected, seed")
    annotator: str | None = None
    annotator_version: str | None = None
    annotated: str | None = Field(default=None, description="when the answers were annotated, UTC")
    split: str | None = None
    flipped: bool | None = Field(default=None, description="labels swapped on purpose, to study noise")
    tool: str | None = None


class Demonstration(Record):
    """A row in TRL's prompt-completion format: what the SFT arms learn, with where it came from."""

    id: str
    images: list[str] = []
    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]
    question_id: str | None = None
    completion_id: str | None = None
    score: float | None = Field(
        default=None, description="by the rule's score; none for a dataset's own answer"
    )
    scores: dict[str, int] | None = None
    count: int = Field(default=1, ge=1, description="how many samples gave this very answer")
    chars: int | None = None
    rule: dict[str, Any] | None = Field(default=None, description="for, take, score, margin, seed")
    annotator: str | None = None
    annotator_version: str | None = None
    annotated: str | None = Field(default=None, description="when the answers were annotated, UTC")
    split: str | None = None
    tool: str | None = None


def parse_record(kind: type[AnyRecord], row: Row, file: object, place: str) -> AnyRecord:
    """The row as a checked record; BadRow names the first field that is wrong."""
    try:
        return kind.model_validate(row)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or "row"
        got = "nothing" if problem["type"] == "missing" else problem["input"]
        wanted = _WANTED.get(
            problem["type"], problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        )
        raise BadRow(file, place, field, wanted, got) from None


_WANTED = {
    "missing": "a value",
    "string_pattern_mismatch": "text that is not blank",
    "string_unicode": "valid Unicode",
}


def valid_text(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, as decoders write half a character: no record holds one."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def tool_version() -> str:
    """Of every record: looking it up reads and parses the package's metadata."""
    from importlib.metadata import version

    return f"fasttrain-data {version('fasttrain-dpo')}"
