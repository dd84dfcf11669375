"""The reference log-probs that a run needs, computed where they are not cached yet."""

from __future__ import annotations

from fasttrain.progress import Progress
from fasttrain.ranks import ranks
from fasttrain.reference.fill import FillReport, fill, missing_completions
from fasttrain.train.job import Job
from fasttrain.train.open_images import open_images


def fill_references(job: Job, everything: bool = False) -> FillReport:
    """Compute the reference log-probs that are not cached yet, of evaluation and training pairs.

    Where train.max_steps visits a small part of the training pairs, theirs only, unless `everything` is asked for.
    """
    reports = []
    for data in job.datasets:
        whole = f"{data.key} {data.image_state} {job.keys.pixel_hash}" if data.key else None
        complete = whole is not None and job.cache.is_complete(whole)
        if not ranks().any(not complete):  # asked of all ranks: each may look into a cache of its own
            reports.append(FillReport(data.completions(), 0, 0, 0.0))
            continue
        steps = job.config.train.max_steps
        groups = None if everything or data is not job.train else job.order.groups_of_short_run(steps)
        if groups is None:
            job.tokenize_all(data)
        usable = data.account.groups
        missing = missing_completions(data, job.keys, job.cache, job.memo, groups)
        if job.config.data.on_bad_row == "skip":
            # what is broken is never stored: in a pack it would be missing at every start
            open_images(job, data, [number for number, _ in missing])
            missing = [(number, gone) for number, gone in missing if data.pair_count(number)]
        with Progress(
            "reference log-probs", sum(len(gone) for _, gone in missing), "completions"
        ) as progress:
            reports.append(
                fill(
                    job.policy, data, job.maker(data, with_reference=False), job.cache, missing,
                    tokens_per_pack=job.tokens_per_pack, filled_to=job.packs_filled_to, workers=job.workers, tick=progress.tick,
                )
            )  # fmt: skip
        if data.account.groups != usable and groups is not None:
            reports.append(fill_references(job))  # without the dropped groups the steps hold others
        elif whole and groups is None and data.account.groups == usable:
            job.cache.mark_complete(whole)
    return FillReport(*(sum(values) for values in zip(*[vars(report).values() for report in reports])))
