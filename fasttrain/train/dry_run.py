"""`--dry-run`: check recipe, data and model as training would, open every image, print what a run would be."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from fasttrain.config import DPOConfig
from fasttrain.data.answer_tokens import plain
from fasttrain.data.packs import Pack, plan_step, run_tokens
from fasttrain.files import user_path
from fasttrain.model.flops import pass_flops
from fasttrain.plan.passes import CannotCount
from fasttrain.plan.work import pack_layout
from fasttrain.ranks import full_shape, ranks
from fasttrain.reference.fill import missing_completions
from fasttrain.train.engine import make_engine
from fasttrain.train.first_step import check_sharing, try_group
from fasttrain.train.job import Job, build_job
from fasttrain.train.objective import Objective
from fasttrain.train.open_images import open_images
from fasttrain.train.run_folder import check_output, first_start

_STEPS_LOOKED_AT = 20


def dry_run(config: DPOConfig, loss: Objective, *, resume: bool, overwrite: bool) -> str:
    """The report of a dry run; UserError for the first mistake, as training would raise it."""
    check_output(config, loss.command, resume=resume, overwrite=overwrite)
    began = first_start(user_path(config.train.output), resume=resume)
    with contextlib.closing(build_job(config, loss, began)) as job:
        if config.distributed.zero_stage == 3:  # its hooks gather the weights
            make_engine(job.policy, config, checkpointing=False)
        for data in job.datasets:
            job.tokenize_all(data)
        check_sharing(job)
        tried = try_group(job)
        for data in job.datasets:
            open_images(job, data, range(len(data)))
        return "\n".join(_report(job, *tried))


def _report(job: Job, tried: str, log_prob: float) -> Iterator[str]:
    config, account = job.config, job.train.account
    yield f"model       {config.model.name}: {_count(job)}, {job.policy.model.dtype}, on {job.device}"
    yield f"data        {account.rows:,} rows: {account.pairs:,} {job.loss.unit} in {account.groups:,} groups, {account.images:,} images"
    for watch in job.watches:
        yield f"watch       {watch.benchmark.name}: {len(watch.keys):,} questions, {len(set(watch.keys)):,} of them different"
    yield f"left out    {len(account.skipped):,} rows; {account.truncated:,} completions truncated"
    for entry in account.skipped[:5]:
        yield f"            {entry.where}: {entry.reason}"
    numbers = [n for n in range(len(job.train)) if job.train.pair_count(n)]
    prompts = np.array([job.train.lengths(n)[0] for n in numbers])
    answers = np.concatenate([job.train.lengths(n)[1:] for n in numbers])
    yield f"prompts     {_spread(prompts)} tokens"
    yield f"completions {_spread(answers)} tokens"
    order = job.order
    total = config.train.max_steps or order.total_steps(config.train.epochs)
    steps = [
        plan_step(
            job.train,
            number,
            epoch,
            groups,
            job.tokens_per_pack,
            job.policy.shared,
            ranks().size,
            job.packs_filled_to,
        )
        for number, epoch, groups in order.steps(1, min(total, _STEPS_LOOKED_AT))
    ]
    shared, unshared, flops = _work(job, steps)
    packs = [len(step.packs) / ranks().size for step in steps]
    each = "" if ranks().size == 1 else f" on each of {ranks().size} ranks"
    yield (
        f"steps       {total:,} of at least {config.train.pairs_per_step} {job.loss.unit}, each in {np.mean(packs):.1f} packs{each}; "
        f"packs filled up to {job.packs_filled_to:,} tokens; prompts {'shared' if job.policy.shared else 'not shared'}"
    )
    yield (
        f"tokens      {shared:,} a step; {_otherwise(job)} {unshared:,} ({unshared / max(1, shared):.2f} x); "
        f"{flops / 1e12:.3g} TFLOP a step"
    )
    if job.loss.needs_reference:
        yield _cached(job)
    largest = max(_tokens(job, pack) for step in steps for pack in step.packs)
    yield _memory(job, largest)
    yield f"log-probs   {log_prob:.2f} nats a token, in the mean over the answers of {tried}"
    yield from _example(job, numbers[0])
    yield "nothing was trained"


def _cached(job: Job) -> str:
    gone = sum(
        len(m) for data in job.datasets for _, m in missing_completions(data, job.keys, job.cache, job.memo)
    )
    every = sum(
        len(data.lengths(n)) - 1 for data in job.datasets for n in range(len(data)) if data.pair_count(n)
    )
    return f"reference   {every - gone:,} of {every:,} completions cached in {job.cache.path}"


def _otherwise(job: Job) -> str:
    return "without sharing and cached reference" if job.loss.needs_reference else "without sharing"


def _count(job: Job) -> str:
    parameters = list(job.policy.parameters())
    trained = sum(full_shape(p).numel() for p in parameters if p.requires_grad)
    return f"{sum(full_shape(p).numel() for p in parameters):,} parameters, {trained:,} trained"


def _spread(values: np.ndarray) -> str:
    low, middle, high = (int(x) for x in np.percentile(values, [0, 50, 100]))
    return f"{low} to {high}, median {middle}"


def _tokens(job: Job, pack: Pack) -> int:
    return sum(
        run_tokens(job.train.lengths(p.group)[[0, *(1 + c for c in p.completions)]], pack.shared)
        for p in pack.pieces
    )


def _work(job: Job, steps) -> tuple[int, int, int]:  # type: ignore[no-untyped-def]
    """Tokens, tokens of a trainer without sharing, and operations of an average step."""
    shared = unshared = flops = 0
    balanced = job.config.loss.router_aux_weight > 0 and job.policy.top_k is not None
    for step in steps:
        coupled = job.loss.couples_pairs or (balanced and len(step.packs) > step.ranks)
        for pack in step.packs:
            if pack.fill:
                continue
            layout, images, given = pack_layout(job.train, pack)
            count = functools.partial(pass_flops, job.shape, layout, images, shared=pack.shared, given=given)
            flops += count(backward=True, checkpointing=job.checkpointing)
            twice = coupled or (pack.twice and not job.loss.single)  # as StepRunner runs them
            flops += count(backward=False, checkpointing=False) if twice else 0
            shared += _tokens(job, pack) * (2 if twice else 1)
        for group in step.groups:
            lengths = job.train.lengths(group)
            unshared += job.loss.unshared_tokens(lengths, job.train.pairs(group))
    return shared // len(steps), unshared // len(steps), flops // len(steps)


def _memory(job: Job, tokens: int) -> str:
    try:
        plan = job.memory.predict(tokens, job.checkpointing)
    except CannotCount as error:
        return f"memory      cannot be predicted: {error}"
    state = plan.gradients + plan.masters + plan.moments
    return (
        f"memory      about {plan.peak / 2**30:.2f} GiB of tensors: weights {(plan.weights + plan.adapters) / 2**30:.2f} (loaded), "
        f"gradients and optimizer {state / 2**30:.2f}, activations of {tokens:,} tokens "
        f"{(plan.activations + plan.working) / 2**30:.2f}{' with gradient checkpointing' if job.checkpointing else ''}; "
        f"{job.memory.free / 2**30:.2f} GiB were free"
    )


def _example(job: Job, number: int) -> Iterator[str]:
    """One pair, or answer, as the model sees it: what is scored is in brackets."""
    group = job.train.group(number)
    tokenizer = job.chat.tokenizer
    prompt = group.prompt_ids
    if job.chat.image_token_id is not None:  # show one placeholder per image
        is_image = prompt == job.chat.image_token_id
        prompt = prompt[~(is_image & np.roll(is_image, 1))]
    chosen, rejected = group.pairs[0].tolist()
    yield f"example     {group.where}; the scored tokens are in [[ ]]"
    yield f"  prompt    {tokenizer.decode(prompt.tolist())!r}"
    said = "chosen  " if chosen != rejected else "answer  "
    yield f"  {said}  {' '.join(_parts(tokenizer, group.completion_ids[chosen]))}"
    if chosen == rejected:
        return
    yield f"  rejected  {' '.join(_parts(tokenizer, group.completion_ids[rejected]))}"


def _parts(tokenizer: Any, ids: np.ndarray) -> Iterator[str]:
    """A completion's text in turns, of which the scored ones are in brackets."""
    for part in np.split(ids, np.flatnonzero(np.diff(ids < 0)) + 1):
        text = repr(tokenizer.decode(plain(part).tolist()))
        yield text if part[0] < 0 else f"[[{text}]]"
