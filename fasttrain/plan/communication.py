"""Bytes that each rank receives in a step under ZeRO stage 0, 2 or 3."""

from __future__ import annotations

from dataclasses import dataclass

from fasttrain.plan.planned_model import PlannedModel


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Bytes a rank receives (and as many it sends) in one step, and the packs they are spread over."""

    gathers: int  # weights, ZeRO-3
    gradients: int
    updates: int  # trained weights after the update

    @property
    def total(self) -> int:
        return self.gathers + self.gradients + self.updates


def count_communication(
    planned: PlannedModel, *, stage: int | None, ranks: int, packs: float, checkpointing: bool
) -> Communication:
    """Ring collectives move (ranks - 1) / ranks of a tensor to and from each rank.

    Stage 0: one all-reduce of the gradients. Stage 2: their reduce-scatter with every pack's backward, and the updated weights
    gathered. Stage 3: besides, weights gathered for every forward, and the decoder's for every backward (and recomputation); the
    head for the forward alone, since its unit gradient is made there; the vision tower too, which has no backward.
    """
    share = (ranks - 1) / ranks
    weights, size = planned.weights, planned.dtype.itemsize
    trained = size * weights.trained
    if stage == 3:
        everything = weights.frozen_bytes + trained
        again = (2 if checkpointing else 1) * size * weights.decoder
        return Communication(
            gathers=int(share * packs * (everything + again)),
            gradients=int(share * packs * trained),
            updates=0,
        )
    if stage == 2:
        return Communication(gathers=0, gradients=int(share * packs * trained), updates=int(share * trained))
    return Communication(gathers=0, gradients=int(2 * share * trained), updates=0)
