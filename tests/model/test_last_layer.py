"""The last layer's MLP runs for predicting rows only, and what is read, values and gradients, is what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel

from fasttrain.model.attention import SHARED
from fasttrain.model.checkpointing import checkpoint_decoder
from fasttrain.model.compiled_layers import compile_layers
from fasttrain.model.fused_layers import fuse_layers
from fasttrain.model.last_layer import trim_last_layer, trimmed_mlp
from fasttrain_kernels import SharedPrefixLayout

SIZES = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYOUT = SharedPrefixLayout.from_groups([(7, [3, 1]), (4, [5]), (1, [2, 2, 1])])


def models(family: str) -> tuple[Any, Any]:
    """A tiny model, and a copy whose last layer is trimmed."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES)
    whole = AutoModelForCausalLM.from_config(config, attn_implementation=SHARED).model.train()
    trimmed = copy.deepcopy(whole)
    trim_last_layer(trimmed)
    return whole, trimmed


def found(decoder: Any, layout: SharedPrefixLayout = LAYOUT) -> list[torch.Tensor]:
    """The rows that predict, and the gradients of every weight that leads to them."""
    torch.manual_seed(1)
    ids = torch.randint(3, 64, (1, layout.tokens))
    out = decoder(
        ids, position_ids=layout.position_ids()[None], shared_prefix_layout=layout, use_cache=False
    ).last_hidden_state[0, layout.predictor_rows()]
    weights = [weight for weight in decoder.parameters() if weight.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * torch.randn_like(out)).sum(), weights)]


def same(whole: list[torch.Tensor], trimmed: list[torch.Tensor]) -> None:
    for expected, got in zip(whole, trimmed, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


def plain(decoder: nn.Module) -> None:
    """Nothing else is done to it."""


@pytest.mark.parametrize("change", [plain, fuse_layers, checkpoint_decoder, compile_layers])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "qwen3"])
def test_rows_and_gradients_are_the_whole_layers(family: str, change: Callable[[Any], Any]) -> None:
    whole, trimmed = models(family)
    assert trimmed_mlp(trimmed) is trimmed.layers[-1].mlp
    change(trimmed)
    same(found(whole), found(trimmed))


def test_only_predicting_rows_reach_the_last_mlp() -> None:
    _, trimmed = models("llama")
    seen = []
    for layer in trimmed.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    found(trimmed)
    # a completion's last token predicts nothing; a prompt's last predicts every completion's first
    assert seen == [LAYOUT.tokens, LAYOUT.tokens, (1 + 2 + 0) + (1 + 4) + (1 + 1 + 1 + 0)]


def test_a_layer_made_again_has_the_rows_of_its_own_pass() -> None:
    whole, trimmed = models("llama")
    checkpoint_decoder(trimmed)
    layouts = LAYOUT, SharedPrefixLayout.from_groups([(2, [9, 4])])
    total = []
    for decoder in (whole, trimmed):
        torch.manual_seed(2)
        outs = [
            decoder(
                torch.randint(3, 64, (1, layout.tokens)), position_ids=layout.position_ids()[None],
                shared_prefix_layout=layout, use_cache=False,
            ).last_hidden_state[0, layout.predictor_rows()]
            for layout in layouts
        ]  # fmt: skip
        total.append(torch.autograd.grad(sum(out.sin().sum() for out in outs), list(decoder.parameters())))
    same(*total)


def test_ordinary_passes_run_whole() -> None:
    whole, trimmed = models("llama")
    found(trimmed)  # what the last shared pass left does not matter
    ids = torch.randint(3, 64, (2, 9))
    for decoder in (whole, trimmed):
        decoder.set_attn_implementation("eager")
    assert torch.equal(whole(ids).last_hidden_state, trimmed(ids).last_hidden_state)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "phi"])
def test_an_mlp_that_is_not_known_runs_whole(family: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES))
    decoder = model.get_decoder()
    trim_last_layer(decoder)
    assert trimmed_mlp(decoder) is None


class LoopedLlama(LlamaModel):
    """Runs its layers twice, as models with code of their own do."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **given: Any) -> Any:
        once = super().forward(input_ids, inputs_embeds=inputs_embeds, **given)
        return super().forward(inputs_embeds=once.last_hidden_state, **given)


def test_layers_of_own_code_run_whole_for_they_may_run_again() -> None:
    torch.manual_seed(0)
    whole = LoopedLlama._from_config(AutoConfig.for_model("llama", **SIZES), attn_implementation=SHARED)
    trimmed = copy.deepcopy(whole)
    trim_last_layer(trimmed)
    same(found(whole), found(trimmed))
