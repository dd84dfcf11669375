"""Norms and gated MLPs in few passes are transformers' own functions, values and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

SIZES = {"hidden_size": 22, "intermediate_size": 37, "num_attention_heads": 1, "num_key_value_heads": 1}


class Layer(nn.Module):
    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def layers(family: str, activation: str = "silu") -> tuple[Layer, Layer]:
    """A layer of the family, and a copy with the fused functions."""
    from fasttrain.model.fused_layers import fuse_layers

    torch.manual_seed(0)
    kinds: dict[str, Any] = {
        "llama": (LlamaRMSNorm, LlamaMLP, LlamaConfig),
        "qwen3": (Qwen3RMSNorm, Qwen3MLP, Qwen3Config),
        "gemma3": (Gemma3RMSNorm, Gemma3MLP, Gemma3TextConfig),
    }
    norm, mlp, config = kinds[family]
    named = {} if family == "gemma3" else {"hidden_act": activation}  # Gemma's is GELU's tanh form
    theirs = Layer(norm(22, eps=1e-3), mlp(config(**SIZES, **named)))
    nn.init.normal_(theirs.norm.weight)
    theirs.requires_grad_(False)
    ours = copy.deepcopy(theirs)
    assert fuse_layers(ours) == (1 if activation == "gelu" else 2)
    return theirs, ours


def result(layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_values_and_gradients_are_transformers(family: str, scale: float) -> None:
    theirs, ours = layers(family)
    x = scale * torch.randn(1, 11, 22)
    x[0, 3] = 0  # only eps stands between such a row and infinity
    (out, grad), (our_out, our_grad) = result(theirs, x), result(ours, x)
    torch.testing.assert_close(our_out, out, rtol=2e-6, atol=2e-6 * scale)
    torch.testing.assert_close(
        our_grad, grad, rtol=1e-5, atol=1e-5 * float(grad[0, [0, 1, 2, 4]].abs().max())
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_less_is_kept_for_the_backward_pass(family: str) -> None:
    theirs, ours = layers(family)
    kept = []
    for layer in (theirs, ours):
        seen: dict[int, int] = {}

        def remember(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            out = layer(torch.randn(1, 101, 22, requires_grad=True))
        kept.append(sum(seen.values()))
        out.sum().backward()
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_bf16_statistics_are_fp32_and_less_is_rounded(family: str) -> None:
    theirs, ours = layers(family)
    true, x = copy.deepcopy(theirs), torch.randn(1, 31, 22).bfloat16()
    for layer in (theirs, ours):
        layer.to(torch.bfloat16)
    for norm in (true.norm, theirs.norm, ours.norm):  # of equal weights
        norm.weight.data.copy_(theirs.norm.weight.data)
    (out, grad), (our_out, our_grad) = result(theirs.norm, x), result(ours.norm, x)
    _, true_grad = result(true.norm, x.float())
    torch.testing.assert_close(
        our_out, out, rtol=2**-7, atol=0
    )  # a unit in the last place, where the mean rounded otherwise
    error, their_error = ((one.float() - true_grad).norm() for one in (our_grad, grad))
    assert error <= 1.05 * their_error


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_linears_behind_norm_and_activation_make_their_inputs_again(family: str) -> None:
    import peft

    from fasttrain.model.fused_layers import fuse_layers
    from fasttrain.model.fused_lora import fuse_lora

    theirs, _ = layers(family)
    targets = ["gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    )
    ours = copy.deepcopy(adapted)
    fuse_lora(ours)
    fuse_layers(ours)
    x, kept, found = torch.randn(1, 101, 22), [], []
    for model in (adapted, ours):
        seen: dict[int, tuple[int, ...]] = {}

        def remember(tensor: torch.Tensor, seen: dict[int, tuple[int, ...]] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            out = model(x.requires_grad_())
        kept.append([shape for shape in seen.values() if 101 in shape])
        weights = [p for p in model.parameters() if p.requires_grad]
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *weights])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    wide = [shape for shape in kept[1] if shape[-1] in (22, 37)]
    assert sorted(shape[-1] for shape in wide) == [
        22,
        37,
        37,
    ]  # the norm's input, gate and up: nothing else of their size


@pytest.mark.parametrize("change", ["trained norm", "gelu"])
def test_what_the_functions_do_not_cover_runs_as_before(change: str) -> None:
    theirs, ours = layers("llama", "gelu" if change == "gelu" else "silu")
    x = torch.randn(1, 5, 22)
    for layer in (theirs, ours):
        if change == "trained norm":
            layer.norm.weight.requires_grad_(True)
    (out, grad), (our_out, our_grad) = result(theirs, x), result(ours, x)
    torch.testing.assert_close(our_out, out)
    torch.testing.assert_close(our_grad, grad)
    if change == "trained norm":
        torch.testing.assert_close(ours.norm.weight.grad, theirs.norm.weight.grad)
