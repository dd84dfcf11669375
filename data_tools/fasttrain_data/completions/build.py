"""questions.jsonl -> completions.jsonl: draw the samples that the journal does not have, then write from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fasttrain_data.account import Account, account_of
from fasttrain_data.calls.failures import CallFailed
from fasttrain_data.calls.journal import Journal, journal_path
from fasttrain_data.completions.samples import Drawn, Sample, Sampler, SampleSettings, samples_of
from fasttrain_data.ids import content_hash
from fasttrain_data.image_files import BadImage, ImageFile, ImageNames, find_image, read_image
from fasttrain_data.jsonl import Row, check_output, read_rows, whole_rows
from fasttrain_data.progress import Progress
from fasttrain_data.records import Completion, Question, now, parse_record, tool_version, valid_text
from fasttrain_data.spill import SeenKeys


@dataclass
class CompleteResult:
    """questions read, completions written (equal samples are one), samples drawn by this run and failed."""

    account: Account
    questions: int = 0
    completions: int = 0
    drawn: int = 0
    failed: int = 0


def complete(
    questions: Path, output: Path, settings: SampleSettings, sampler: Sampler, *, quiet: bool = False
) -> CompleteResult:
    """Sample `settings.samples` completions of every question and write `output`.

    Samples in `output`'s journal are not drawn again. Equal texts of one question become one record with a
    count. Questions with bad images, repeated ones, failed and empty samples are counted and listed.
    """
    check_output(output, questions)
    names = ImageNames.between(questions, output, settings.image_root)
    with account_of(output) as account, Journal(journal_path(output)) as journal:
        result = CompleteResult(account)

        def done(sample: Sample, drawn: Drawn | CallFailed) -> None:
            result.drawn += not isinstance(drawn, CallFailed)
            journal.append(sample.key, _entry(sample, drawn))
            progress.add()

        total = settings.samples * sum(1 for _ in read_rows(questions))
        with contextlib.closing(Progress(total, "samples", quiet)) as progress:
            sampler.draw(_missing(questions, names, settings, sampler, journal, progress), done)
        seen = SeenKeys()
        with whole_rows(output) as write:
            for question, place, images in _read(questions, names):
                result.questions += 1
                if isinstance(images, BadImage):
                    account.drop("questions", "bad image", f"{questions} {place}", str(images))
                    continue
                samples = samples_of(question, images, settings, sampler.model_version, sampler.prompt_hash)
                if not seen.add(samples[0].key):
                    account.drop("questions", "repeated question", f"{questions} {place}", question.id)
                    continue
                entries = _entries(samples, journal)
                if all(entry["status"] == "bad_image" for entry in entries):
                    account.drop("questions", "bad image", f"{questions} {place}", entries[0]["detail"])
                    continue
                account.keep("questions")
                result.failed += _count_failures(entries, question, account)
                for record in _records(question, entries, settings, sampler):
                    record.images = [names.written(name) for name in question.images]
                    write(record.row())
                    result.completions += 1
            seen.close()
            if not result.completions:
                first = f"; the first: {account.first_detail}" if account.first_detail else ""
                raise account.nothing_left(questions, "completion", first)
    if note := names.note(output):
        account.notes.append(note)
    return result


def _read(
    questions: Path, names: ImageNames
) -> Iterator[tuple[Question, str, tuple[ImageFile, ...] | BadImage]]:
    for place, row in read_rows(questions):
        question = parse_record(Question, row, questions, place)
        try:
            yield (
                question,
                place,
                tuple(read_image(find_image(names.in_root, name)) for name in question.images),
            )
        except BadImage as problem:
            yield question, place, problem


def _missing(
    questions: Path,
    names: ImageNames,
    settings: SampleSettings,
    sampler: Sampler,
    journal: Journal,
    progress: Progress,
) -> Iterator[list[Sample]]:
    """Per question, the samples that are not in the journal; those of a repeated question once."""
    seen = SeenKeys()
    for question, _, images in _read(questions, names):
        missing = []
        if not isinstance(images, BadImage):
            samples = samples_of(question, images, settings, sampler.model_version, sampler.prompt_hash)
            missing = [sample for sample in samples if (journal.get(sample.key) or {}).get("status") != "ok"]
        if missing and not seen.add(samples[0].key):
            missing = []
        if len(missing) < settings.samples:
            progress.add(settings.samples - len(missing))
        if missing:
            yield missing
    seen.close()


def _entry(sample: Sample, drawn: Drawn | CallFailed) -> Row:
    about = {"question_id": sample.question.id, "sample": sample.index, "seed": sample.seed, "created": now()}
    if isinstance(drawn, CallFailed):
        return {**about, "status": drawn.status, "detail": drawn.message[:500]}
    return {
        **about,
        "status": "ok",
        "text": drawn.text,
        "finish_reason": drawn.finish_reason,
        "tokens": drawn.tokens,
        "model_version": drawn.model_version,
    }


def _entries(samples: list[Sample], journal: Journal) -> list[Row]:
    missing = {"status": "server_error", "detail": "the sample was not drawn"}
    return [{**missing, **(journal.get(sample.key) or {}), "sample": sample.index} for sample in samples]


def _count_failures(entries: list[Row], question: Question, account: Account) -> int:
    """Failed and empty samples into the account; returns how many failed."""
    failed = 0
    for entry in entries:
        where = f"question {question.id} sample {entry['sample']}"
        if entry["status"] != "ok":
            failed += 1
            account.drop("samples", entry["status"], where, entry.get("detail", ""))
        elif not entry["text"].strip():
            account.drop(
                "samples", "empty text", where, f"finish reason {entry.get('finish_reason') or 'none'}"
            )
        else:
            account.keep("samples")
    return failed


def _records(
    question: Question, entries: list[Row], settings: SampleSettings, sampler: Sampler
) -> Iterator[Completion]:
    """One record per different text, in the order of first appearance."""
    by_text: dict[str, list[Row]] = {}
    for entry in entries:
        if entry["status"] == "ok" and entry["text"].strip():
            by_text.setdefault(valid_text(entry["text"]).strip(), []).append(entry)
    for text, equal in by_text.items():
        first = equal[0]
        yield Completion(
            id=content_hash(question.id, text, settings.model, settings.temperature),
            question_id=question.id,
            images=question.images,
            history=question.history,
            question=question.question,
            text=text,
            model=settings.model,
            model_version=first.get("model_version"),
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            seed=first["seed"],
            seeds=[entry["seed"] for entry in equal],
            count=len(equal),
            finish_reason=first.get("finish_reason"),
            tokens=first.get("tokens"),
            prompt_hash=sampler.prompt_hash,
            tool=tool_version(),
            created=first["created"],
        )
