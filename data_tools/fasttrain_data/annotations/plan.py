"""Which calls a prompt needs: one per vote (and per answer in single mode), each in its own shuffled order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from fasttrain_data.annotations.prompts import ImageReader, Prompt
from fasttrain_data.annotations.request import JudgeRequest
from fasttrain_data.annotations.settings import AnnotateSettings
from fasttrain_data.ids import rng_of, seed_of


@dataclass(frozen=True)
class PlannedCall:
    """order: index into the prompt's completions of Answer 1, Answer 2, ..."""

    key: str
    request: JudgeRequest
    question_id: str
    vote: int
    recheck: bool
    order: tuple[int, ...]
    order_seed: int


def plan_calls(prompt: Prompt, settings: AnnotateSettings, read_images: ImageReader) -> list[PlannedCall]:
    """All calls of a prompt, made already or not; BadImage if an image cannot be used."""
    images = read_images(prompt.images)
    votes = settings.votes + _is_rechecked(prompt, settings)
    planned = []
    for vote, (order, order_seed) in enumerate(itertools.islice(orders(prompt, settings.seed), votes)):
        parts = [order] if settings.mode == "together" else [(index,) for index in range(len(order))]
        for part in parts:
            request = JudgeRequest(
                model=settings.model,
                images=images,
                history=prompt.history,
                question=prompt.question,
                answers=tuple(prompt.completions[index].text for index in part),
                temperature=settings.temperature,
                seed=seed_of("judge", settings.seed, vote),
                max_output_tokens=settings.max_output_tokens,
                sample=vote,
            )
            recheck = vote >= settings.votes
            planned.append(
                PlannedCall(request.key(), request, prompt.question_id, vote, recheck, part, order_seed)
            )
    return planned


def orders(prompt: Prompt, seed: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(order, its seed) of vote 0, 1, ...: shuffled, and different from each other as long as that is possible."""
    indices = list(range(len(prompt.completions)))
    used: set[tuple[int, ...]] = set()
    for vote in itertools.count():
        if len(used) == math.factorial(min(len(indices), 10)):
            used.clear()
        for attempt in itertools.count():
            order_seed = seed_of("order", seed, prompt.question_id, vote, attempt)
            order = tuple(rng_of(order_seed).sample(indices, len(indices)))
            if order not in used:
                break
        used.add(order)
        yield order, order_seed


def _is_rechecked(prompt: Prompt, settings: AnnotateSettings) -> bool:
    return rng_of("recheck", settings.seed, prompt.question_id).random() < settings.recheck
