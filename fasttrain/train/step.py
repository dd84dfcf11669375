"""Loss and gradient of one step over its packs, and the same pairs without gradient for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fasttrain.data.batch import NOBODY, PackBatch
from fasttrain.data.packs import Step
from fasttrain.data.prepared import PreparedData
from fasttrain.model.routing import balance_share
from fasttrain.ranks import ranks
from fasttrain.train.anatomy import LogRatios, StepClock
from fasttrain.train.engine import Engine
from fasttrain.train.metrics import means_of
from fasttrain.train.objective import Objective, PairResult


@dataclass
class StepResult:
    """Sums over this rank's pairs of the step, then those of a mixture's router over its tokens, on the device; and
    per-pack log-probs and log-ratios if they were asked for."""

    sums: Tensor
    layouts: list[tuple[list[tuple[int, list[int]]], int, int, bool]] = field(default_factory=list)
    seen: list[tuple[PackBatch, Tensor]] = field(default_factory=list)
    changes: LogRatios = field(default_factory=LogRatios)
    image_tokens: int = 0


@dataclass
class _Deferred:
    """A pack whose pairs need other packs: run once for values, then again for gradients."""

    batch: PackBatch
    value_N: Tensor
    side_N: Tensor | None
    router_V: Tensor | None
    random: list[Tensor]


class StepRunner:
    """Runs the packs of a step through the engine.

    A pack that holds its pairs whole goes forward and backward at once. Packs of split groups, and every pack when the loss
    couples pairs, run twice: first without gradient to get all log-probs of the step, then with the known derivative of the
    loss by each of them. So do all packs, if there are several, when the load-balancing loss of a mixture of experts is added:
    its gradient at a token depends on where the router sent all others.
    """

    def __init__(
        self, engine: Engine, loss: Objective, data: PreparedData, balance_weight: float = 0.0
    ) -> None:
        self.engine, self.loss, self.data = engine, loss, data
        self.clock = StepClock(engine.policy.device)
        self.balance_weight = balance_weight

    def run(
        self, step: Step, batches: Iterator[PackBatch], keep: bool = False, logged: bool = False
    ) -> StepResult:
        """Add the step's gradient to the engine; `keep` also returns every pack's log-probs, `logged` the pairs' log-ratios and
        the sums of what the objective `reports`."""
        device = self.engine.policy.device
        wants = self.loss.wants | (self.loss.reports if logged else {})
        result = StepResult(torch.zeros(len(self.loss.names), device=device))
        deferred: list[_Deferred] = []
        routed: list[Tensor | None] = []
        coupled = self.loss.couples_pairs or (self.balance_weight > 0 and len(step.packs) > 1)
        for _ in step.packs:
            batch = next(batches)
            batch = batch.to(device)
            self.clock.mark("data")
            whole = not (coupled or (batch.pack.twice and not self.loss.single))
            if not batch.pack.fill:  # a repeat of other work is no work of the step's
                result.layouts.append((batch.layout, batch.given, batch.images, not whole))
                result.image_tokens += batch.image_tokens * (1 if whole else 2)
            if not whole:
                deferred.append(self._values(batch, wants))
                self.clock.mark("forward")
                continue
            out = self.engine.forward(batch, routing=True, **wants)
            routed.append(None if out.router_V is None else out.router_V.detach())
            balance = self._balance(out.router_V, self._over_ranks(routed[-1]))
            if keep:
                result.seen.append((batch, out.logprob.detach()))
            if batch.pack.fill:
                self.clock.mark("forward")
                self.engine.backward(out.logprob.sum() * 0 + balance)
                self.clock.mark("backward")
                continue
            pairs = self.loss(
                out.logprob,
                batch.reference_N,
                batch.lengths_S,
                batch.pairs_P2,
                self.loss.side(out),
                step.mean_chosen_length,
            )
            self.clock.mark("forward")
            self.engine.backward(pairs.total / step.pairs + balance)
            self.clock.mark("backward")
            result.sums += pairs.sums
            if logged and batch.reference_N is not None:
                result.changes.add(
                    batch.pair_ids, out.logprob, batch.reference_N, batch.lengths_S, batch.pairs_P2
                )
        if deferred:
            result.sums += self._finish(step, deferred)
            if logged:
                self._changes_of_deferred(deferred, result.changes)
            if keep:
                result.seen += [(entry.batch, entry.value_N) for entry in deferred]
        result.sums = with_router(result.sums, [*routed, *(entry.router_V for entry in deferred)])
        return result

    def _over_ranks(self, rank_V: Tensor | None) -> Tensor | None:
        """The router's sums over the step's tokens on all ranks, if its gradient needs them."""
        if not self.balance_weight or rank_V is None or ranks().size == 1:
            return rank_V
        return torch.tensor(ranks().sum(rank_V.tolist()), device=rank_V.device)

    def _balance(self, router_V: Tensor | None, total_V: Tensor | None) -> Tensor | float:
        """What a pack adds to the step's loss for the gradient of its load-balancing loss."""
        if not self.balance_weight or router_V is None or total_V is None:
            return 0.0
        return self.balance_weight * balance_share(router_V, total_V)

    @torch.no_grad()
    def _values(self, batch: PackBatch, wants: dict[str, bool]) -> _Deferred:
        random = random_state()
        out = self.engine.forward(batch, routing=True, **wants)
        return _Deferred(batch, out.logprob, self.loss.side(out), out.router_V, random)

    def _finish(self, step: Step, deferred: list[_Deferred]) -> Tensor:
        """Loss over all deferred pairs, then one backward per pack from the derivative by each log-prob."""
        leaf_N = torch.cat([entry.value_N for entry in deferred]).requires_grad_()
        packs = [(entry.batch, entry.side_N) for entry in deferred]
        pairs = pairs_across(leaf_N, packs, self.data, self.loss, step.mean_chosen_length)
        (slope_N,) = torch.autograd.grad(
            pairs.total / step.pairs, leaf_N, allow_unused=True, materialize_grads=True
        )
        total_V = self._over_ranks(_added([entry.router_V for entry in deferred]))
        balanced = self.balance_weight > 0
        after = random_state()
        self.clock.mark("forward")
        for entry, slope in zip(deferred, slope_N.split([len(e.value_N) for e in deferred])):
            set_random_state(entry.random)  # the same dropout as in the first pass
            out = self.engine.forward(entry.batch, routing=balanced)
            self.clock.mark("forward")
            self.engine.backward((out.logprob * slope).sum() + self._balance(out.router_V, total_V))
            self.clock.mark("backward")
        set_random_state(after)
        return pairs.sums

    def _changes_of_deferred(self, deferred: list[_Deferred], changes: LogRatios) -> None:
        """Log-ratios of the pairs of split groups, whose answers lie in several packs."""
        packs = [(entry.batch, None) for entry in deferred]
        ids, pairs_P2 = pairs_of(packs, self.data, self.engine.policy.device)
        references = [entry.batch.reference_N for entry in deferred if entry.batch.reference_N is not None]
        if ids and references:
            lengths_S = torch.cat([entry.batch.lengths_S for entry in deferred])
            logp_N = torch.cat([entry.value_N for entry in deferred])
            changes.add(ids, logp_N, torch.cat(references), lengths_S, pairs_P2)


def _added(parts: list[Tensor | None]) -> Tensor | None:
    """The sum of a mixture's router sums; None where there are none."""
    found = [part.detach() for part in parts if part is not None]
    return torch.stack(found).sum(0) if found else None


def with_router(sums: Tensor, parts: list[Tensor | None]) -> Tensor:
    """An objective's sums with the router's behind them: one vector, so that a logged step needs one transfer."""
    total_V = _added(parts)
    return sums if total_V is None else torch.cat([sums, total_V.to(sums)])


def pairs_across(
    logp_N: Tensor, packs: list[tuple[PackBatch, Tensor | None]], data: PreparedData, loss: Objective,
    mean_chosen_length: float,
) -> PairResult:  # fmt: skip
    """The loss of all pairs of the groups in `packs`; logp_N are the packs' log-probs in turn.

    With several ranks and a loss that couples pairs, the losses are those of all ranks' pairs and the sums this rank's share.
    """
    pairs, pairs_P2 = pairs_of(packs, data, logp_N.device)
    if not pairs and not loss.couples_pairs:  # nothing but repeats of other ranks' work
        return PairResult(logp_N.sum().reshape(1) * 0, torch.zeros(len(loss.names), device=logp_N.device))
    lengths_S = torch.cat([batch.lengths_S for batch, _ in packs])
    references = [batch.reference_N for batch, _ in packs if batch.reference_N is not None]
    sides = [side for _, side in packs if side is not None]
    reference_N, side_N = (torch.cat(parts) if parts else None for parts in (references, sides))
    here = _Sequences(logp_N, reference_N, lengths_S, pairs_P2, side_N)
    if not (loss.couples_pairs and ranks().size > 1):
        return loss(*here, mean_chosen_length)
    result = loss(*_of_all_ranks(here), mean_chosen_length)
    return PairResult(result.loss_P, result.sums / ranks().size)


def pairs_of(
    packs: Sequence[tuple[PackBatch, Tensor | None]], data: PreparedData, device: torch.device
) -> tuple[list[tuple[int, int, int]], Tensor]:
    """(group, chosen, rejected) of all pairs of the groups in `packs`, and (P, 2) the places of their answers."""
    held = [sequence for batch, _ in packs for sequence in batch.sequence_ids]
    index = {sequence: position for position, sequence in enumerate(held) if sequence[0] != NOBODY}
    groups = dict.fromkeys(group for group, _ in index)
    ids = [(g, c, r) for g in groups for c, r in data.pairs(g).tolist()]
    places = [(index[g, c], index[g, r]) for g, c, r in ids]
    places_P2 = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
    return ids, places_P2.to(device, non_blocking=True)


class _Sequences(NamedTuple):
    """An objective's arguments."""

    logp_N: Tensor
    reference_N: Tensor | None
    lengths_S: Tensor
    pairs_P2: Tensor
    side_N: Tensor | None


def _of_all_ranks(here: _Sequences) -> _Sequences:
    """All ranks' sequences, in order of rank; this rank's log-probs keep their history."""
    device = here.logp_N.device
    found = ranks().gather([None if part is None else part.detach().cpu() for part in here])
    parts: list[list[Tensor | None]] = [[], [], [], [], []]
    sequences = 0
    for rank, theirs in enumerate(found):
        moved = [None if part is None else part.to(device) for part in theirs]
        if rank == ranks().rank:
            moved[0] = here.logp_N
        lengths_S, pairs_P2 = moved[2], moved[3]
        assert lengths_S is not None and pairs_P2 is not None
        moved[3] = pairs_P2 + sequences
        sequences += len(lengths_S)
        for column, part in zip(parts, moved):
            column.append(part)
    joined = [
        None if column[0] is None else torch.cat([p for p in column if p is not None]) for column in parts
    ]
    return _Sequences(*joined)  # type: ignore[arg-type]


@torch.no_grad()
def evaluate(
    engine: Engine, loss: Objective, data: PreparedData, step: Step, batches: Iterator[PackBatch],
    stopped: Callable[[], bool] = lambda: False, balance_weight: float = 0.0,
) -> dict[str, float]:  # fmt: skip
    """Means over all pairs of an evaluation set, by metric name; nothing if it was `stopped` on the way."""
    policy = engine.policy
    training = policy.training
    policy.eval()
    values, packs, routed = [], [], []
    for batch in batches:
        if ranks().any(stopped()):
            break
        moved = batch.to(policy.device)
        out = engine.forward(moved, routing=True, **loss.wants, **loss.reports)
        values.append(out.logprob)
        routed.append(out.router_V)
        # an evaluation set's images do not fit
        packs.append((moved.without_inputs(), loss.side(out)))
    policy.train(training)
    if len(packs) < len(step.packs):
        return {}
    sums = pairs_across(torch.cat(values), packs, data, loss, step.mean_chosen_length).sums
    row = ranks().sum(with_router(sums, routed).tolist())
    means = means_of(loss, row, step.pairs, balance_weight)
    return {f"eval_{name}": value for name, value in means.items()}


def random_state() -> list[Tensor]:
    """What decides every later random draw of this process, on CPU and GPU."""
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state()] if torch.cuda.is_available() else state


def set_random_state(state: list[Tensor]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
