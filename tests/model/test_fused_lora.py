"""The fused LoRA linears compute what peft's own compute, and leave alone what they do not know."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from peft.utils.warning import PeftWarning
from torch import nn


class Block(nn.Module):
    """Three projections of one input and one of their sum, like attention; v has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(23, 31, bias=False), nn.Linear(23, 13, bias=False)
        self.v_proj, self.o_proj = nn.Linear(23, 13), nn.Linear(57, 23, bias=False)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        keys = x if other is None else other
        return self.o_proj(torch.cat([self.q_proj(x).tanh(), self.k_proj(keys), self.v_proj(keys)], -1))


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """A block with peft's LoRA, and a copy of it with fused linears."""
    from fasttrain.model.fused_lora import fuse_lora

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=5, lora_alpha=3, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], **options
    )
    theirs = peft.get_peft_model(Block(), config).to(dtype)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    return theirs, ours


def results(model: Any, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    out = model(*inputs)
    out.square().sum().backward()
    found = {"out": out.detach()} | {f"d input {i}": x.grad for i, x in enumerate(inputs)}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], rtol: float = 1e-10) -> None:
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", [(7, 23), (1, 11, 23), (2, 3, 23)])
def test_outputs_and_all_gradients_are_pefts(shape: tuple[int, ...]) -> None:
    theirs, ours = adapted()
    x = torch.randn(shape, dtype=torch.float64)
    found = results(ours, x)
    assert sum("lora_" in name for name in found) == 8
    assert_same(results(theirs, x), found)


def test_siblings_called_with_different_inputs_are_computed_apart() -> None:
    theirs, ours = adapted()
    x, other = torch.randn(2, 4, 23, dtype=torch.float64)
    assert_same(results(theirs, x, other), results(ours, x, other))
    assert_same(results(theirs, x), results(ours, x))  # and nothing stays behind


def test_three_projections_read_their_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttrain.model import fused_lora

    _, ours = adapted()
    calls = []
    original = fused_lora._run
    monkeypatch.setattr(
        fused_lora, "_run", lambda members, x: calls.append(len(members)) or original(members, x)
    )
    ours(torch.randn(3, 23, dtype=torch.float64))
    assert calls == [3, 1]


def test_disabled_and_merged_adapters_go_pefts_own_way() -> None:
    theirs, ours = adapted()
    x = torch.randn(6, 23, dtype=torch.float64)
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x))
    before = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), before)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    theirs, ours = adapted()
    x = torch.randn(6, 23, dtype=torch.float64)
    assert_same(results(theirs, x), results(lambda_module(ours, checkpoint), x))


def lambda_module(model: Any, checkpoint: Any) -> nn.Module:
    class Checkpointed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(model, x, use_reentrant=False)

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return model.named_parameters(*args, **kwargs)

    return Checkpointed()


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_lora_are_left_to_peft(options: dict[str, Any]) -> None:
    from fasttrain.model.fused_lora import FusedLoraLinear

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # lora_bias over linears without bias
        _, ours = adapted(torch.float32, **options)
    fused = [name for name, module in ours.named_modules() if isinstance(module, FusedLoraLinear)]
    assert not fused


def test_names_of_modules_and_weights_do_not_change() -> None:
    theirs, ours = adapted()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert [name for name, _ in theirs.named_modules()] == [name for name, _ in ours.named_modules()]
