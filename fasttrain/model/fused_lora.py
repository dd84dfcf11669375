"""LoRA linears without passes of their own over the activations.

peft computes W x, then B (A x), then the product with the scaling, then the sum: three passes over a tensor of the output's
size forward and as many back, and each of q, k and v (or gate and up) reads the same input again. Here

    y_i = W_i x + s_i B_i (A x)_i          one product with all A_i stacked; the low-rank product is added into y_i in place
    dx  = sum_i W_i' dy_i + A' (s_i B_i' dy_i)_i           every product is added into dx in place; no gradient for W

for all linears of a family that get the same input. peft's modules, parameters and names stay as they are; only the way their
forward runs changes, and only where it is plain LoRA over a frozen nn.Linear. Everything else goes peft's own way.

Of x nothing is kept for the backward where it says how to make it again from tensors that are kept anyway (`remade`).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fasttrain.model.remade import Source, source_of

# Linears that transformers' decoder layers call with the same input, one after the other.
FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Linears(torch.autograd.Function):
    """Outputs of linears that share x (T, D): weights are (W, bias or None, A, B) of each in turn; W gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, scales: tuple[float, ...], source: Source | None, *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        base, biases, low, high = (weights[i::4] for i in range(4))
        low_RD = _stack(low)
        inner_TR = x_TD @ low_RD.t()
        outputs = []
        for weight, bias, up, scale, part in zip(base, biases, high, scales, _columns(inner_TR, low)):
            assert weight is not None and up is not None
            out = x_TD @ weight.t() if bias is None else torch.addmm(bias, x_TD, weight.t())
            outputs.append(out.addmm_(part, up.t(), alpha=scale))
        ctx.scales, ctx.make = scales, source and source.make
        kept = (x_TD,) if source is None else source.kept
        ctx.kept = len(kept)
        ctx.save_for_backward(*kept, inner_TR, low_RD, *base, *low, *high)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        kept, (inner_TR, low_RD, *rest) = saved[: ctx.kept], saved[ctx.kept :]
        count = len(ctx.scales)
        base, low, high = rest[:count], rest[count : 2 * count], rest[2 * count :]
        wants = ctx.needs_input_grad
        back_TR = torch.zeros_like(inner_TR)
        dx = None
        result: list[Tensor | None] = []
        parts = zip(grads, base, high, ctx.scales, _columns(inner_TR, low), _columns(back_TR, low))
        for i, (grad, weight, up, scale, inner, back) in enumerate(parts):
            d_up = None
            if grad is not None:
                torch.mm(grad, up, out=back)
                back.mul_(scale)
                if wants[0]:
                    dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
                d_up = torch.mm(grad.t(), inner).mul_(scale) if wants[3 + 4 * i + 3] else None
            result += [None, None, None, d_up]
        x_TD = kept[0] if ctx.make is None else ctx.make(*kept).view(-1, low_RD.shape[1])
        d_low = back_TR.t() @ x_TD
        for i, part in enumerate(d_low.split([a.shape[0] for a in low])):
            result[4 * i + 2] = part if wants[3 + 4 * i + 2] else None
        if dx is not None:
            dx.addmm_(back_TR, low_RD)
        return dx, None, None, *result


def _stack(low: tuple[Tensor | None, ...]) -> Tensor:
    return low[0] if len(low) == 1 else torch.cat([a for a in low if a is not None])  # type: ignore[return-value]


def _columns(x_TR: Tensor, low: Any) -> tuple[Tensor, ...]:
    return x_TR.split([a.shape[0] for a in low], dim=1)


class _Family:
    """Linears that are called with the same input; the first call computes all, the others pick theirs up."""

    def __init__(self, members: list[FusedLoraLinear]) -> None:
        self.members = members
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def output(self, module: FusedLoraLinear, x: Tensor) -> Tensor:
        if self._input is x and id(module) in self._outputs:
            return self._take(module)
        members = self.members
        if module is not members[0]:  # called with another input than its siblings: they are no family
            members = [module]
        values = _run(members, x)
        self._input, self._outputs = x, dict(zip(map(id, members), values))
        return self._take(module)

    def _take(self, module: FusedLoraLinear) -> Tensor:
        out = self._outputs.pop(id(module))
        if not self._outputs:
            self._input = None
        return out


def _run(members: list[FusedLoraLinear], x: Tensor) -> list[Tensor]:
    weights: list[Tensor | None] = []
    for module in members:
        base, name = module.get_base_layer(), module.active_adapters[0]
        # As views the adapters' gradients leave one after another, the same way on every rank. Several weights of one function
        # would get theirs in an order that depends on what else the graph holds, and ZeRO adds them up as they come.
        low, high = (part[name].weight for part in (module.lora_A, module.lora_B))
        weights += [base.weight, base.bias, low.view_as(low), high.view_as(high)]
    scales = tuple(float(module.scaling[module.active_adapters[0]]) for module in members)
    outputs = _Linears.apply(x.reshape(-1, x.shape[-1]), scales, source_of(x), *weights)
    return [out.view(*x.shape[:-1], out.shape[-1]) for out in outputs]


class FusedLoraLinear(PeftLinear):
    """peft's LoRA linear with a forward of few passes; made from peft's own by `fuse_lora`."""

    family: _Family

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.disable_adapters or self.merged or _autocast(x):
            return super().forward(x, *args, **kwargs)
        return self.family.output(self, x)


def _autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(
        x.device.type
    )  # planning runs on meta, which has none


def _is_plain(module: Any) -> bool:
    """Whether this is one LoRA adapter without dropout, bias or variant, over a frozen unquantised nn.Linear."""
    if type(module) is not PeftLinear or len(module.active_adapters) != 1:
        return False
    name, base = module.active_adapters[0], module.get_base_layer()
    if type(base) is not nn.Linear or base.weight.requires_grad or name in module.lora_variant:
        return False
    if base.bias is not None and base.bias.requires_grad:
        return False
    dropout, low, high = module.lora_dropout[name], module.lora_A[name], module.lora_B[name]
    same = low.weight.dtype == high.weight.dtype == base.weight.dtype
    return isinstance(dropout, nn.Identity) and low.bias is None and high.bias is None and same


def fuse_lora(model: nn.Module) -> int:
    """Let every plain LoRA linear of the model run its forward in few passes; how many there are.

    Not for ZeRO-3, which gathers a weight only for its own module's forward.
    """
    fused = 0
    for parent in list(model.modules()):
        children = {name: child for name, child in parent.named_children() if _is_plain(child)}
        for names in (
            *(family for family in FAMILIES if all(n in children for n in family)),
            *((n,) for n in children),
        ):
            members = [children.pop(name) for name in names if name in children]
            if not members:
                continue
            for member in members:
                member.__class__ = FusedLoraLinear
            family = _Family(members)  # type: ignore[arg-type]
            for member in members:
                member.family = family  # type: ignore[assignment]
            fused += len(members)
    return fused
