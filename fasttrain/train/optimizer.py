"""AdamW on fp32 masters, parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.config import TrainConfig
from fasttrain.errors import UserError
from fasttrain.model.lora import in_projector
from fasttrain.ranks import full_shape, ranks
from fasttrain.train.eight_bit import MOMENTS, fresh_state, narrow
from fasttrain.train.tensor_file import TensorStream


def learning_rate_factor(config: TrainConfig, step: int, total: int) -> float:
    """Factor on the peak rate for step 1..total: linear warm-up over `warmup_steps` or ceil(ratio x total), then the schedule.

    The same values as transformers' schedulers give their optimizer at that step (its first step runs at factor 0 of the
    warm-up when there is one).
    """
    warmup = math.ceil(config.warmup_ratio * total) if config.warmup_steps is None else config.warmup_steps
    done = step - 1
    if done < warmup:
        return done / max(1, warmup)
    if config.schedule == "constant":
        return 1.0
    progress = (done - warmup) / max(1, total - warmup)
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return max(0.0, left) * (1.0 - config.min_rate) + config.min_rate


def trainable_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What trains, by name; UserError if nothing does."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise UserError("lora: wanted at least one trainable parameter, got none")
    return named


def parameter_groups(
    module: nn.Module, named: Iterable[tuple[str, Tensor]], config: TrainConfig
) -> list[dict[str, Any]]:
    """The optimizer's groups of a module's parameters: a projector that trains whole has its own rate, an adapter on it has the
    adapter's; vectors, norms and embeddings do not decay."""
    plain = _norms_and_embeddings(module)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in named:
        whole = in_projector(name) and "lora_" not in name
        rate = config.projector_learning_rate if whole else config.learning_rate
        decay = 0.0 if name in plain or len(full_shape(parameter)) < 2 else config.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": params, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]


def _norms_and_embeddings(module: nn.Module) -> set[str]:
    """Names of their parameters, by what the modules are: Gemma 4's `embed_vision` is a linear layer."""
    found = set()
    for name, owner in module.named_modules():
        whole = isinstance(owner, nn.Embedding) or "norm" in type(owner).__name__.lower()
        for leaf, _ in owner.named_parameters(recurse=False):
            if whole or "embedding" in leaf or "lora_embedding_" in name:
                found.add(f"{name}.{leaf}")
    return found


class MasterOptimizer:
    """An optimizer over the trainable parameters, with an fp32 master of every parameter that is not fp32 itself.

    Gradients of masters are accumulated in fp32 after every backward pass, whatever the parameter's own type.
    """

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        named = trainable_parameters(module)
        self.names = [name for name, _ in named]
        self.live = [parameter for _, parameter in named]
        self.masters: list[Tensor] = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.live
        ]
        self.grad_clip = config.grad_clip
        groups = parameter_groups(module, zip(self.names, self.masters), config)
        self.optimizer = make_optimizer(groups, config)

    def gather_gradients(self) -> None:
        """Add the live gradients of a backward pass to the masters'."""
        for live, master in zip(self.live, self.masters):
            if live is not master and live.grad is not None:
                grad = live.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                live.grad = None

    def step(self, factor: float) -> Tensor:
        """Clip, update at `factor` times the peak rates, clear gradients; the norm before clipping, on the device."""
        for master in self.masters:
            if (
                master.grad is None
            ):  # a projector in a step without images: a zero, as ZeRO's flat tensors have it
                master.grad = torch.zeros_like(master)
        gradients = [master.grad for master in self.masters if master.grad is not None]
        _sum_over_ranks(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.masters, self.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for live, master in zip(self.live, self.masters):
                if live is not master:
                    live.copy_(master)
        return norm

    def weights(self) -> TensorStream:
        """The trained parameters in master precision, by name."""
        return TensorStream.of({name: master.detach() for name, master in zip(self.names, self.masters)})

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        for name, live, master in zip(self.names, self.live, self.masters):
            master.copy_(tensors[name])
            if live is not master:
                live.copy_(master)

    def state(self) -> tuple[TensorStream, dict[str, Any]]:
        """The optimizer's state as tensors by name, and what is not a tensor."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for name, master in zip(self.names, self.masters):
            for key, value in self.optimizer.state.get(master, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value
                else:
                    plain[f"{name}/{key}"] = value
        return TensorStream.of(tensors), plain

    def load_state(self, tensors: Mapping[str, Tensor], plain: dict[str, Any]) -> None:
        states: dict[str, dict[str, Any]] = {}
        for full in [*tensors, *plain]:
            name, key = full.rsplit("/", 1)
            states.setdefault(name, {})[key] = plain.get(full)
        for name, master in zip(self.names, self.masters):
            for key, value in states.get(name, {}).items():
                if value is None:  # a tensor of our own: what is read may be the file's memory
                    states[name][key] = tensors[f"{name}/{key}"].to(master.device, copy=True)
            if name in states:
                self.optimizer.state[master] = states[name]
                if "exp_avg" in states[name] and hasattr(self.optimizer, "name2qmap"):  # written under ZeRO
                    state = fresh_state(self.optimizer, master, int(states[name]["step"]))
                    for moment in MOMENTS:
                        narrow(state, moment, states[name][moment])


def _sum_over_ranks(gradients: list[Tensor]) -> None:
    """Add up equally shaped lists of every rank, in buffers of some 64 MB."""
    if ranks().size == 1:
        return
    start = 0
    while start < len(gradients):
        stop, held = start + 1, gradients[start].numel()
        while stop < len(gradients) and held + gradients[stop].numel() < 1 << 24:
            held += gradients[stop].numel()
            stop += 1
        flat = torch.cat([gradient.flatten() for gradient in gradients[start:stop]])
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(
            gradients[start:stop], flat.split([g.numel() for g in gradients[start:stop]])
        ):
            gradient.copy_(part.view_as(gradient))
        start = stop


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with its state in 8 bits."""
    betas = (config.betas[0], config.betas[1])
    if config.optimizer == "adamw":
        # fused: one pass over the weights, and the step count stays on the device
        return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True)
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            "train.optimizer: adamw_8bit needs bitsandbytes: pip install 'fasttrain-dpo[quant]'"
        ) from None
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, betas=betas, eps=config.eps)
    return optimizer
