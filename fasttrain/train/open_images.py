"""Images opened before steps are planned: what `data.on_bad_row: skip` leaves out is known by then, on every rank."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterable

from fasttrain.data.ahead import in_order, processes
from fasttrain.data.images import open_image
from fasttrain.data.prepared import PreparedData
from fasttrain.errors import UserError
from fasttrain.progress import Progress
from fasttrain.ranks import ranks
from fasttrain.train.job import Job, all_or_none

_CHUNK = 8  # groups that a process opens at a time
_SEVERAL = 200  # groups from which on processes are worth starting


def open_images_of_run(job: Job) -> None:
    """Drop the groups with a broken image among those that the run visits; for an objective that fills no references."""
    for data in job.datasets:
        opened: set[int] = set()
        while True:
            short = job.order.groups_of_short_run(job.config.train.max_steps) if data is job.train else None
            groups = range(len(data)) if short is None else short
            fresh = [number for number in groups if number not in opened]
            if not open_images(job, data, fresh) or short is None:
                break
            opened.update(fresh)  # without the dropped groups the steps hold others


def open_images(job: Job, data: PreparedData, groups: Iterable[int]) -> int:
    """Decode the images of `groups`, each on one rank, and drop on all ranks the groups where that fails; how many.

    UserError at the first such image if data.on_bad_row is stop, and if no pair is left.
    """
    if not data.account.images:
        return 0
    here = ranks()
    numbers = [number for number in groups if data.image_count(number) and data.pair_count(number)]
    found: list[tuple[int, str]] = []
    own = _broken(data, numbers[here.rank :: here.size])
    with all_or_none(), contextlib.closing(own):
        for number, problem in own:
            if job.config.data.on_bad_row != "skip":
                raise UserError(f"{data.where(number)}: images: wanted an image, got {problem}")
            found.append((number, problem))
    broken = sorted(itertools.chain(*here.gather(found)))
    for number, problem in broken:
        data.drop(number, f"images: {problem}")
    if not data.account.pairs:
        field = "train" if data is job.train else "eval"
        here.share_mistake(
            UserError(
                f"data.{field}: wanted at least one usable pair, got none after all images were read ({broken[0][1]})"
            )
        )
    return len(broken)


def _broken(data: PreparedData, numbers: list[int]) -> Generator[tuple[int, str]]:
    """(group, what is wrong) of those of the groups that have a broken image."""

    def problems(chunk: list[int]) -> list[tuple[int, str | None]]:
        return [(number, _problem(data, number)) for number in chunk]

    chunks = [numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK)]
    workers = processes() if len(numbers) >= _SEVERAL else 0
    with (
        Progress("opening images", len(numbers), "groups") as progress,
        contextlib.closing(in_order(problems, chunks, workers)) as seen,
    ):
        for chunk in seen:
            progress.tick(len(chunk))
            yield from ((number, problem) for number, problem in chunk if problem is not None)


def _problem(data: PreparedData, number: int) -> str | None:
    for ref in data.images(number):
        try:
            open_image(ref.read())
        except (OSError, ValueError) as error:
            return f"{ref.name()}: {error}"
    return None
