"""Memory of the run that is about to start, on this machine: what `auto` settings and --dry-run are made from."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Any

import torch

from fasttrain.config import DPOConfig
from fasttrain.data.packs import run_tokens
from fasttrain.data.prepared import PreparedData
from fasttrain.model.flops import counts_tower
from fasttrain.model.load import as_stored
from fasttrain.plan.choose import (
    choose_checkpointing,
    choose_tokens,
    largest_pack,
    most_without_gradients,
)
from fasttrain.plan.memory import (
    CPU_FRAGMENTATION,
    Activations,
    MemoryPlan,
    PackMix,
    plan_memory,
)
from fasttrain.plan.passes import CannotCount
from fasttrain.plan.planned_model import PlannedModel, build_planned_model
from fasttrain.plan.remembered import remembered
from fasttrain.progress import say

# What may be taken of what is free: the rest is for other people's buffers and the allocator's gaps
_SHARE = 0.9
# Settings for a model whose memory cannot be predicted
_CAUTIOUS_TOKENS = 2048
_REMEDY = {
    False: "set train.gradient_checkpointing: true, or lower data.max_length",
    True: "lower data.max_length",
}


class RunMemory:
    """Predictions for one recipe, model and data set; nothing is built or counted before it is asked for.

    free: bytes left on the device once the model is on it; with several ranks on the fullest of their devices, so that all
    of them settle on the same packs. shared: whether prompts are run once for all their completions.
    """

    def __init__(
        self, config: DPOConfig, model_config: Any, dtype: torch.dtype, data: PreparedData, device: torch.device, *,
        free: int, ranks: int = 1, shared: bool = True,
    ) -> None:  # fmt: skip
        self.config, self.device, self.ranks = as_stored(config, model_config), device, ranks
        self._model_config, self._dtype, self._data = model_config, dtype, data
        self.free, self._shared = free, shared

    @cached_property
    def planned(self) -> PlannedModel:
        return build_planned_model(
            self.config, self._model_config, self._dtype, stage=self.config.distributed.zero_stage
        )

    @cached_property
    def _activations(self) -> Activations:
        sharded = self.config.distributed.zero_stage is not None
        return Activations(self.planned, self._mix, self.device, sharded)

    @cached_property
    def _mix(self) -> PackMix:
        return mean_group(self._data, self._model_config, self._shared)

    def predict(self, tokens: int, checkpointing: bool, counted: bool = False) -> MemoryPlan:
        """Memory of one rank by part; CannotCount for a model that does not run without values."""
        stage = self.config.distributed.zero_stage
        return plan_memory(
            self.config, self.planned, self._activations, tokens, checkpointing, stage=stage, ranks=self.ranks,
            device=self.device, counted=counted,
        )  # fmt: skip

    def fits(self, tokens: int, checkpointing: bool, counted: bool = False) -> bool:
        """Whether what is not loaded yet fits in what is free."""

        def predicted() -> int:
            plan = self.predict(tokens, checkpointing, counted)
            passing = (plan.peak - plan.state) * (CPU_FRAGMENTATION if self.device.type == "cpu" else 1)
            return plan.gradients + plan.masters + plan.moments + math.ceil(passing)

        facts = self._facts(tokens, checkpointing) if counted else None
        return (remembered(facts, predicted) if facts else predicted()) <= _SHARE * self.free

    def _facts(self, tokens: int, checkpointing: bool) -> dict[str, Any] | None:
        """What decides a counted pass; None where files that are not looked at here do so too."""
        config, model = self.config, dict(self._model_config.to_dict())
        if config.model.trust_remote_code or (config.lora and config.lora.init_from):
            return None
        model.pop("_name_or_path", None)
        recipe = dataclasses.asdict(config)
        recipe["model"] |= {"name": None, "revision": None}
        return {
            "pack": [tokens, checkpointing, dataclasses.asdict(self._mix)],
            "model": [model, str(self._dtype)],
            "recipe": [recipe[name] for name in ("model", "lora", "distributed")],
            "train": [config.train.optimizer, config.train.compile],
            "machine": [self.device.type, torch.get_num_threads(), self.ranks],
        }

    def _choose_checkpointing(self) -> bool:
        """Decided by the longest group, and by the longest prompt with one completion, which no pack divides.

        In a large file their lengths need not be known when as much as they may have would fit.
        """
        if self.config.train.gradient_checkpointing != "auto":
            return self.config.train.gradient_checkpointing
        if self._checkpoints(1):
            return True
        longest, _ = self._data.longest()
        if self._checkpoints(longest) and self._data.lazy:
            fitting = largest_pack(lambda tokens: not self._checkpoints(tokens), longest)
            longest = self._data.longest_beyond(fitting)
        return self._checkpoints(longest) or self._too_long(False) > 0

    def _too_long(self, checkpointing: bool) -> int:
        """Tokens of the longest prompt with one completion if a pack of it alone does not fit, else 0."""

        def fits(tokens: int) -> bool:
            return self.fits(tokens, checkpointing)

        _, longest = self._data.longest()
        if not fits(longest) and self._data.lazy:
            longest = self._data.longest_sequence_beyond(largest_pack(fits, longest))
        return 0 if fits(longest) else longest

    def _checkpoints(self, longest_group: int) -> bool:
        return choose_checkpointing(self.config, longest_group, self.device, self.fits, self._runs)

    @property
    def _runs(self) -> int:
        """How often a prompt stands in a pack at most."""
        return 1 if self._shared else 2 * int(self._data.pair_counts().max(initial=1))

    def most_without_gradients(self, tokens_per_pack: int) -> int:
        """Most tokens of a pack of references or of an evaluation."""
        longest, _ = self._data.longest()
        return most_without_gradients(self.config, tokens_per_pack, self._runs * longest)

    def _all_fits(self) -> tuple[bool, int] | None:
        """The settings of a machine with room for the largest pack that may be wanted: one pass is counted, not three."""
        train = self.config.train
        checkpointing = False if train.gradient_checkpointing == "auto" else train.gradient_checkpointing
        group, sequence = self._data.longest()
        tokens = choose_tokens(self.config, group, self.device, lambda tokens: True)
        return (
            (checkpointing, tokens) if self.fits(max(tokens, sequence), checkpointing, counted=True) else None
        )

    def settings(self, before: tuple[bool, int] | None = None) -> tuple[bool, int]:
        """Gradient checkpointing and tokens per pack, with `auto` decided: as `before` the run was resumed, while that fits."""
        train = self.config.train
        if train.gradient_checkpointing != "auto" and train.tokens_per_pack != "auto":
            return train.gradient_checkpointing, int(train.tokens_per_pack)
        try:
            if before is not None and self.fits(before[1], before[0], counted=True):
                return before
            if (most := self._all_fits()) is not None:
                return most
            checkpointing = self._choose_checkpointing()
            if longest := self._too_long(checkpointing):
                say(
                    f"warning: the longest prompt with one answer has {longest:,} tokens and is predicted not to fit in memory; no "
                    f"train.tokens_per_pack divides it: {_REMEDY[checkpointing]}"
                )
            longest, _ = self._data.longest()
            return checkpointing, choose_tokens(
                self.config, longest, self.device, lambda tokens: self.fits(tokens, checkpointing)
            )
        except CannotCount as error:
            wanted, tokens = train.gradient_checkpointing, train.tokens_per_pack
            say(
                f"note: memory cannot be predicted: {error}; where a setting is auto, packs have {_CAUTIOUS_TOKENS:,} tokens and "
                "gradient checkpointing is off"
            )
            return (False if wanted == "auto" else wanted), (
                _CAUTIOUS_TOKENS if tokens == "auto" else int(tokens)
            )


def mean_group(data: PreparedData, model_config: Any, shared: bool) -> PackMix:
    """The mean of all groups with pairs, or of some of many."""
    groups = tokens = rows = images = 0
    for number in data.some_groups():
        lengths = data.lengths(number)
        groups, tokens = groups + 1, tokens + run_tokens(lengths, shared)
        rows += int(data.scored(number).sum())
        images += data.image_count(number) * (1 if shared else len(lengths) - 1)
    groups = max(1, groups)
    return PackMix(tokens / groups, rows / groups, images / groups, counts_tower(model_config), shared)
