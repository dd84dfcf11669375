"""Journal entries of a prompt's calls -> its annotation record."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fasttrain_data.annotations.guide import GUIDE_VERSION
from fasttrain_data.annotations.prompts import Prompt
from fasttrain_data.annotations.request import prompt_hash
from fasttrain_data.annotations.settings import AnnotateSettings
from fasttrain_data.ids import content_hash
from fasttrain_data.records import ATTRIBUTES, Annotation, Call, Scored, Status, tool_version, valid_text


def assemble(
    prompt: Prompt, images: list[str], entries: Sequence[dict[str, Any]], settings: AnnotateSettings
) -> Annotation:
    """The record of a prompt; `entries` are the journal's, in the order they were planned.

    A prompt is ok when more than half of its votes are; its scores are the medians over those. Otherwise its
    status is the commonest failure.
    """
    calls = [_call(entry) for entry in entries]
    votes = _votes([call for call in calls if not call.recheck])
    good = [vote for vote in votes if all(call.status == "ok" for call in vote)]
    failed = [call for vote in votes for call in vote if call.status != "ok"]
    flags = []
    if len(good) * 2 > len(votes):
        status: Status = "ok"
        detail = None
        completions = _score(prompt, good, entries)
        if failed:
            flags.append("partial_votes")
        if len(completions) > 1 and len({completion.scores() for completion in completions}) == 1:
            flags.append("constant_scores")
    else:
        status = Counter(call.status for call in failed).most_common(1)[0][0]
        detail = next(call.detail for call in failed if call.status == status)
        completions = [_plain(prompt, index) for index in range(len(prompt.completions))]
    return _record(prompt, images, status, detail, flags, completions, calls, settings)


def assemble_failed(
    prompt: Prompt, images: list[str], status: Status, detail: str, settings: AnnotateSettings
) -> Annotation:
    """The record of a prompt for which no call was made."""
    completions = [_plain(prompt, index) for index in range(len(prompt.completions))]
    return _record(prompt, images, status, detail, [], completions, [], settings)


def _record(
    prompt: Prompt,
    images: list[str],
    status: Status,
    detail: str | None,
    flags: list[str],
    completions: list[Scored],
    calls: list[Call],
    settings: AnnotateSettings,
) -> Annotation:
    costs = [call.cost_usd for call in calls if call.cost_usd is not None]
    versions = sorted({call.model_version for call in calls if call.model_version})
    return Annotation(
        id=content_hash(
            prompt.question_id, [c.text for c in prompt.completions], prompt_hash(), settings.model
        ),
        question_id=prompt.question_id,
        images=images,
        history=list(prompt.history),
        question=prompt.question,
        completions=completions,
        status=status,
        detail=detail,
        flags=flags,
        model=settings.model,
        model_version=", ".join(versions) or None,
        sdk=settings.sdk,
        temperature=settings.temperature,
        seed=settings.seed,
        votes=settings.votes,
        mode=settings.mode,
        guide_version=GUIDE_VERSION,
        prompt_hash=prompt_hash(),
        cost_usd=sum(costs) if costs else None,
        calls=calls,
        tool=tool_version(),
        created=max((call.created for call in calls if call.created), default=None),
    )


def _call(entry: dict[str, Any]) -> Call:
    known = {key: entry[key] for key in Call.model_fields if entry.get(key) is not None}
    return Call.model_validate(known)


def _votes(calls: list[Call]) -> list[list[Call]]:
    by_vote: dict[int, list[Call]] = {}
    for call in calls:
        by_vote.setdefault(call.vote, []).append(call)
    return list(by_vote.values())


def _score(prompt: Prompt, good: list[list[Call]], entries: Sequence[dict[str, Any]]) -> list[Scored]:
    """Medians over the good votes, orders undone; the reason is the first good vote's."""
    scores: list[list[list[int]]] = [[] for _ in prompt.completions]
    for vote in good:
        for call in vote:
            for index, row in zip(call.order, call.scores or [], strict=True):
                scores[index].append(row)
    reasons: dict[int, str] = {}
    for entry in entries:
        for index, reason in zip(entry["order"], entry.get("reasons") or [], strict=False):
            reasons.setdefault(index, reason)
    completions = []
    for index, rows in enumerate(scores):
        medians = [statistics.median_low(column) for column in zip(*rows, strict=True)]
        plain = _plain(prompt, index)
        named = dict(zip(ATTRIBUTES, medians, strict=True))
        completions.append(
            plain.model_copy(update={**named, "reason": valid_text(reasons.get(index, "")) or None})
        )
    return completions


def _plain(prompt: Prompt, index: int) -> Scored:
    completion = prompt.completions[index]
    return Scored(id=completion.id, text=completion.text, count=completion.count)
