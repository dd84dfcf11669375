"""`train.compile`: the decoder's norms and activation products as functions that torch.compile made, one pass each.

Only chains of elementwise operations are compiled, never a whole layer: its matrix products, our attention and our LoRA are
called as they are, and packs of all lengths run the same code (dynamic shapes). Rounding may differ from uncompiled layers.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP

from fasttrain.errors import UserError
from fasttrain.model.fused_layers import reads_like

Product = Callable[[Tensor, Tensor], Tensor]


def _silu_product(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gelu_tanh_product(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


_PRODUCTS: dict[type, Product] = {
    SiLUActivation: _silu_product,
    nn.SiLU: _silu_product,
    GELUTanh: _gelu_tanh_product,
}


def compile_layers(decoder: nn.Module) -> int:
    """Let norms and gated MLPs of a decoder run compiled functions; how many modules do.

    UserError if torch.compile cannot make code here, with its reason.
    """
    # what dynamo itself sets off in torch, of no use to a user
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    compiled = _Compiled()
    found = 0
    for module in decoder.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm") or isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.forward = _bound(compiled.norm(type(module)), module)  # type: ignore[method-assign]
        elif (product := _product_of(module)) is not None:
            module.forward = _bound(_gated, module, compiled.product(product))  # type: ignore[method-assign]
        else:
            continue
        found += 1
    if found:
        _try_out(compiled.product(_silu_product))
    return found


class _Compiled:
    """One compiled function for all modules of a class."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def norm(self, kind: type) -> Callable[..., Tensor]:
        return self._make(kind.forward)  # type: ignore[attr-defined]

    def product(self, function: Product) -> Product:
        return self._make(function)

    def _make(self, function: Any) -> Any:
        if function not in self._made:
            self._made[function] = torch.compile(function, dynamic=True)
        return self._made[function]


def _bound(function: Callable[..., Tensor], module: nn.Module, *more: Any) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(module, *more, hidden, *args, **kwargs)

    return forward


def _gated(module: Any, product: Product, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(product(module.gate_proj(x), module.up_proj(x)))
    return out


def _product_of(module: Any) -> Product | None:
    """What a gated MLP, down(activation(gate(x)) * up(x)), does between its products; None for anything else."""
    return _PRODUCTS.get(type(module.act_fn)) if reads_like(type(module), LlamaMLP) else None


def _try_out(product: Product) -> None:
    example = torch.ones(3, 5, requires_grad=True)
    with _named_mistake():
        product(example, example).sum().backward()


@contextlib.contextmanager
def _named_mistake() -> Iterator[None]:
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).strip().splitlines()[0]
        raise UserError(
            f"train.compile: wanted a machine on which torch.compile works, got: {reason}"
        ) from None
