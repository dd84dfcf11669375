"""`train.compile` changes how norms and activations run, not what they compute, and recompiles nothing from pack to pack."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fasttrain.errors import UserError

pytestmark = pytest.mark.slow  # a compiler runs

SIZES = {"hidden_size": 22, "intermediate_size": 37, "num_attention_heads": 1, "num_key_value_heads": 1}
FAMILIES: dict[str, Any] = {
    "silu": (LlamaRMSNorm, LlamaMLP, LlamaConfig),
    "gelu": (Gemma3RMSNorm, Gemma3MLP, Gemma3TextConfig),
}


class Layer(nn.Module):
    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def layer(family: str) -> Layer:
    torch.manual_seed(0)
    norm, mlp, config = FAMILIES[family]
    made = Layer(norm(22, eps=1e-3), mlp(config(**SIZES)))
    nn.init.normal_(made.norm.weight)
    return made


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    out = model(x)
    weights = list(model.parameters())
    found = torch.autograd.grad(
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), [x, *weights]
    )
    return [out.detach(), *found]


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_compute_the_same_for_every_length_from_one_compilation(family: str) -> None:
    from torch._dynamo.utils import counters

    from fasttrain.model.compiled_layers import compile_layers

    theirs = layer(family)
    ours = copy.deepcopy(theirs)
    assert compile_layers(ours) == 2
    frames = None
    for length in (11, 29, 7, 64):
        x = torch.randn(1, length, 22)
        for a, b in zip(gradients(theirs, x), gradients(ours, x)):
            torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5 * float(a.abs().max()))
        frames = frames or counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == frames


class Doubled(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_an_mlp_that_does_more_than_its_parts_tell_is_left_alone() -> None:
    from fasttrain.model.compiled_layers import compile_layers

    torch.manual_seed(0)
    mlp = Doubled(LlamaConfig(**SIZES))
    assert compile_layers(nn.ModuleList([mlp])) == 0
    assert compile_layers(nn.ModuleList([LlamaMLP(LlamaConfig(**SIZES))])) == 1


def test_a_machine_without_a_compiler_is_a_named_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttrain.model.compiled_layers import compile_layers

    def fail(graph: object, inputs: object) -> object:
        raise RuntimeError("no C++ compiler found")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=fail, **options))
    with pytest.raises(UserError, match=r"train\.compile: wanted a machine .*no C\+\+ compiler found"):
        compile_layers(layer("silu"))
