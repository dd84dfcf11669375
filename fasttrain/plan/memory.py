"""Memory of a training run by part: weights and optimizer from their numbers, activations from a pass on the meta device.

The one source of `train.tokens_per_pack: auto`, `train.gradient_checkpointing: auto`, --dry-run's figure and `fasttrain plan`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fasttrain.config import DPOConfig
from fasttrain.model.checkpointing import checkpoint_decoder
from fasttrain.plan.histogram import Histogram
from fasttrain.plan.passes import PassBytes, PassSize, count_pass
from fasttrain.plan.planned_model import PlannedModel

# glibc keeps freed blocks of mixed sizes: resident memory on CPU is up to about twice what tensors take
CPU_FRAGMENTATION = 2.0
# In elements: DeepSpeed's stage3_max_live_parameters, and the most of a bucket of gradients, of which overlap_comm takes two
MAX_LIVE_PARAMETERS = 10**9
REDUCE_BUCKET = 5 * 10**8
# About how many tokens the packs have that are counted
_COUNTED_TOKENS = (512, 2048, 8192)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one rank by part; `activations` is what the forward keeps, `working` what passes need beyond it."""

    weights: int
    gathered: int
    adapters: int
    gradients: int
    masters: int
    moments: int
    buckets: int
    activations: int
    working: int
    head_tile: int  # part of `working`
    images: int  # part of `working`
    update: int  # the optimizer's temporaries, when no activations are held

    @property
    def state(self) -> int:
        return self.weights + self.adapters + self.gradients + self.masters + self.moments

    @property
    def peak(self) -> int:
        passing = self.gathered + self.buckets + self.activations + self.working
        return self.state + max(passing, self.update)


class Activations:
    """Bytes of a pack's forward and backward: counted at a few sizes, when they are first needed, and straight lines between.

    The peak is the largest of several phases, each a line in the tokens, so between counted sizes a line errs upwards only.
    """

    def __init__(self, planned: PlannedModel, mix: PackMix, device: torch.device, sharded: bool) -> None:
        self.planned, self.mix, self.device, self.sharded = planned, mix, device, sharded
        self._counted: dict[tuple[int, bool], tuple[PassSize, PassBytes]] = {}

    def at(self, tokens: int, checkpointing: bool) -> PassBytes:
        """Predicted bytes of a pack of that many tokens."""
        least = max(1, round(_COUNTED_TOKENS[0] / self.mix.tokens))
        sizes = [least * (size // _COUNTED_TOKENS[0]) for size in _COUNTED_TOKENS]
        segment = 0 if tokens <= sizes[1] * self.mix.tokens else 1
        small, a = self._count(sizes[segment], checkpointing)
        large, b = self._count(sizes[segment + 1], checkpointing)
        at = (tokens - small.tokens) / (large.tokens - small.tokens)

        def line(low: int, high: int) -> int:
            return max(0, round(low + at * (high - low)))

        return PassBytes(
            kept=line(a.kept, b.kept), peak=line(a.peak, b.peak), images=line(a.images, b.images)
        )

    def counted(self, tokens: int, checkpointing: bool) -> PassBytes:
        """Counted bytes of the smallest pack of mean groups that has at least so many tokens."""
        return self._count(max(1, math.ceil(tokens / self.mix.tokens)), checkpointing)[1]

    def _count(self, groups: int, checkpointing: bool) -> tuple[PassSize, PassBytes]:
        if (groups, checkpointing) not in self._counted:
            model, size = self.planned.model, self.mix.pack(groups)
            if checkpointing:
                checkpoint_decoder(model)
            else:
                _uncheckpoint(model)
            if not self.sharded and self.planned.dtype == torch.float32:
                for (
                    parameter
                ) in model.parameters():  # there from the pack before; 16-bit ones go to fp32 after each pack
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            counted = count_pass(
                model, size, device=self.device, keep_gradients=not self.sharded, tower=self.mix.tower
            )
            model.zero_grad(set_to_none=True)
            self._counted[groups, checkpointing] = size, counted
        return self._counted[groups, checkpointing]


def _uncheckpoint(model: object) -> None:
    for module in model.modules():  # type: ignore[attr-defined]
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False


@dataclass(frozen=True)
class PackMix:
    """The mean group: tokens that it costs in one pass, predicting rows and images; what packs are made of."""

    tokens: float
    rows: float
    images: float
    tower: bool
    shared: bool = True

    @classmethod
    def of(cls, histogram: Histogram, tower: bool, shared: bool) -> PackMix:
        groups, shapes = len(histogram), histogram.shapes
        tokens = sum(shape.run_tokens(shared) * shape.count for shape in shapes)
        images = sum(shape.run_images(shared) * shape.count for shape in shapes)
        return cls(tokens / groups, histogram.rows / groups, images / groups, tower, shared)

    def pack(self, groups: int) -> PassSize:
        return PassSize(
            max(2, round(groups * self.tokens)),
            max(1, round(groups * self.rows)),
            round(groups * self.images),
            self.shared,
        )


def plan_memory(
    config: DPOConfig, planned: PlannedModel, activations: Activations, tokens: int, checkpointing: bool, *,
    stage: int | None, ranks: int, device: torch.device, counted: bool = False,
) -> MemoryPlan:  # fmt: skip
    """Memory of one rank that runs packs of `tokens` tokens. Stage None and 0 are one whole copy per rank.

    counted: from one pass of that size or a little more, not from lines between passes of a few sizes.
    """
    weights, size = planned.weights, planned.dtype.itemsize
    sharded_state = ranks if stage in (2, 3) else 1
    sharded_weights = ranks if stage == 3 else 1
    moment = 2 * (1 + 4 / 256) if config.train.optimizer == "adamw_8bit" else 8
    trained = weights.trained
    held = (activations.counted if counted else activations.at)(tokens, checkpointing)
    gathered = _gathered(planned, size) if stage == 3 else 0
    if config.model.quantize:  # one matrix at a time is widened for its product
        gathered += weights.largest_matrix * size
    wide = 0 if size == 4 else 4
    foreach = device.type == "cuda"
    update = 4 * (
        trained // sharded_state
        if foreach
        else 2 * max(weights.largest_matrix, weights.head, weights.embedding)
    )
    mix = activations.mix
    return MemoryPlan(
        weights=weights.frozen_bytes // sharded_weights,
        gathered=gathered,
        adapters=size * trained // sharded_weights,
        gradients=4 * trained // sharded_state,
        masters=wide * trained // sharded_state,
        moments=int(moment * trained) // sharded_state,
        buckets=2 * size * min(REDUCE_BUCKET, trained) if stage in (2, 3) else 0,
        activations=held.kept,
        working=max(0, held.peak - held.kept),
        head_tile=_head_tile(planned, mix.rows / mix.tokens * tokens, device),
        images=held.images,
        update=update if trained else 0,
    )


def _gathered(planned: PlannedModel, size: int) -> int:
    """What ZeRO-3 holds whole at a time: up to max_live_parameters, at least the layer that runs and the next."""
    weights = planned.weights
    least = max(2 * weights.largest_layer, weights.head)
    return size * min(weights.total, max(least, MAX_LIVE_PARAMETERS))


def _head_tile(planned: PlannedModel, rows: float, device: torch.device) -> int:
    from fasttrain.plan.stand_ins import HeadTiles
    from fasttrain.plan.tracker import tensor_bytes

    weight = planned.model.get_output_embeddings().weight
    hidden = torch.empty(max(1, round(rows)), weight.shape[1], dtype=planned.dtype, device="meta")
    return tensor_bytes(HeadTiles(device).buffers(hidden, weight, accumulate=not weight.requires_grad))
