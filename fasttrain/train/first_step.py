"""Checks before a run is trusted: sharing gives the model's own log-probs, and step 0 starts at the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasttrain.data.batch import PackBatch, load_packs, whole
from fasttrain.data.packs import Pack, Piece
from fasttrain.errors import UserError
from fasttrain.model.attention import CannotShare
from fasttrain.model.policy import Policy
from fasttrain.progress import say
from fasttrain.ranks import ranks
from fasttrain.train.engine import Engine
from fasttrain.train.job import Job
from fasttrain.train.open_images import open_images
from fasttrain.train.step import StepResult
from fasttrain_kernels import sequence_sums

# Model types of decoders, and of vision-language models around one, whose shared log-probs the test suite compares with
# unshared ones (tests/model): docs/models.md lists them.
VERIFIED = {
    "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "cohere2", "gemma3_text", "qwen2_vl_text",
    "qwen2_5_vl_text", "qwen3_vl_text", "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "idefics3", "smolvlm", "internvl", "gemma3", "aya_vision",
}  # fmt: skip


def tolerance(job: Job, lengths_S: Tensor) -> Tensor:
    """Largest |log-ratio| of a sequence that rounding explains; errors of tokens add up like a random walk."""
    per_token = 2e-4 if job.policy.model.dtype == torch.float32 else 0.15
    return per_token * (5 + lengths_S.float().sqrt())


@torch.no_grad()
def check_sharing(job: Job) -> None:
    """For decoders the tests do not cover, and code of a model's own: two groups in one pack against ordinary sequences; fall
    back when they differ.

    The group of the longest prompt is one of them: some layers look back only so far, or scale positions from some length on.
    """
    policy = job.policy
    kinds = {policy.model.config.model_type, policy.model.config.get_text_config().model_type}
    of_transformers = type(policy.model).__module__.startswith("transformers.")
    if not policy.shared or (of_transformers and kinds <= VERIFIED):
        return
    pieces = _telling_pieces(job)
    try:
        shared, lengths_S = _sums_of(job, pieces, shared=True)
        ordinary, _ = _sums_of(job, pieces, shared=False)
    except CannotShare as error:
        policy.set_shared(False)
        say(f"warning: {error}, which cannot share prefixes; every completion runs as its own sequence")
        return
    off = (shared - ordinary).abs()
    changed = not (off <= 2 * tolerance(job, lengths_S)).all()
    if not ranks().any(changed):  # rounding may differ between devices
        policy.set_shared(True)
    else:
        say(
            f"warning: sharing prefixes changes the log-probs of {type(policy.model).__name__} (by {off.max():.3g}); "
            "every completion runs as its own sequence"
        )


@torch.no_grad()
def try_group(job: Job) -> tuple[str, float]:
    """Run a group through the model as a step would: where it stands, and its answers' mean log-prob per token.

    UserError for what a first step would stop at: image features that do not fit, log-probs that are no numbers.
    """
    telling = _telling_pieces(job)[0]
    sums, lengths_S = _sums_of(job, (telling,), job.policy.shared)
    where, mean = job.train.where(telling.group), float(sums.sum() / lengths_S.sum())
    if not math.isfinite(mean):
        raise UserError(f"model.name: wanted finite log-probs of the answers of {where}, got {mean}")
    return where, mean


def check_routing(weight: float, policy: Policy) -> None:
    """UserError if the recipe adds a load-balancing loss that the model does not have; a note if it leaves one out."""
    if weight and policy.top_k is None:
        raise UserError(
            f"loss.router_aux_weight: wanted 0 with {type(policy.model).__name__}, which has no load-balancing loss of "
            f"transformers' kind, got {weight:g}"
        )
    own = getattr(policy.model.config.get_text_config(), "router_aux_loss_coef", None)
    if policy.top_k is not None and not weight and own:
        say(
            f"note: the router's load-balancing loss is reported as aux_loss and not added; the model's own weight is {own:g} "
            "(loss.router_aux_weight)"
        )


def _telling_pieces(job: Job) -> tuple[Piece, ...]:
    """The telling group whole, and one pair of the group with the longest sequence, if that is another.

    Their images are opened: groups with a broken one are dropped, or refused, as everywhere.
    """
    broken = 1
    while broken:
        telling, longest = _telling_group(job), job.train.longest_sequence()
        broken = open_images(job, job.train, {telling, longest})
    pieces = [Piece(telling, tuple(range(len(job.train.lengths(telling)) - 1)))]
    if longest != telling:
        pieces.append(
            Piece(longest, tuple(int(c) for c in dict.fromkeys(job.train.pairs(longest)[0].tolist())))
        )
    return tuple(pieces)


def _telling_group(job: Job) -> int:
    """The smallest group with a pair, of some of many; one with images if any has some, and one that reaches beyond the layers' window."""
    window = getattr(job.policy.model.config.get_text_config(), "sliding_window", None) or 0

    def order(number: int) -> tuple[bool, bool, int]:
        lengths = job.train.lengths(number)
        within = int(lengths[0] + lengths[1:].max()) <= window
        return not job.train.image_count(number), within, int(lengths.sum())

    return min(job.train.some_groups(), key=order)


def _sums_of(job: Job, pieces: tuple[Piece, ...], shared: bool) -> tuple[Tensor, Tensor]:
    """Log-probs (S,) and lengths (S,) of the groups' completions; leaves the policy in that mode."""
    job.policy.set_shared(shared)
    maker = job.maker(job.train, with_reference=False)
    (batch,) = whole(load_packs(maker, [Pack(pieces, shared)], 0, False), job.train)
    batch = batch.to(job.device)
    return sequence_sums(job.policy(batch).logprob, batch.lengths_S), batch.lengths_S


def check_first_step(job: Job, engine: Engine, result: StepResult) -> None:
    """Every log-ratio of the first step must be rounding: else template, processor, dtype or cache do not match."""
    dropout = job.config.lora is not None and job.config.lora.dropout > 0
    mistake: UserError | None = None
    for batch, seen_N in result.seen:  # all of them: every rank runs the same passes
        logp_N = _without_dropout(job, engine, batch) if dropout else seen_N
        if not batch.pack.fill:
            mistake = mistake or _mismatch(job, batch, logp_N)
    ranks().share_mistake(mistake)


def _mismatch(job: Job, batch: PackBatch, logp_N: Tensor) -> UserError | None:
    assert batch.reference_N is not None
    ratio_S = sequence_sums(logp_N - batch.reference_N, batch.lengths_S)
    excess_S = ratio_S.abs() / tolerance(job, batch.lengths_S)
    worst = int(torch.nan_to_num(excess_S, nan=math.inf).argmax())
    if excess_S[worst] <= 1:
        return None
    group, completion = batch.sequence_ids[worst]
    return UserError(
        f"{job.train.where(group)}: before the first update the policy differs from its cached reference: "
        f"log-ratio {ratio_S[worst]:.4g} over {int(batch.lengths_S[worst])} tokens (completion {completion + 1} "
        f"of its prompt); chat template, processor, dtype or the cache {job.cache.path} do not belong to this run"
    )


@torch.no_grad()
def _without_dropout(job: Job, engine: Engine, batch: object) -> Tensor:
    job.policy.eval()
    logp_N: Tensor = engine.forward(batch).logprob  # type: ignore[arg-type]
    job.policy.train()
    return logp_N
