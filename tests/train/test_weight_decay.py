"""What weight decay reaches: every matrix of a layer that multiplies, and no bias, norm or embedding."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from fasttrain.config import LoraConfig, TrainConfig
from fasttrain.model.lora import attach_lora, in_projector
from fasttrain.model.policy import Policy
from fasttrain.train.optimizer import parameter_groups, trainable_parameters


def decayed(module: object, named: list) -> set[str]:
    groups = parameter_groups(module, named, TrainConfig(weight_decay=0.1))  # type: ignore[arg-type]
    reached = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    return {name for name, parameter in named if id(parameter) in reached}


def test_norms_biases_and_embeddings_do_not_decay(tiny_llava: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    named = list(model.named_parameters())
    ends = {name.removesuffix(".weight").rpartition(".")[2] for name in decayed(model, named)}
    assert {"q_proj", "down_proj", "lm_head", "linear_1", "fc1"} <= ends
    left = {name for name, _ in named} - decayed(model, named)
    assert all("norm" in name or name.endswith(".bias") or "embed" in name for name in left)
    assert "model.language_model.embed_tokens.weight" in left


@pytest.mark.parametrize("targets", ["auto", ["embedding_projection", "embed_tokens"]])
def test_a_linear_layer_that_is_called_an_embedding_decays(
    targets: str | list[str], tiny_models: ModuleType, tiny_families: ModuleType, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        tiny_families.save(tiny_models, tmp_path / "model", "Gemma 4")
    )
    Policy(model)  # whose head is known not to be adapted
    attach_lora(model, LoraConfig(rank=2, alpha=4, targets=targets), train_projector=targets == "auto")
    named = trainable_parameters(model)
    assert any(in_projector(name) for name, _ in named)
    expected = {name for name, _ in named if "lora_embedding_" not in name}
    assert decayed(model, named) == expected
