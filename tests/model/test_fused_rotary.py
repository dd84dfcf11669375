"""Rotary positions in few passes are transformers' own function, values and gradients; transformers itself stays as it is."""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fasttrain.model.fused_rotary import ROTARY, fuse_rotary

SIZES = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = ["llama", "qwen3", "mistral", "gemma3_text", "qwen2_moe"]


def models(family: str, **more: Any) -> tuple[Any, Any, int]:
    """A tiny model, a copy that rotates with the fused function, and how many of its modules do."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **SIZES, **more), attn_implementation="eager"
    )
    theirs.eval()
    ours = copy.deepcopy(theirs)
    return theirs, ours, fuse_rotary(ours)


def found(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits, and the gradients of every weight."""
    logits = model(ids).logits
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [logits.detach(), *torch.autograd.grad(logits.float().log_softmax(-1)[..., 3].sum(), weights)]


def compare(theirs: Any, ours: Any, tolerance: float = 1e-5) -> None:
    ids = torch.randint(3, 64, (2, 19))
    for expected, got in zip(found(theirs, ids), found(ours, ids), strict=True):
        torch.testing.assert_close(
            got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max() + 1e-3)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_transformers(family: str) -> None:
    theirs, ours, fused = models(family)
    assert fused == 2
    compare(theirs, ours)


def test_a_hub_kernels_stand_in_for_the_function_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers puts it there where a `kernels` package that it accepts is installed."""
    layer = pytest.importorskip("kernels.layer.layer")
    modeling = importlib.import_module("transformers.models.llama.modeling_llama")
    stand_in = layer._create_func_module(getattr(modeling, ROTARY))()
    monkeypatch.setattr(modeling, ROTARY, stand_in)
    for family in ("llama", "qwen3"):
        theirs, ours, fused = models(family)
        assert fused == 2
        compare(theirs, ours)


@pytest.mark.parametrize("axis", [1, 2])
def test_function_alone_in_either_layout(axis: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from fasttrain.model.fused_rotary import _fused

    turn = torch.randn(1, 7, 3)
    cos, sin = (torch.cat((part, part), -1) for part in (turn.cos(), turn.sin()))
    q, k = torch.randn(1, 7, 4, 6), torch.randn(1, 7, 2, 6)
    if axis == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    results = []
    for function in (apply_rotary_pos_emb, _fused(apply_rotary_pos_emb)):
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        out = function(*leaves, cos, sin, unsqueeze_dim=axis)
        results.append([*out, *torch.autograd.grad([out[0].square().sum(), out[1].square().sum()], leaves)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_in_bf16_less_is_rounded() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from fasttrain.model.fused_rotary import _fused

    turn = torch.randn(1, 200, 16)
    cos, sin = (torch.cat((part, part), -1).bfloat16() for part in (turn.cos(), turn.sin()))
    q, k = torch.randn(1, 4, 200, 32).bfloat16(), torch.randn(1, 2, 200, 32).bfloat16()
    exact, _ = apply_rotary_pos_emb(q.double(), k.double(), cos.double(), sin.double())
    theirs, _ = apply_rotary_pos_emb(q, k, cos, sin)
    ours, _ = _fused(apply_rotary_pos_emb)(q, k, cos, sin)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() < (theirs - exact).norm()


@pytest.mark.parametrize("family", ["phi", "glm4_moe", "olmo2", "cohere"])
def test_families_that_rotate_otherwise_stay_theirs(family: str) -> None:
    more = {"head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2} if family == "glm4_moe" else {}
    theirs, ours, fused = models(family, **more)
    assert fused == (2 if family == "phi" else 0)  # phi's own function is Llama's: it cuts before it calls
    compare(theirs, ours)


def test_positions_of_another_dtype_or_with_a_gradient_are_left_to_transformers() -> None:
    from fasttrain.model.fused_rotary import _fused

    called = []

    def theirs(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
        called.append(unsqueeze_dim)
        return q, k

    q, k, cos, sin = (
        torch.randn(1, 2, 5, 6),
        torch.randn(1, 1, 5, 6),
        torch.randn(1, 5, 6),
        torch.randn(1, 5, 6),
    )
    rotate = _fused(theirs)
    rotate(q, k, cos, sin)
    assert called == []
    rotate(q.bfloat16(), k.bfloat16(), cos, sin)
    rotate(q, k, cos.clone().requires_grad_(), sin)
    rotate(q, k, cos[..., :4], sin[..., :4], unsqueeze_dim=1)
    assert called == [1, 1, 1]


def test_transformers_itself_is_not_changed() -> None:
    modeling = importlib.import_module("transformers.models.llama.modeling_llama")
    before = (modeling.LlamaAttention.forward, getattr(modeling, ROTARY))
    theirs, ours, _ = models("llama")
    assert (modeling.LlamaAttention.forward, getattr(modeling, ROTARY)) == before
    mine = inspect.unwrap(type(ours.model.layers[0].self_attn).forward).__globals__[ROTARY]
    assert mine is not before[1]
    assert isinstance(ours.model.layers[0].self_attn, modeling.LlamaAttention)
    assert inspect.signature(type(ours.model.layers[0].self_attn).forward) == inspect.signature(before[0])
    assert type(theirs.model.layers[0].self_attn) is modeling.LlamaAttention
