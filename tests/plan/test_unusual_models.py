"""`fasttrain plan` on a configuration whose values differ between layers, and on ones that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fasttrain.cli import cli
from fasttrain.errors import UserError


def plan(config: dict[str, Any], folder: Path) -> str:
    """What the command says of a folder with this config.json alone."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "recipe.yaml").write_text(json.dumps({"data": {"train": "none.jsonl"}}), encoding="utf-8")
    arguments = ["plan", "-c", str(folder / "recipe.yaml"), "-s", f"model.name={folder}"]
    result = CliRunner().invoke(cli, [*arguments, "--lengths", "50,20,10"])
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.mark.parametrize("images", [False, True])
def test_gemma_4_whose_head_sizes_differ_between_layers_is_planned(images: bool, tmp_path: Path) -> None:
    import transformers

    text = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
    }  # fmt: skip
    config: Any = transformers.Gemma4TextConfig(**text)
    if images:
        config = transformers.Gemma4Config(text_config=config, audio_config=None)
    assert "tokens" in plan(config.to_dict(), tmp_path)


def test_weights_that_are_nf4_in_the_models_files_are_planned_as_such(tmp_path: Path) -> None:
    import transformers

    sizes = transformers.LlamaConfig(hidden_size=512, num_hidden_layers=4, vocab_size=512).to_dict()
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    whole, narrow = (
        frozen_gib(plan(one, tmp_path)) for one in (sizes, sizes | {"quantization_config": stored})
    )
    assert 0.2 < narrow / whole < 0.4


def frozen_gib(page: str) -> float:
    (line,) = (line for line in page.splitlines() if "frozen weights" in line)
    return float(line.split()[-1])


@pytest.mark.parametrize(
    ("changed", "cause"),
    [({"hidden_size": "64"}, "hidden_size"), ({"num_attention_heads": 5}, "attention heads"), ({"hidden_size": -64}, "-64")],
)  # fmt: skip
def test_a_configuration_that_no_model_can_have_is_one_line_with_the_cause(
    changed: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    sizes = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    with pytest.raises(UserError, match=rf"^model\.name: cannot .*{cause}") as caught:
        plan(sizes | changed, tmp_path)
    assert "\n" not in str(caught.value)
