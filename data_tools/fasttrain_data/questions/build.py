"""Sources -> questions.jsonl: read, repair, drop what cannot or must not be used, sample, give ids."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fasttrain_data.account import Account, account_of
from fasttrain_data.errors import UserError
from fasttrain_data.ids import content_hash
from fasttrain_data.image_files import BadImage, find_image, read_image
from fasttrain_data.jsonl import check_output, whole_rows
from fasttrain_data.questions.duplicates import Duplicates, Overlap
from fasttrain_data.questions.readers import COORDINATES, Draft, Turns, read_drafts, split_source
from fasttrain_data.questions.sample import Shuffled, share_out
from fasttrain_data.records import Question, now, tool_version
from fasttrain_data.spill import SeenKeys


@dataclass(frozen=True, kw_only=True)
class QuestionSettings:
    """limit: how many questions in all, None for every one. stratify: what shares the limit evenly.

    missing_images: `drop` (counted, listed), `keep` (marked by a null hash), or `stop`.
    on_overlap: what to do with a question whose image or text is in an evaluation file.
    near: see Duplicates. rows: (first, end) of each source, counted from 0 as in the paper, whatever
    the number of questions of a row; None for all.
    """

    limit: int | None = None
    seed: int = 0
    stratify: Literal["source", "category", "none"] = "source"
    turns: Turns | None = None
    near: float = 0.8
    missing_images: Literal["drop", "keep", "stop"] = "drop"
    on_overlap: Literal["drop", "refuse"] = "drop"
    eval_files: tuple[Path, ...] = ()
    drop_coordinates: bool = False
    rows: tuple[int, int] | None = None
    image_root: Path | None = None


@dataclass
class _Candidate:
    path: Path
    draft: Draft
    number: int
    names: list[str]
    files: list[Path | None]
    id: str = ""
    hashes: list[str | None] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.path} {self.draft.place}"


def build_questions(sources: Sequence[str], output: Path, settings: QuestionSettings) -> Account:
    """Write questions.jsonl from `sources` (paths, or FORMAT:path) and return the account of it.

    UserError for a mistake in the sources, for overlap under on_overlap="refuse", and when nothing is left.
    """
    check_output(output, *(split_source(spec)[1] for spec in sources))
    roots = _Roots(sources, output, settings.image_root)
    overlap = Overlap(settings.eval_files)
    with account_of(output) as account, whole_rows(output) as write:
        account.notes += overlap.notes
        entrance = _Entrance(overlap, settings, account)
        candidates = _candidates(sources, roots, overlap, settings, account)
        if settings.limit is None:
            admitted: Iterable[_Candidate] = filter(entrance.admit, candidates)
        else:
            admitted = _sample(candidates, entrance, settings.limit, settings, account)
        for candidate in admitted:
            write(_record(candidate, settings).row())
            roots.named |= bool(candidate.names)
            account.keep(candidate.path.name)
            for what in candidate.draft.changed:
                account.change(candidate.path.name, what)
            if None in candidate.hashes:
                account.change(candidate.path.name, "kept without its image")
        if not account.total_kept():
            hint = ""
            if account.total_dropped("missing image"):
                hint = "; give the folder of the images with --image-root, or keep them with --missing-images keep"
            raise account.nothing_left(", ".join(sources), "usable question", hint)
    if note := roots.note():
        account.notes.append(note)
    return account


class _Roots:
    """Where image names of each source start, and the one root that the output's names start from."""

    def __init__(self, sources: Sequence[str], output: Path, image_root: Path | None) -> None:
        if image_root is not None and not image_root.is_dir():
            raise UserError(f"--image-root: wanted a folder, got {image_root}")
        self.given, self.named = image_root, False  # named: whether a row that was written holds a name
        folders = [os.path.realpath(split_source(spec)[1].parent) for spec in sources]
        self.here = Path(os.path.realpath(output.parent))
        if image_root is not None:
            self.root = Path(os.path.realpath(image_root))
        elif all(Path(folder).is_relative_to(self.here) for folder in folders):
            self.root = self.here
        else:
            self.root = Path(os.path.commonpath(folders))

    def find(self, source: Path, name: str) -> tuple[str, Path | None, str]:
        """(name relative to the output's root, file or None, what is wrong with it)."""
        start = self.root if self.given else Path(os.path.realpath(source.parent))
        try:
            path = find_image(start, name)
        except BadImage as problem:
            return os.path.relpath(start / name, self.root), None, str(problem)
        return os.path.relpath(start / name, self.root), path, ""

    def note(self) -> str | None:
        if self.named and self.given is None and self.root != self.here:
            return (
                f"image names are relative to {self.root}: pass --image-root {self.root} to the next commands"
            )
        return None


def _candidates(
    sources: Sequence[str], roots: _Roots, overlap: Overlap, settings: QuestionSettings, account: Account
) -> Iterator[_Candidate]:
    """Every usable draft, in file order."""
    seen = Duplicates(settings.near)
    first, end = settings.rows or (0, None)
    number = 0
    for spec in sources:
        form, path = split_source(spec)
        source = path.name
        for index, draft in _with_row_numbers(read_drafts(path, form, settings.turns)):
            if index < first or (end is not None and index >= end):
                account.drop(source, "outside --rows", f"{path} {_place(draft)}")
                continue
            if not isinstance(draft, Draft):
                account.drop(source, draft[1], f"{path} {draft[0]}")
                continue
            found = [roots.find(path, name) for name in draft.images]
            number += 1
            candidate = _Candidate(
                path, draft, number, [name for name, _, _ in found], [file for _, file, _ in found]
            )
            problems = [problem for _, _, problem in found if problem]
            if reason := _unwanted(candidate, problems, overlap, seen, settings):
                account.drop(source, reason[0], candidate.where, reason[1])
            else:
                yield candidate
    seen.close()


def _with_row_numbers(
    drafts: Iterator[Draft | tuple[str, str]],
) -> Iterator[tuple[int, Draft | tuple[str, str]]]:
    """Drafts, each with the number of the row that it comes from."""
    for number, (_, of_row) in enumerate(itertools.groupby(drafts, _place)):
        for draft in of_row:
            yield number, draft


def _place(draft: Draft | tuple[str, str]) -> str:
    return draft.place if isinstance(draft, Draft) else draft[0]


def _unwanted(
    candidate: _Candidate, problems: list[str], overlap: Overlap, seen: Duplicates, settings: QuestionSettings
) -> tuple[str, str] | None:
    """(reason, detail) if the draft is left out, judged without reading its images."""
    if settings.drop_coordinates and COORDINATES.search(candidate.draft.question):
        return "pixel coordinates", ""
    if problem := overlap.reason(candidate.draft, candidate.files):
        return _overlap(candidate, problem, settings)
    if problems and settings.missing_images != "keep":
        if settings.missing_images == "stop":
            raise UserError(f"{candidate.where}: image: wanted an existing file, got {problems[0]}")
        return "missing image", problems[0]
    if verdict := seen.verdict(candidate.draft, candidate.files):
        return verdict, candidate.draft.question
    return None


def _overlap(candidate: _Candidate, problem: str, settings: QuestionSettings) -> tuple[str, str]:
    if settings.on_overlap == "refuse":
        raise UserError(f"{candidate.where}: {problem}; use --on-overlap drop to leave such questions out")
    return "overlap with evaluation", problem


class _Entrance:
    """The last check, for which a candidate's images are read: broken, in an evaluation file, or seen before."""

    def __init__(self, overlap: Overlap, settings: QuestionSettings, account: Account) -> None:
        self.overlap, self.settings, self.account = overlap, settings, account
        self._ids = SeenKeys()

    def admit(self, candidate: _Candidate) -> bool:
        reason = self._reason(candidate)
        if reason:
            self.account.drop(candidate.path.name, reason[0], candidate.where, reason[1])
        return reason is None

    def _reason(self, candidate: _Candidate) -> tuple[str, str] | None:
        try:
            candidate.hashes = [read_image(file).sha256 if file else None for file in candidate.files]
        except BadImage as problem:
            return "broken image", str(problem)
        if self.overlap.digests.intersection(candidate.hashes):
            return _overlap(candidate, "its image is in an evaluation file", self.settings)
        identity = [digest or name for digest, name in zip(candidate.hashes, candidate.names, strict=True)]
        turns = [[turn.role, turn.text] for turn in candidate.draft.history]
        candidate.id = content_hash(identity, turns, candidate.draft.question)
        return None if self._ids.add(candidate.id) else ("duplicate", "the same image under another name")


def _sample(
    candidates: Iterator[_Candidate],
    entrance: _Entrance,
    limit: int,
    settings: QuestionSettings,
    account: Account,
) -> list[_Candidate]:
    """A seeded sample of `limit` admitted candidates in file order, shared evenly over the strata.

    Each stratum gives the first of its seeded order that are admitted, however far that is; what it does not
    have the others give.
    """
    with contextlib.closing(Shuffled(settings.seed)) as drawn:
        for candidate in candidates:
            key = content_hash(candidate.draft.images, candidate.draft.question)
            drawn.add(_stratum(candidate, settings), key, candidate)
        admitted = {name: filter(entrance.admit, drawn.draw(name)) for name in drawn.sizes}
        chosen: dict[str, list[_Candidate]] = {name: [] for name in drawn.sizes}
        available = dict(drawn.sizes)
        short = True
        while short:
            short = False
            for name, share in share_out(limit, available).items():
                chosen[name] += itertools.islice(admitted[name], share - len(chosen[name]))
                if len(chosen[name]) < share:
                    available[name], short = len(chosen[name]), True
    for name, size in drawn.sizes.items():
        account.notes.append(f"sampled {name}: {len(chosen[name]):,} of {size:,}")
    found = sum(map(len, chosen.values()))
    if found < limit:
        account.notes.append(f"wanted {limit:,} questions (--limit), got {found:,}: no more can be used")
    return sorted(itertools.chain(*chosen.values()), key=lambda candidate: candidate.number)


def _stratum(candidate: _Candidate, settings: QuestionSettings) -> str:
    if settings.stratify == "none":
        return "all"
    if settings.stratify == "category":
        return f"{candidate.path.name}/{candidate.draft.category or '-'}"
    return candidate.path.name


def _record(candidate: _Candidate, settings: QuestionSettings) -> Question:
    draft = candidate.draft
    return Question(
        id=candidate.id,
        images=candidate.names,
        question=draft.question,
        history=draft.history,
        source=draft.source,
        source_file=candidate.path.name,
        source_place=draft.place,
        source_id=draft.source_id,
        category=draft.category,
        reference_answer=draft.reference,
        image_sha256=candidate.hashes,
        changed=draft.changed,
        seed=settings.seed if settings.limit is not None else None,
        tool=tool_version(),
        created=now(),
    )
