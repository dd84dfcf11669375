"""The prediction for one ZeRO stage: what fits, how a step is cut, what it costs and what binds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fasttrain.config import DPOConfig
from fasttrain.plan.choose import choose_checkpointing, choose_tokens, largest_pack, most_in_a_pack
from fasttrain.plan.communication import Communication, count_communication
from fasttrain.plan.gpus import Achieved, Gpu
from fasttrain.plan.histogram import Histogram
from fasttrain.plan.memory import Activations, MemoryPlan, plan_memory
from fasttrain.plan.planned_model import PlannedModel
from fasttrain.plan.work import StepWork, measure_work


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one step, were each the only limit; they overlap, so the largest is the prediction."""

    matrix_s: float
    memory_s: float
    link_s: float

    @property
    def step_s(self) -> float:
        return max(self.matrix_s, self.memory_s, self.link_s)

    @property
    def binds(self) -> str:
        names = {"matrix rate": self.matrix_s, "memory rate": self.memory_s, "interconnect": self.link_s}
        return max(names, key=lambda name: names[name])


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One column of the page. `largest` and `largest_checkpointed` are the most tokens per pack that fit; 0: not one.

    longest_sequence: tokens of the longest prompt with one answer, which runs whole whatever a pack may hold. memory and
    fits are of the largest pack that runs.
    """

    stage: int
    fits: bool
    checkpointing: bool
    tokens_per_pack: int
    longest_sequence: int
    largest: int
    largest_checkpointed: int
    memory: MemoryPlan
    usable_bytes: int
    work: StepWork
    communication: Communication
    timing: Timing
    reference_s: float

    @property
    def exceeded(self) -> bool:
        """Whether a pack of more than `tokens_per_pack` tokens runs."""
        return self.longest_sequence > self.tokens_per_pack


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPUs planned for and what is assumed of them."""

    gpu: Gpu
    gpus: int
    achieved: Achieved
    link_bytes_per_s: float

    @property
    def usable_bytes(self) -> int:
        return int(self.achieved.memory * self.gpu.memory_bytes)


CUDA = torch.device("cuda")


def predict(
    config: DPOConfig, activations: Activations, histogram: Histogram, machine: Machine, stage: int
) -> Prediction:
    """Memory, work, communication and time under one stage; `train.share_prefix` is whether the model does share."""
    planned, held = activations.planned, activations

    def memory(tokens: int, checkpointing: bool) -> MemoryPlan:
        return plan_memory(
            config, planned, held, tokens, checkpointing, stage=stage, ranks=machine.gpus, device=CUDA
        )

    def fits(tokens: int, checkpointing: bool) -> bool:
        return memory(tokens, checkpointing).peak <= machine.usable_bytes

    # the recipe's `auto` is settled as a run settles it (RunMemory): by the group, whether its prompt is shared or not
    sequence, group = histogram.longest_sequence, histogram.longest(True)
    runs = 1 if config.train.share_prefix else 2 * int(histogram.pair_counts().max())
    checkpointing = choose_checkpointing(
        config, group, CUDA, lambda size, on: fits(max(size, sequence), on), runs
    )
    tokens = choose_tokens(config, group, CUDA, lambda size: fits(size, checkpointing))
    work = measure_work(config, histogram, planned.shape, tokens, checkpointing, machine.gpus)
    largest = most_in_a_pack(config, tokens, histogram.longest(config.train.share_prefix))
    plan = memory(max(largest, sequence), checkpointing)
    moved = count_communication(
        planned, stage=stage, ranks=machine.gpus, packs=work.packs, checkpointing=checkpointing
    )
    return Prediction(
        stage=stage,
        fits=plan.peak <= machine.usable_bytes,
        checkpointing=checkpointing,
        tokens_per_pack=tokens,
        longest_sequence=sequence,
        largest=largest_pack(lambda size: fits(size, False)),
        largest_checkpointed=largest_pack(lambda size: fits(size, True)),
        memory=plan,
        usable_bytes=machine.usable_bytes,
        work=work,
        communication=moved,
        timing=_time(planned, work, moved, held, machine, checkpointing),
        reference_s=work.reference_flops
        / machine.gpus
        / (machine.gpu.matrix_flops * machine.achieved.matrix),
    )


def _time(
    planned: PlannedModel, work: StepWork, moved: Communication, held: Activations, machine: Machine, checkpointing: bool
) -> Timing:  # fmt: skip
    gpu, achieved = machine.gpu, machine.achieved
    # weights are read by every product of every pack; what the forward keeps is written once and read once
    passes = 3 if checkpointing else 2
    read = work.packs * passes * planned.dtype.itemsize * planned.weights.total
    kept = 2 * held.at(max(1, round(work.busiest_tokens)), False).kept
    update = 28 * planned.weights.trained  # gradient, two moments and master read, the last three written
    return Timing(
        matrix_s=work.busiest_flops / (gpu.matrix_flops * achieved.matrix),
        memory_s=(read + kept + update) / (gpu.memory_bytes_per_s * achieved.memory_rate),
        link_s=moved.total / (machine.link_bytes_per_s * achieved.link),
    )
