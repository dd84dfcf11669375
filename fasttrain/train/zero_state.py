"""What ZeRO has in parts, as whole tensors for checkpoints, and back."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fasttrain.ranks import full_shape, ranks
from fasttrain.train.eight_bit import MOMENTS, fresh_state, narrow, read_moment, widen
from fasttrain.train.tensor_file import Entry, TensorStream


def flat_masters(engine: Any, stage: int | None) -> list[Tensor]:
    """This rank's part of the trained weights, in fp32, a flat tensor per group."""
    inner = engine.optimizer
    return list(inner.fp32_partitioned_groups_flat if stage == 3 else inner.single_partition_of_fp32_groups)


class ZeroState:
    """The trained weights and the optimizer's moments as whole tensors, gathered one at a time.

    Every rank must call and iterate; only the first keeps what is gathered, until the next comes, so that a model whose state
    fits on no rank can be saved.
    """

    def __init__(
        self, engine: Any, named: list[tuple[str, torch.nn.Parameter]], stage: int | None, eight_bit: bool
    ) -> None:
        self.engine, self.named, self.stage, self.eight_bit = engine, named, stage, eight_bit
        self.names = [name for name, _ in named]

    def weights(self) -> TensorStream:
        """The trained parameters in fp32, by name."""
        entries = [Entry(name, torch.float32, tuple(full_shape(p))) for name, p in self.named]
        return TensorStream(entries, self._gathered(None))

    def state(self) -> tuple[TensorStream, dict[str, Any]]:
        """Moments in fp32; those of 8 bits with every rank's scales, to be narrowed to the same bits on as many ranks."""
        step = self._step()
        if step is None:
            return TensorStream.of({}), {}
        moments = [
            Entry(f"{name}/{moment}", torch.float32, tuple(full_shape(parameter)))
            for moment in MOMENTS
            for name, parameter in self.named
        ]
        steps = [Entry(f"{name}/step", torch.float32, ()) for name in self.names]
        scales = TensorStream.of(self._scales_of_all_ranks())
        values = itertools.chain(
            *map(self._gathered, MOMENTS), itertools.repeat(step, len(steps)), scales.values
        )
        return TensorStream(moments + steps + scales.entries, values), {"layout/zero": self._layout()}

    def _layout(self) -> str:
        return f"ZeRO-{self.stage}, {ranks().size} ranks"

    def _scales_of_all_ranks(self) -> dict[str, Tensor]:
        if not self.eight_bit:
            return {}
        own = {
            f"{index}/{key}": value.cpu()
            for index, flat in enumerate(self._flat())
            for key, value in self._state_of(flat).items()
            if key.startswith("absmax")
        }
        return {
            f"rank{rank}/{key}": value
            for rank, theirs in enumerate(ranks().gather(own))
            for key, value in theirs.items()
        }

    def _gathered(self, moment: str | None) -> Iterator[Tensor | None]:
        """Each trained weight, or its moment, whole on the first rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        with self._as_fp32(moment):
            for _, parameter in self.named:
                whole = (
                    safe_get_full_fp32_param(parameter)
                    if moment is None
                    else safe_get_full_optimizer_state(parameter, moment)
                )
                yield whole.detach().float().view(full_shape(parameter)) if ranks().main else None

    @contextlib.contextmanager
    def _as_fp32(self, moment: str | None) -> Iterator[None]:
        """This rank's part of a moment where DeepSpeed looks for it; widened for as long as it takes if it has 8 bits."""
        if moment is None:
            yield
            return
        widened = [self._state_of(flat) for flat in self._flat()] if self.eight_bit else []
        for state in widened:
            state[moment] = widen(state, moment)
        self._link_moments()
        yield
        for state in widened:
            del state[moment]
        self._link_moments()

    def _state_of(self, flat: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.engine.optimizer.optimizer.state[flat]
        return state

    def _link_moments(self) -> None:
        """Tell ZeRO-2's parameters where their moments are: it links all groups when only the first has been updated."""
        if self.stage != 3 and self._step() is not None:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat(self) -> list[Tensor]:
        return flat_masters(self.engine, self.stage)

    def _step(self) -> Tensor | None:
        """How many updates were made; None before the first."""
        for flat in self._flat():
            state = self.engine.optimizer.optimizer.state.get(flat, {})
            if "step" in state:
                return torch.as_tensor(state["step"], dtype=torch.float32)
        return None

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        import deepspeed

        for name, parameter in self.named:
            whole = tensors[name]
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.data.copy_(whole)
            self._put(parameter, whole, None)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], plain: dict[str, Any]) -> None:
        first = f"{self.names[0]}/step"
        if first not in tensors and first not in plain:
            return
        step = tensors[first] if first in tensors else torch.tensor(float(plain[first]))
        inner = self.engine.optimizer.optimizer
        for flat in self._flat():
            state: dict[str, Any] = {"step": step.to(flat.device, copy=True)}
            if self.eight_bit:
                state = fresh_state(inner, flat, int(step))
            inner.state[flat] = state | {moment: torch.zeros_like(flat) for moment in MOMENTS}
        self._link_moments()
        for name, parameter in self.named:
            for moment in MOMENTS:
                self._put(parameter, read_moment(tensors, name, moment), moment)
        if self.eight_bit:
            self._narrow(tensors, same=plain.get("layout/zero") == self._layout())

    def _narrow(self, tensors: Mapping[str, Tensor], same: bool) -> None:
        """Turn the fp32 moments into 8 bits, with the scales that this rank saved if its parts are the same."""
        for index, flat in enumerate(self._flat()):
            state = self._state_of(flat)
            for number, moment in enumerate(MOMENTS, start=1):
                key = f"rank{ranks().rank}/{index}/absmax{number}"
                narrow(state, moment, state.pop(moment), tensors[key] if same and key in tensors else None)
        self._link_moments()

    def _put(self, parameter: Any, value: Tensor, moment: str | None) -> None:
        """Write this rank's part of a whole fp32 tensor."""
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_get_local_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        value = value.to(self.engine.device, torch.float32).flatten()
        if self.stage != 3:
            if moment is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
            return
        part = (
            safe_get_local_fp32_param(parameter)
            if moment is None
            else safe_get_local_optimizer_state(parameter, moment)
        )
        size, rank = part.numel(), ranks().rank
        padded = torch.nn.functional.pad(value, (0, max(0, size * ranks().size - value.numel())))
        part.data.copy_(padded[size * rank : size * (rank + 1)].view_as(part))
