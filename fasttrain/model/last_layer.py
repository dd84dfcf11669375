"""The last decoder layer's MLP over the rows that predict a completion token, and no others.

Behind the last attention nothing looks from one token at another, and of its output only those rows are read: a prompt's other
tokens need their keys and values there, not what an MLP makes of them. The rows read are the same, and so are all gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from fasttrain.model.fused_layers import reads_like
from fasttrain_kernels import SharedPrefixLayout


class _PredictorRows:
    """Hooks around a layer's attention and the MLP behind it. The layout comes with the call of the attention, so that a layer
    that is made again in a backward pass finds its own."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        self._layout: SharedPrefixLayout | None = None
        attention.register_forward_pre_hook(self._begin, with_kwargs=True)
        mlp.register_forward_pre_hook(self._take)
        mlp.register_forward_hook(self._put)

    def _begin(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._layout = kwargs.get("shared_prefix_layout")

    def _take(self, mlp: nn.Module, args: tuple[Tensor]) -> Tensor | None:
        if self._layout is None or args[0].shape[:-1] != (1, self._layout.tokens):
            self._layout = None
            return None
        return args[0].index_select(1, _rows(self._layout, args[0]))

    def _put(self, mlp: nn.Module, args: Any, out_1RD: Tensor) -> Tensor:
        layout, self._layout = self._layout, None
        if layout is None:
            return out_1RD
        whole_1TD = out_1RD.new_zeros(1, layout.tokens, out_1RD.shape[-1])
        return whole_1TD.index_copy(1, _rows(layout, out_1RD), out_1RD)


def _rows(layout: SharedPrefixLayout, like: Tensor) -> Tensor:
    """int64 (R,): the rows that predict, each once: a prompt's last, and of every completion all but its last."""

    def make() -> Tensor:
        return torch.cat(
            [
                torch.arange(own - (own == start + prompt), own + length - 1)
                for start, prompt, own, length in layout.completions()
            ]
        )

    on_cpu: Tensor = layout.cached("distinct predictors", make)
    made: Tensor = layout.cached(
        ("distinct predictors", str(like.device)), lambda: on_cpu.to(like.device, non_blocking=True)
    )
    return made


def trim_last_layer(decoder: nn.Module) -> None:
    """Let the last layer's MLP run for predicting rows only, in passes over shared prompts, where it is one that works row by
    row: written as Llama's. Call it before the layers' classes are changed.

    Only where the code of decoder and layer is transformers': a model's own may run the last layer again, or others behind it.
    """
    layers = _layers(decoder)
    known = layers and all(_of_transformers(part) for part in (decoder, layers[-1]))
    parts = dict(layers[-1].named_children()) if known else {}
    attention = [part for part in parts.values() if "attention" in type(part).__name__.lower()]
    mlps = [name for name, part in parts.items() if reads_like(type(part), LlamaMLP)]
    if len(attention) == len(mlps) == 1:
        _PredictorRows(attention[0], parts[mlps[0]])
        decoder._trimmed = mlps[0]  # type: ignore[assignment]


def _of_transformers(part: nn.Module) -> bool:
    return type(part).__module__.startswith("transformers.")


def trimmed_mlp(decoder: nn.Module) -> nn.Module | None:
    """The MLP that `trim_last_layer` found."""
    name = getattr(decoder, "_trimmed", None)
    return None if name is None else getattr(_layers(decoder)[-1], name)


def _layers(decoder: nn.Module) -> Any:
    return next((module for module in decoder.children() if isinstance(module, nn.ModuleList)), None)
