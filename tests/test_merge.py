"""A merged folder is an ordinary model: plain transformers loads it and answers as base and adapter do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fasttrain.errors import UserError
from fasttrain.merge import merge


def train(model: Path, pairs: Path, output: Path, *settings: str) -> Path:
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    raw = {
        "model": {"name": str(model)},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(pairs), "workers": 0},
        "train": {
            "output": str(output), "max_steps": 2, "pairs_per_step": 4, "learning_rate": 1e-2, "warmup_ratio": 0.0,
            "schedule": "constant", "tokens_per_pack": 200, "gradient_checkpointing": False,
        },
        "track": [],
    }  # fmt: skip
    return train_dpo(config_from_dict(raw, settings)).folder


def load(folder: Path, vision: bool) -> Any:
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    loader: Any = LlavaForConditionalGeneration if vision else AutoModelForCausalLM
    return loader.from_pretrained(folder).eval()


@torch.no_grad()
def answers(model: Any, vision: bool) -> tuple[torch.Tensor, list[int]]:
    """Logits of a fixed prompt and its greedy continuation."""
    ids = torch.arange(9, 30)[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if vision:
        image = torch.full((1, model.config.image_seq_length), model.config.image_token_id)
        inputs["input_ids"] = torch.cat([image, ids], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        side = model.config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    logits = model(**inputs).logits[0]
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    return logits, written[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("vision", [False, True])
def test_a_merged_adapter_answers_as_base_and_adapter_do(
    vision: bool, tiny_text: Path, tiny_llava: Path, text_pairs: Callable[..., Path], vision_pairs: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    from peft import PeftModel
    from transformers import AutoProcessor, AutoTokenizer

    base = tiny_llava if vision else tiny_text
    pairs = vision_pairs(tmp_path / "data", 6) if vision else text_pairs(tmp_path / "pairs.jsonl", 6)
    run = train(base, pairs, tmp_path / "run", f"model.train_projector={str(vision).lower()}")
    merged = merge(run, tmp_path / "merged")
    logits, written = answers(load(merged, vision), vision)
    expected, answer = answers(PeftModel.from_pretrained(load(base, vision), run / "final").eval(), vision)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert written == answer
    untouched, _ = answers(load(base, vision), vision)
    assert not torch.allclose(logits, untouched, atol=1e-3)  # the adapter does something
    assert not list(merged.glob("adapter*")) and (merged / "config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    if vision:
        assert AutoProcessor.from_pretrained(merged, backend="pil").image_processor is not None
    direct = merge(run / "final", tmp_path / "direct")  # an adapter folder names its base itself
    torch.testing.assert_close(answers(load(direct, vision), vision)[0], logits)


def tied(base: Path, folder: Path, vision: bool) -> Path:
    """The model with its head tied to the input embedding, and the configuration saying so at every level."""
    shutil.copytree(base, folder)
    model = load(base, vision)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("vision", [False, True])
def test_a_head_tied_to_an_adapted_embedding_stays_where_it_was(
    vision: bool, tiny_text: Path, tiny_llava: Path, text_pairs: Callable[..., Path], vision_pairs: Callable[..., Path],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from peft import PeftModel

    base = tied(tiny_llava if vision else tiny_text, tmp_path / "base", vision)
    pairs = vision_pairs(tmp_path / "data", 6) if vision else text_pairs(tmp_path / "pairs.jsonl", 6)
    run = train(base, pairs, tmp_path / "run", r"lora.targets=.*layers.*\.q_proj|.*\.embed_tokens")
    model = load(merge(run, tmp_path / "merged"), vision)
    logits, written = answers(model, vision)
    expected, answer = answers(PeftModel.from_pretrained(load(base, vision), run / "final").eval(), vision)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert written == answer
    assert "the merged model has them apart" in capsys.readouterr().err
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert not torch.allclose(*ends, atol=1e-3)  # the adapter is on the embedding
    assert not (model.config.tie_word_embeddings or model.config.get_text_config().tie_word_embeddings)


def test_a_head_and_an_embedding_trained_as_one_stay_tied(tiny_text: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = tied(tiny_text, tmp_path / "base", vision=False)
    about = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True, task_type="CAUSAL_LM"
    )  # fmt: skip
    adapted = get_peft_model(load(base, False), about)
    with torch.no_grad():
        adapted.get_input_embeddings().weight.add_(
            0.1 * torch.randn(adapted.get_input_embeddings().weight.shape)
        )
    adapted.save_pretrained(tmp_path / "adapter")
    model = load(merge(tmp_path / "adapter", tmp_path / "merged"), False)
    expected, answer = answers(
        PeftModel.from_pretrained(load(base, False), tmp_path / "adapter").eval(), False
    )
    logits, written = answers(model, False)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert written == answer and model.config.tie_word_embeddings


def quantised(base: Path, folder: Path) -> Path:
    """The model with nf4 weights in its own files."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    AutoModelForCausalLM.from_pretrained(base, quantization_config=how, device_map="cpu").save_pretrained(
        folder
    )
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_adapter_over_weights_that_are_quantised_in_their_files_is_merged_into_their_values(
    tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pytest.importorskip("bitsandbytes")
    base, pairs = quantised(tiny_text, tmp_path / "base"), text_pairs(tmp_path / "pairs.jsonl", 6)
    run = train(base, pairs, tmp_path / "run")
    logits, _ = answers(load(merge(run, tmp_path / "merged"), False), False)
    widened = AutoModelForCausalLM.from_pretrained(base).dequantize()
    expected, _ = answers(PeftModel.from_pretrained(widened, run / "final").eval(), False)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with pytest.raises(
        UserError, match=r"lora: wanted a LoRA section with .*, whose files hold quantised weights"
    ):
        train(base, pairs, tmp_path / "whole", "lora=null")
    with pytest.raises(UserError, match=r"distributed.zero_stage: wanted 2 with model.quantize nf4"):
        train(base, pairs, tmp_path / "sharded", "distributed.zero_stage=3")


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="videos are read where it is there"
)
def test_video_settings_are_kept_where_videos_cannot_be_read(
    tiny_models: ModuleType, tiny_families: ModuleType, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    base = tiny_families.save(tiny_models, tmp_path / "base", "Qwen2.5-VL")
    videos = {"max_frames": 768, "video_processor_type": "Qwen2VLVideoProcessor"}
    settings = json.loads((base / "processor_config.json").read_text()) | {"video_processor": videos}
    (base / "processor_config.json").write_text(json.dumps(settings))
    (base / "video_preprocessor_config.json").write_text(json.dumps(videos))
    model = AutoModelForImageTextToText.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    merged = merge(tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((merged / "video_preprocessor_config.json").read_text()) == videos
    assert json.loads((merged / "processor_config.json").read_text())["video_processor"] == videos


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # it tells so when the adapter is made
def test_an_adapter_that_peft_cannot_merge_is_one_line(tiny_text: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    get_peft_model(load(tiny_text, False), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"RUN: wanted an adapter that peft can merge, got .*lora_bias"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_fully_tuned_run_is_merged_by_copying_it(
    tiny_text: Path, text_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    run = train(tiny_text, text_pairs(tmp_path / "pairs.jsonl", 6), tmp_path / "run", "lora=null")
    (tmp_path / ".merged.4194399.tmp").mkdir()  # left by a kill; beyond the largest process id
    merged = merge(run, tmp_path / "merged")
    assert not (tmp_path / ".merged.4194399.tmp").exists()
    torch.testing.assert_close(
        answers(load(merged, False), False)[0], answers(load(run / "final", False), False)[0]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ([], "no such folder"),
        (["run/"], r"wanted a run with final/, or a folder with adapter_config.json"),
        (["run/checkpoints/"], r"wanted a finished run with final/"),
        (
            ["run/final/adapter_config.json"],
            "wanted a folder with adapter_config.json and adapter_model.safetensors",
        ),
    ],
)
def test_what_cannot_be_merged_is_one_line(make: list[str], message: str, tmp_path: Path) -> None:
    for name in make:
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text("{}")
    with pytest.raises(UserError, match=message):
        merge(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_told_before_the_model_is_loaded(
    tmp_path: Path, tiny_text: Path, tiny_models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny_models.build_adapter(tiny_text, tmp_path / "adapter", b_std=0.1)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("fasttrain.merge.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"-o: cannot make .*file/out: Not a directory"):
        merge(adapter, tmp_path / "file" / "out")


def test_a_folder_in_use_is_not_written_over(tmp_path: Path, tiny_text: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="wanted a new or empty folder"):
        merge(tiny_text, tmp_path / "out")
