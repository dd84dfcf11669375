"""What `auto` stands for: gradient checkpointing only when memory needs it, packs as large as fit and help."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fasttrain.config import DPOConfig

# Where larger packs stop being faster, and below which matrix products starve
_CEILING = {"cuda": 16384, "cpu": 2048}
_FLOOR = {"cuda": 2048, "cpu": 512}
# Up to here a group that is longer than packs need be runs whole all the same, if it fits: parts would run its prompt again
_WHOLE = 16384
# On a CPU groups are put together up to here: larger packs are no faster and take more memory (docs/performance.md)
_FILLED_ON_CPU = 1024
_STEP = 256


def choose_checkpointing(
    config: DPOConfig, longest_group: int, device: torch.device, fits: Callable[[int, bool], bool], runs: int = 1
) -> bool:  # fmt: skip
    """The recipe's word, or whether a pack worth running, or the largest that the recipe can make, would not fit without it.

    runs: how often a group's prompt may stand in a pack.
    """
    wanted, tokens = config.train.gradient_checkpointing, config.train.tokens_per_pack
    if wanted != "auto":
        return wanted
    if tokens == "auto":
        return not fits(max(min(longest_group, _ceiling(device)), _floor(device)), False)
    return not fits(most_in_a_pack(config, int(tokens), runs * longest_group), False)


def most_in_a_pack(config: DPOConfig, tokens_per_pack: int, longest_group: int) -> int:
    """A step has a pair of every group that it takes, so a pack of all of them has no more tokens than so many groups."""
    return min(tokens_per_pack, config.train.pairs_per_step * longest_group)


def most_without_gradients(config: DPOConfig, tokens_per_pack: int, longest_group: int) -> int:
    """What a pack of references or of an evaluation may have, which no step limits: as much as one of training, or as helps."""
    return min(tokens_per_pack, max(_WHOLE, most_in_a_pack(config, tokens_per_pack, longest_group)))


def choose_tokens(
    config: DPOConfig, longest_group: int, device: torch.device, fits: Callable[[int], bool]
) -> int:
    """The recipe's word, or the largest pack that fits, up to where larger ones are no faster and split no group."""
    if config.train.tokens_per_pack != "auto":
        return int(config.train.tokens_per_pack)
    tokens = max(_ceiling(device), min(_WHOLE, -(-longest_group // _STEP) * _STEP))
    while tokens > 512 and not fits(tokens):
        tokens -= 1024 if tokens > 4096 else 256 if tokens > 1024 else 128
    return tokens


def choose_filling(config: DPOConfig, tokens_per_pack: int, device: torch.device) -> int:
    """Up to how many tokens groups are put together in a pack: all that it may have, or what a CPU is quickest with."""
    if config.train.tokens_per_pack != "auto" or device.type != "cpu":
        return tokens_per_pack
    return min(tokens_per_pack, _FILLED_ON_CPU)


def largest_pack(fits: Callable[[int], bool], most: int = 1 << 20) -> int:
    """The most tokens that fit, in steps of 256, at most `most`; 0 if not even 256 do."""
    low, high = 0, most // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle - 1)
    return low * _STEP


def _ceiling(device: torch.device) -> int:
    return _CEILING["cpu" if device.type == "cpu" else "cuda"]


def _floor(device: torch.device) -> int:
    return _FLOOR["cpu" if device.type == "cpu" else "cuda"]
