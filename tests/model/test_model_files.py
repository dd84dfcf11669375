"""A model's files that transformers cannot take are a mistake of one line with the cause in it, in every command."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fasttrain.cli import cli
from fasttrain.command import _plain_weights
from fasttrain.config import ModelConfig, config_from_dict
from fasttrain.devices import pick_device
from fasttrain.errors import UserError
from fasttrain.model.folder import find_folder
from fasttrain.model.load import (
    load_model,
    load_model_config,
    load_processor,
    stop_token_ids,
)
from fasttrain.plan.planned_model import build_planned_model

# a file of the model -> what stands in it, or is changed in it, and what the one line says of it
DAMAGE: list[tuple[str, bytes | dict[str, Any], str]] = [
    ("config.json", {"hidden_size": "64"}, "'hidden_size' expected int, got str"),
    ("config.json", {"hidden_size": 64.0}, "'hidden_size' expected int, got float"),
    ("config.json", {"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
    ("config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
    ("config.json", {"dtype": "float9"}, "float9"),
    ("config.json", {"num_hidden_layers": 10**9}, "got 21 tensors in all"),
    ("config.json", {"hidden_act": "nope"}, "KeyError: 'nope'"),
    ("config.json", b"[]", "model_type"),
    ("config.json", b"null", "NoneType"),
    ("config.json", b"[" * 100_000, "recursion"),
    ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "got gptq"),
    (
        "config.json",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "got int8",
    ),
    ("config.json", {"quantization_config": {"bits": 4}}, "got None"),
    ("tokenizer.json", {"version": "9"}, "Unknown tokenizer version"),
    ("tokenizer.json", {"model": {"type": "Odd"}}, "did not match any variant"),
    ("tokenizer.json", b'{"version": "1.0", ', "double quotes"),
    ("model.safetensors.index.json", b"[]", "TypeError"),
    ("generation_config.json", b"[]", "wanted a JSON object, got list"),
    ("generation_config.json", b'{"eos_token_id": 2', "delimiter"),
    ("generation_config.json", b'{"a": "\xff"}', "0xff"),
    ("generation_config.json", b'{"eos_token_id": [2, [3]]}', r"eos_token_id: wanted .*, got \[3\]"),
    ("generation_config.json", b'{"eos_token_id": "2"}', "eos_token_id: wanted .*, got '2'"),
    ("generation_config.json", b'{"eos_token_id": -1}', "eos_token_id: wanted .*, got -1"),
]


def spoil(folder: Path, file: str, change: bytes | dict[str, Any]) -> None:
    if file.endswith(".index.json"):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    if isinstance(change, dict):
        change = json.dumps(json.loads((folder / file).read_text()) | change).encode()
    (folder / file).write_bytes(change)


@pytest.mark.parametrize(("file", "change", "cause"), DAMAGE)
def test_what_a_file_of_the_model_is_wrong_in_is_told_in_one_line(
    file: str, change: bytes | dict[str, Any], cause: str, tiny_text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_text, tmp_path / "model")
    spoil(folder, file, change)
    config = ModelConfig(name=str(folder))
    with pytest.raises(UserError, match=rf"^model\.name: .*{folder}.*{cause}") as caught:
        model_config = load_model_config(folder, config)
        processor = load_processor(folder, config, has_images=False)
        stop_token_ids(processor, folder)
        load_model(folder, config, model_config, pick_device())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_quantised_weights_that_do_not_train_may_answer(tiny_text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_text, tmp_path / "model")
    stored = {"quant_method": "gptq", "bits": 4}
    spoil(folder, "config.json", {"quantization_config": stored})
    found = load_model_config(folder, ModelConfig(name=str(folder)), trains=False)
    assert found.quantization_config == stored


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("command", ["dpo", "answer", "eval", "merge"])
def test_every_command_tells_it(
    command: str,
    file: str,
    tiny_text: Path,
    tiny_models: Any,
    text_pairs: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(tiny_text, tmp_path / "model")
    adapter = tiny_models.build_adapter(folder, tmp_path / "adapter")
    spoil(folder, file, {"hidden_size": "64"} if file == "config.json" else {"version": "9"})
    recipe = {
        "model": {"name": str(folder)},
        "data": {"train": str(text_pairs(tmp_path / "pairs.jsonl", 4))},
        "train": {"output": str(tmp_path / "run")},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "text": "Why?"}\n')
    (tmp_path / "val2014").mkdir()
    tiny_models.draw_image(tmp_path / "val2014" / "x.png", seed=1)
    pope = {"question_id": 1, "image": "x.png", "text": "Is there a dog?", "label": "no"}
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(pope) + "\n")
    words = {
        "dpo": ["-c", "recipe.yaml"],
        "answer": ["-m", "model", "questions.jsonl", "-o", "answers.jsonl"],
        "eval": ["pope", "-m", "model", "--data", ".", "-o", "scores"],
        "merge": [str(adapter), "-o", "merged"],
    }[command]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        found = CliRunner().invoke(cli, [command, *words]).exception
    assert isinstance(found, UserError)
    assert ("hidden_size" if file == "config.json" else "tokenizer version") in str(found)
    assert "\n" not in str(found)


HUB: list[tuple[str, str]] = [
    ("RevisionNotFoundError", "model.revision: wanted a branch, tag or commit of me/m, got v9"),
    ("GatedRepoError", "model.name: the hub gives me/m to those only who were granted it"),
    ("RepositoryNotFoundError", "model.name: the hub has no me/m, or it is private"),
    ("HfHubHTTPError", "model.name: the hub refused me/m: 418 Client Error$"),
    ("", "model.name: cannot get me/m from the hub: Server disconnected"),
]


@pytest.mark.parametrize(("kind", "said"), HUB)
def test_what_the_hub_answers_is_told_by_its_cause(
    kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import errors

    def fail(*arguments: object, **options: object) -> None:
        if not kind:  # its HTTP library's own, which is no OSError
            raise type("RemoteProtocolError", (Exception,), {})("Server disconnected")
        response: Any = SimpleNamespace(headers={}, request=None)
        raise getattr(errors, kind)("418 Client Error\n\nmore", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=f"^{said}"):
        find_folder(ModelConfig(name="me/m", revision="v9"))


def test_an_adapter_in_the_models_folder_is_refused(
    tiny_text: Path, tiny_models: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "both"
    shutil.copytree(tiny_text, folder)
    tiny_models.build_adapter(tiny_text, folder, b_std=0.5)
    with pytest.raises(
        UserError, match=r"model.name: wanted a model without an adapter, got .*both .*lora.init_from"
    ):
        find_folder(ModelConfig(name=str(folder)))


@pytest.mark.parametrize("name", ["flash_attention_2", "somebody/kernel"])
def test_the_attention_that_config_json_names_is_not_asked_for(
    tiny_text: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "named"
    shutil.copytree(tiny_text, folder)
    spoil(folder, "config.json", {"_attn_implementation": name, "experts_implementation": name})
    config = config_from_dict({"model": {"name": str(folder)}, "data": {"train": "none"}})
    build_planned_model(config, load_model_config(folder, config.model), torch.float32)


def test_weights_in_fp8_are_loaded_in_full(tiny_text: Path, tmp_path: Path) -> None:
    """On a GPU too, where transformers would run them as they are, by kernels without a gradient."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_text, tmp_path / "model")
    weights, name = load_file(folder / "model.safetensors"), "model.layers.1.self_attn.q_proj.weight"
    narrow, scale = weights[name].to(torch.float8_e4m3fn), torch.tensor([[0.5, 2.0], [4.0, 0.25]])
    save_file(
        weights | {name: narrow, f"{name}_scale_inv": scale}, folder / "model.safetensors", {"format": "pt"}
    )
    others = ["lm_head", "gate_proj", "up_proj", "down_proj", "k_proj", "v_proj", "o_proj"]
    stored = {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": others}
    spoil(folder, "config.json", {"quantization_config": stored})
    config = ModelConfig(name=str(folder))
    model_config = load_model_config(folder, config)
    assert model_config.quantization_config["dequantize"]
    model = load_model(folder, config, model_config, pick_device())
    whole = narrow.float() * scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
    torch.testing.assert_close(model.get_parameter(name), whole, check_dtype=True)
    assert not hasattr(model.config, "quantization_config")  # what is saved of it is an ordinary model


def test_images_taken_from_a_layer_that_is_not_there_are_told(tiny_llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    spoil(folder, "config.json", {"vision_feature_layer": [-2, 4]})
    with pytest.raises(UserError, match=r"vision_feature_layer: wanted one of 3 layers, got 4$"):
        load_model_config(folder, ModelConfig(name=str(folder)))


@pytest.mark.parametrize(
    ("put", "told"),
    [
        (os.mkfifo, "got a pipe, socket or device"),
        (lambda path: path.symlink_to("/dev/zero"), "got a pipe, socket or device"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    ],
)
def test_what_would_never_be_read_to_its_end_in_a_models_folder_is_refused(
    put: Callable[[Path], None], told: str, tiny_text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_text, tmp_path / "model")
    put(folder / "processor_config.json")
    with pytest.raises(UserError, match=f"^model.name: .*{told}"):
        find_folder(ModelConfig(name=str(folder)))


@pytest.mark.parametrize("content", [b"null", b"7", b"[" * 100_000])
def test_a_config_that_is_no_object_leaves_quantised_imports_alone(
    content: bytes, tiny_text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_text, tmp_path / "model")
    spoil(folder, "config.json", content)
    config = config_from_dict(
        {"model": {"name": str(folder)}, "data": {"train": "x"}, "train": {"output": "y"}}
    )
    assert not _plain_weights(config)
