"""What a step did, counted on the host: its tokens and operations, of one rank and of all."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch

from fasttrain.data.packs import Step
from fasttrain.data.prepared import PreparedData
from fasttrain.model.flops import pass_flops
from fasttrain.ranks import ranks
from fasttrain.train.anatomy import PARTS, most_and_least
from fasttrain.train.job import Job
from fasttrain.train.step import StepResult


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What a step did, known without the device."""

    pairs: int
    image_tokens: int
    prompt_tokens: int  # without the images', with what others say between the answers of a conversation
    answer_tokens: int
    chosen_tokens: int  # of all pairs, an answer as often as it is in one; equal where a pair is one answer
    rejected_tokens: int
    tokens_unshared: int
    flops: int
    seconds: dict[str, float]  # of the whole step, and of its parts

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.prompt_tokens + self.answer_tokens


def work_of(job: Job, step: Step, result: StepResult, seconds: dict[str, float]) -> StepWork:
    """This rank's share of a step's work."""
    prompts = answers = flops = 0
    for layout, given, images, twice in result.layouts:
        times = 2 if twice else 1
        prompts += times * (sum(prompt for prompt, _ in layout) + given)
        answers += times * (sum(sum(completions) for _, completions in layout) - given)
        count = functools.partial(
            pass_flops, job.shape, layout, images, shared=job.policy.shared, given=given
        )
        flops += count(backward=True, checkpointing=job.checkpointing)
        flops += count(backward=False, checkpointing=False) if twice else 0
    unshared, lengths_2 = 0, np.zeros(2, np.int64)
    for group in step.groups:
        lengths, pairs = job.train.lengths(group), job.train.pairs(group)
        unshared += job.loss.unshared_tokens(lengths, pairs)
        lengths_2 += job.train.scored(group)[pairs].sum(axis=0)
    return StepWork(
        pairs=step.pairs,
        image_tokens=result.image_tokens,
        prompt_tokens=prompts - result.image_tokens,
        answer_tokens=answers,
        chosen_tokens=int(lengths_2[0]),
        rejected_tokens=int(lengths_2[1]),
        tokens_unshared=unshared,
        flops=flops,
        seconds=seconds,
    )


def of_all_ranks(
    data: PreparedData, result: StepResult, work: StepWork, memory: int
) -> tuple[torch.Tensor, StepWork, list[list[float]], int]:
    """Sums, tokens, operations and most changed pairs of a step over all ranks, in one exchange, and the most memory of one."""
    changes = result.changes.extremes(data)
    if ranks().size == 1:
        return result.sums, work, changes, memory
    counts = [work.image_tokens, work.prompt_tokens, work.answer_tokens, work.flops]
    found = ranks().gather([result.sums.tolist(), counts, changes, memory])
    sums = np.sum([sums for sums, *_ in found], axis=0)
    images, prompts, answers, flops = (sum(values) for values in zip(*[counts for _, counts, *_ in found]))
    work = replace(work, image_tokens=images, prompt_tokens=prompts, answer_tokens=answers, flops=flops)
    return (
        torch.tensor(sums, dtype=torch.float64, device=result.sums.device),
        work,
        most_and_least([pair for _, _, theirs, _ in found for pair in theirs]),
        max(most for *_, most in found),
    )


def speed_metrics(work: StepWork, unit: str, peak_flops: float, peak_bytes: int) -> dict[str, float]:
    """Figures of a step's work; `unit` names what it counts, pairs or examples."""
    seconds = work.seconds["step"]
    rate = work.flops / seconds
    lengths = {"lengths/chosen": work.chosen_tokens / work.pairs}
    if unit == "pairs":
        lengths["lengths/rejected"] = work.rejected_tokens / work.pairs
    return {
        unit: work.pairs,
        **lengths,
        "tokens": work.tokens,
        "tokens_images": work.image_tokens,
        "tokens_prompts": work.prompt_tokens,
        "tokens_answers": work.answer_tokens,
        "tokens_unshared": work.tokens_unshared,
        "step_s": seconds,
        **{f"{part}_s": work.seconds[part] for part in PARTS},
        f"{unit}_per_s": work.pairs / seconds,
        "tokens_per_s": work.tokens / seconds,
        "tflops": rate / 1e12,
        "mfu": rate / peak_flops,
        "peak_bytes": peak_bytes,
    }
