"""annotations.jsonl -> pairs.jsonl: rows grouped by images and question, one rule, everything counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain_data.account import Account, account_of
from fasttrain_data.errors import UserError
from fasttrain_data.ids import content_hash, rng_of
from fasttrain_data.image_files import ImageNames
from fasttrain_data.jsonl import LineFile, check_output, read_lines, whole_rows
from fasttrain_data.pairs.rule import Choice, Rejected, choose
from fasttrain_data.pairs.scores import ROUNDING, ScoreRule, parse_score
from fasttrain_data.records import ATTRIBUTES, Annotation, Pair, Scored, parse_record, tool_version
from fasttrain_data.spill import Groups


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Which prompts are used, whatever is made of them.

    answers: how many sampled answers a prompt must have; prompts with fewer are left out. None: any number,
    with prompts below the most common number counted. held_out: share of the prompts set aside.
    """

    score: str = "hcc"
    margin: float = 2.0
    seed: int = 0
    answers: int | None = None
    held_out: float = 0.0
    image_root: Path | None = None


@dataclass(frozen=True, kw_only=True)
class PairSettings(PromptSettings):
    """And which of a prompt's clearly worse answers is rejected; flip: share of pairs whose two labels are swapped."""

    rejected: Rejected = "random"
    flip: float = 0.0


@dataclass
class PairCounts:
    """What came of the prompts, and sums for the length report."""

    account: Account
    prompts: int = 0
    pairs: int = 0
    held_out: int = 0
    chosen_chars: int = 0
    rejected_chars: int = 0
    margin_sum: float = 0.0


def make_pairs(annotations: Path, output: Path, settings: PairSettings) -> PairCounts:
    """Write pairs.jsonl (and, with held_out, X.heldout.jsonl beside it) and return what was counted.

    UserError for a mistake in file or settings, and when not a single pair comes out.
    """
    rule = parse_score(settings.score)
    if not settings.margin > 0:  # nan is no margin either
        raise UserError(f"--margin: wanted more than 0, got {settings.margin}")
    check_output(output, annotations)
    names = ImageNames.between(annotations, output, settings.image_root)
    with account_of(output) as account, contextlib.ExitStack() as files:
        counts = PairCounts(account)
        write = files.enter_context(whole_rows(output))
        write_held_out = write
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
            aside = is_held_out(group[0], settings)
            for pair in _pairs_of(where, group, answers, rule, settings, account):
                if not aside and _is_flipped(pair, settings):
                    pair = flipped(pair)
                    account.change("pairs", "labels swapped")
                _count(counts, pair, aside)
                pair.images = [names.written(name) for name in pair.images]
                pair.split = ("heldout" if aside else "train") if settings.held_out else None
                (write_held_out if aside else write)(pair.row())
        note_sizes(account, sizes, settings)
        if not counts.pairs:
            raise account.nothing_left(annotations, "pair")
    if note := names.note(output):
        account.notes.append(note)
    return counts


def held_out_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.heldout.jsonl")


def grouped(annotations: Path) -> Iterator[tuple[str, list[Annotation]]]:
    """(where, rows) of every prompt: rows with the same images, history and question, wherever they stand."""
    groups = Groups()
    for offset, place, row in read_lines(annotations):
        groups.add(parse_record(Annotation, row, annotations, place).prompt_key(), offset)
    file = LineFile(annotations)
    try:
        for offsets in groups:
            rows = [file.row_at(offset) for offset in offsets]
            place = f"question {rows[0].get('question_id')}"
            yield (
                f"{annotations} {place}",
                [parse_record(Annotation, row, annotations, place) for row in rows],
            )
    finally:
        file.close()
        groups.close()


def scored_answers(
    where: str, group: list[Annotation], settings: PromptSettings, account: Account
) -> list[Scored] | None:
    """The prompt's different answers that are not blank, all scored; None (and counted) if that cannot be had."""
    failed = [row.status for row in group if row.status != "ok"]
    if len(failed) == len(group):
        account.drop("prompts", f"not annotated: {failed[0]}", where, group[0].question)
        return None
    answers: dict[str, Scored] = {}
    for row in group:
        if row.status == "ok":
            for answer in row.completions:
                if not answer.text.strip():
                    account.change("prompts", "blank answers left out")
                elif answers.setdefault(answer.text, answer) is not answer:
                    account.change("prompts", "answers annotated more than once, first scores taken")
    if not answers:
        account.drop("prompts", "blank answers only", where, group[0].question)
        return None
    if any(answer.scores() is None for answer in answers.values()):
        account.drop("prompts", "incomplete: an answer without scores", where, group[0].question)
        return None
    size = sum(answer.count for answer in answers.values())
    if settings.answers is not None and size < settings.answers:
        account.drop(
            "prompts", f"incomplete: fewer than {settings.answers} answers", where, group[0].question
        )
        return None
    return list(answers.values())


def _pairs_of(
    where: str,
    group: list[Annotation],
    answers: list[Scored],
    rule: ScoreRule,
    settings: PairSettings,
    account: Account,
) -> Iterator[Pair]:
    scores = [rule.of(answer.scores() or ()) for answer in answers]
    first = group[0]
    rng = rng_of(settings.seed, first.question_id or first.prompt_key())
    counts = [answer.count for answer in answers]
    choices = choose(scores, settings.margin, settings.rejected, rng, counts)
    if choices:
        account.keep("prompts")
    else:
        account.drop("prompts", why_no_pair(scores), where, first.question)
    for choice in choices:
        yield _pair(first, answers, choice, rule, settings)


def why_no_pair(scores: Sequence[float]) -> str:
    """The reason that is counted for a prompt whose answers do not differ by the margin."""
    if len(scores) < 2:
        return "one answer only"
    return "tie: all answers score the same" if max(scores) - min(scores) < ROUNDING else "low margin"


def _pair(
    row: Annotation, answers: list[Scored], choice: Choice, rule: ScoreRule, settings: PairSettings
) -> Pair:
    chosen, rejected = answers[choice.chosen], answers[choice.rejected]
    question_id = row.question_id or row.prompt_key()
    return Pair(
        id=content_hash(question_id, chosen.text, rejected.text),
        images=row.images,
        prompt=prompt_messages(row),
        chosen=answer_message(chosen.text),
        rejected=answer_message(rejected.text),
        question_id=question_id,
        chosen_id=chosen.id,
        rejected_id=rejected.id,
        score_chosen=choice.score_chosen,
        score_rejected=choice.score_rejected,
        margin=round(choice.score_chosen - choice.score_rejected, 9),
        scores_chosen={name: getattr(chosen, name) for name in ATTRIBUTES},
        scores_rejected={name: getattr(rejected, name) for name in ATTRIBUTES},
        chosen_chars=len(chosen.text),
        rejected_chars=len(rejected.text),
        rule={
            "score": rule.name,
            "margin": settings.margin,
            "rejected": settings.rejected,
            "seed": settings.seed,
            **({"flip": settings.flip} if settings.flip else {}),
        },
        annotator=row.model,
        annotator_version=row.model_version,
        annotated=row.created,
        tool=tool_version(),
    )


def prompt_messages(row: Annotation) -> list[dict[str, Any]]:
    """TRL's prompt: the history and the question; the images stand at the front of the first user turn."""
    turns = [(turn.role, turn.text) for turn in row.history] + [("user", row.question)]
    first_user = next(index for index, (role, _) in enumerate(turns) if role == "user")
    messages = []
    for index, (role, text) in enumerate(turns):
        images = [{"type": "image"}] * len(row.images) if index == first_user else []
        messages.append({"role": role, "content": [*images, {"type": "text", "text": text}]})
    return messages


def answer_message(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def is_held_out(row: Annotation, settings: PromptSettings) -> bool:
    """Decided by the prompt alone, so that all pairs of a prompt stand on one side."""
    return (
        bool(settings.held_out)
        and rng_of("held out", settings.seed, row.prompt_key()).random() < settings.held_out
    )


def _is_flipped(pair: Pair, settings: PairSettings) -> bool:
    """Decided by the pair alone: the pairs of a smaller share are among those of a larger one."""
    return bool(settings.flip) and rng_of("flip", settings.seed, pair.id).random() < settings.flip


def flipped(pair: Pair) -> Pair:
    """The pair with chosen and rejected swapped, and everything that is said of each."""
    row = pair.row()
    other = {"chosen": "rejected", "rejected": "chosen"}
    for name in ("{}", "{}_id", "score_{}", "scores_{}", "{}_chars"):
        keys = [name.format(side) for side in other]
        row |= {key: row.get(name.format(other[side])) for key, side in zip(keys, other, strict=True)}
    row["id"] = content_hash(pair.question_id, *(row[side][0]["content"][0]["text"] for side in other))
    return Pair.model_validate(row | {"margin": -(pair.margin or 0.0), "flipped": True})


def _count(counts: PairCounts, pair: Pair, aside: bool) -> None:
    counts.pairs += 1
    counts.held_out += aside
    counts.chosen_chars += pair.chosen_chars or 0
    counts.rejected_chars += pair.rejected_chars or 0
    counts.margin_sum += pair.margin or 0.0


def note_sizes(account: Account, sizes: dict[int, int], settings: PromptSettings) -> None:
    """Prompts with fewer answers than is usual in this file are paired, but not in silence."""
    if settings.answers is not None or not sizes:
        return
    usual = max(sizes, key=lambda size: (sizes[size], size))
    if fewer := sum(count for size, count in sizes.items() if size < usual):
        account.notes.append(
            f"{fewer:,} prompts have fewer than {usual} answers, the usual number here; "
            f"--answers {usual} leaves them out"
        )
