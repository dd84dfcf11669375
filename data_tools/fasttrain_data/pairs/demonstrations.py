"""annotations.jsonl -> the data of the paper's other arms: standard SFT, rejection sampling, SteerLM.

Every arm uses the prompts that give a preference pair, so that methods are compared on the same prompts, and a
held-out split is the same for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fasttrain_data.account import Account, account_of
from fasttrain_data.errors import UserError
from fasttrain_data.ids import content_hash, rng_of
from fasttrain_data.image_files import ImageNames
from fasttrain_data.jsonl import LineFile, Row, check_output, read_lines, whole_rows
from fasttrain_data.pairs.build import (
    PromptSettings,
    answer_message,
    grouped,
    held_out_path,
    is_held_out,
    note_sizes,
    prompt_messages,
    scored_answers,
    why_no_pair,
)  # fmt: skip
from fasttrain_data.pairs.rule import choose
from fasttrain_data.pairs.scores import parse_score
from fasttrain_data.pairs.steering import steering_text
from fasttrain_data.records import (
    ATTRIBUTES,
    Annotation,
    Demonstration,
    Question,
    Scored,
    parse_record,
    tool_version,
)  # fmt: skip
from fasttrain_data.spill import OffsetIndex

Method = Literal["sft", "rejection", "steerlm"]
Take = Literal["gold", "best", "random", "all"]
# What each method may take; its default first.
TAKES: dict[Method, tuple[Take, ...]] = {
    "sft": ("gold", "random", "all"),
    "rejection": ("best",),
    "steerlm": ("all", "best", "random"),
}


@dataclass(frozen=True, kw_only=True)
class DemonstrationSettings(PromptSettings):
    """take: which answers of a prompt are learned; None: the method's own. questions: where gold answers are.

    `gold` is the answer that the source dataset gives, `best` the first with the highest score, `random` one of
    the sampled answers (seeded, as often as it was sampled), `all` every different one. margin 0 uses every
    annotated prompt.
    """

    method: Method
    take: Take | None = None
    questions: Path | None = None


@dataclass
class DemonstrationCounts:
    account: Account
    prompts: int = 0
    rows: int = 0
    held_out: int = 0
    chars: int = 0
    score_sum: float = 0.0
    scored: int = 0


def make_demonstrations(
    annotations: Path, output: Path, settings: DemonstrationSettings
) -> DemonstrationCounts:
    """Write the arm's file (and, with held_out, X.heldout.jsonl beside it) and return what was counted.

    UserError for a mistake in file or settings, and when not a single row comes out.
    """
    take = _checked(settings)
    rule = parse_score(settings.score)
    check_output(output, annotations, *([settings.questions] if settings.questions else []))
    names = ImageNames.between(annotations, output, settings.image_root)
    with account_of(output) as account, contextlib.ExitStack() as files:
        counts = DemonstrationCounts(account)
        gold = files.enter_context(_GoldAnswers(settings.questions))
        write = files.enter_context(whole_rows(output))
        write_held_out: Callable[[Row], object] = write
        if settings.held_out:
            write_held_out = files.enter_context(whole_rows(held_out_path(output)))
        sizes: dict[int, int] = {}
        for where, group in grouped(annotations):
            counts.prompts += 1
            answers = scored_answers(where, group, settings, account)
            if answers is None:
                continue
            size = sum(answer.count for answer in answers)
            sizes[size] = sizes.get(size, 0) + 1
            scores = [rule.of(answer.scores() or ()) for answer in answers]
            picked = choose(scores, settings.margin, "all", rng_of(settings.seed))
            if settings.margin and not picked:
                account.drop("prompts", why_no_pair(scores), where, group[0].question)
                continue
            learned = list(_learned(group[0], answers, scores, take, gold, settings))
            if not learned:
                account.drop("prompts", "no reference answer", where, group[0].question)
                continue
            account.keep("prompts")
            aside = is_held_out(group[0], settings)
            for answer, score in learned:
                row = _demonstration(group[0], answer, score, take, settings)
                row.images = [names.written(name) for name in row.images]
                row.split = ("heldout" if aside else "train") if settings.held_out else None
                (write_held_out if aside else write)(row.row())
                _count(counts, row, aside)
        note_sizes(account, sizes, settings)
        if not counts.rows:
            raise _nothing(annotations, take, account, settings)
    if note := names.note(output):
        account.notes.append(note)
    return counts


def _checked(settings: DemonstrationSettings) -> Take:
    """What is taken; UserError for settings that contradict each other."""
    allowed = TAKES[settings.method]
    take = settings.take or allowed[0]
    if take not in allowed:
        raise UserError(f"--take: wanted {' or '.join(allowed)} with --for {settings.method}, got {take}")
    if settings.margin < 0:
        raise UserError(f"--margin: wanted 0 or more, got {settings.margin}")
    if settings.questions is not None and take != "gold":
        raise UserError(f"--questions: wanted only with --take gold, got --take {take}")
    return take


def _learned(
    row: Annotation, answers: list[Scored], scores: list[float], take: Take, gold: _GoldAnswers,
    settings: DemonstrationSettings,
) -> Iterator[tuple[Scored, float | None]]:  # fmt: skip
    """The answers to learn, with their scores."""
    if take == "gold":
        text = gold.of(row)
        if text is not None:
            yield Scored(text=text), None
        return
    if take == "best":
        picked = [scores.index(max(scores))]
    elif take == "random":
        rng = rng_of(settings.seed, row.question_id or row.prompt_key())
        picked = rng.choices(range(len(answers)), [answer.count for answer in answers])
    else:
        picked = list(range(len(answers)))
    for index in picked:
        yield answers[index], scores[index]


def _demonstration(
    row: Annotation, answer: Scored, score: float | None, take: Take, settings: DemonstrationSettings
) -> Demonstration:
    question_id = row.question_id or row.prompt_key()
    asked, values = row, answer.scores()
    if settings.method == "steerlm":
        # a copy: conditioning the record in place would stack a second request on the next answer's
        asked = row.model_copy(update={"question": row.question + steering_text(values or ())})
    return Demonstration(
        id=content_hash(question_id, settings.method, asked.question, answer.text),
        images=row.images,
        prompt=prompt_messages(asked),
        completion=answer_message(answer.text),
        question_id=question_id,
        completion_id=answer.id,
        score=score,
        scores={name: getattr(answer, name) for name in ATTRIBUTES} if values else None,
        count=answer.count,
        chars=len(answer.text),
        rule={
            "for": settings.method,
            "take": take,
            "score": settings.score,
            "margin": settings.margin,
            "seed": settings.seed,
        },
        annotator=row.model,
        annotator_version=row.model_version,
        annotated=row.created,
        tool=tool_version(),
    )


class _GoldAnswers(contextlib.AbstractContextManager["_GoldAnswers"]):
    """The datasets' own answers: from the annotation itself, else from questions.jsonl by question id."""

    def __init__(self, questions: Path | None) -> None:
        self._index = OffsetIndex()
        self._file: LineFile | None = None
        if questions is not None:
            for offset, place, row in read_lines(questions):
                question = parse_record(Question, row, questions, place)
                if _is_text(question.reference_answer):
                    self._index.put(content_hash(question.id), offset)
            self._file = LineFile(questions)

    def of(self, row: Annotation) -> str | None:
        own = (row.model_extra or {}).get("reference_answer")
        if _is_text(own):
            return str(own)
        if self._file is None or row.question_id is None:
            return None
        offset = self._index.get(content_hash(row.question_id))
        return None if offset is None else str(self._file.row_at(offset)["reference_answer"])

    def __exit__(self, *_: object) -> None:
        self._index.close()
        if self._file is not None:
            self._file.close()


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _count(counts: DemonstrationCounts, row: Demonstration, aside: bool) -> None:
    counts.rows += 1
    counts.held_out += aside
    counts.chars += row.chars or 0
    if row.score is not None:
        counts.scored += 1
        counts.score_sum += row.score


def _nothing(annotations: Path, take: Take, account: Account, settings: DemonstrationSettings) -> UserError:
    if take == "gold" and settings.questions is None and account.total_dropped("no reference answer"):
        return UserError(
            f"{annotations}: wanted answers of the source dataset, got none: name the file that holds them with "
            "--questions questions.jsonl, or learn the model's own with --take random"
        )
    return account.nothing_left(annotations, "row")
