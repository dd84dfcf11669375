"""nf4: linears that take an image's patches stay whole, as pixels are cast to their weights' type; what stays whole besides is told."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from fasttrain.config import ModelConfig
from fasttrain.data.images import PixelMaker
from fasttrain.errors import UserError
from fasttrain.model.load import load_model, load_model_config, load_processor

pytest.importorskip("bitsandbytes")


def png(tmp_path: Path) -> bytes:
    picture = Image.linear_gradient("L").resize((60, 40))
    Image.merge("RGB", [picture, picture.rotate(180), picture.rotate(90)]).save(tmp_path / "x.png")
    return (tmp_path / "x.png").read_bytes()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["Cosmos 3 Edge", "Ernie 4.5 VL", "Qwen2.5-VL"])
def test_a_quantised_tower_sees_images_as_the_whole_one_does(
    family: str, tiny_families: ModuleType, tiny_models: ModuleType, tmp_path: Path
) -> None:
    folder = tiny_families.save(tiny_models, tmp_path, family)
    features = []
    for quantize in (None, "nf4"):
        config = ModelConfig(name=str(folder), quantize=quantize)
        known = load_model_config(folder, config)
        model = load_model(folder, config, known, torch.device("cpu"))
        pixels = PixelMaker(load_processor(folder, config, True))([png(tmp_path)])
        with torch.no_grad():
            found = model.base_model.get_image_features(**pixels).pooler_output
        features.append(torch.cat(list(found)).flatten())
    assert torch.cosine_similarity(*features, dim=0) > 0.9


def test_files_that_hold_such_a_linear_quantised_are_refused(
    tiny_families: ModuleType, tiny_models: ModuleType, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    folder = tiny_families.save(tiny_models, tmp_path, "Cosmos 3 Edge")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForImageTextToText.from_pretrained(folder, quantization_config=nf4).save_pretrained(folder)
    config = ModelConfig(name=str(folder))
    with pytest.raises(
        UserError, match=r"wanted model\.visual\.embeddings\.patch_embedding, .* got torch\.uint8"
    ):
        load_model(folder, config, load_model_config(folder, config), torch.device("cpu"))


def test_a_model_without_linears_of_the_plain_class_is_not_quantised(
    tiny_models: ModuleType, tmp_path: Path
) -> None:
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    FalconForCausalLM(FalconConfig(**sizes)).save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), quantize="nf4")
    with pytest.raises(UserError, match=r"wanted null for FalconForCausalLM, which has no linear"):
        load_model(tmp_path, config, load_model_config(tmp_path, config), torch.device("cpu"))


def test_experts_that_stay_whole_are_told(
    tiny_models: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40}  # fmt: skip
    MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=64, num_local_experts=4)).save_pretrained(
        tmp_path
    )
    config = ModelConfig(name=str(tmp_path), quantize="nf4")
    load_model(tmp_path, config, load_model_config(tmp_path, config), torch.device("cpu"))
    experts = 4 * 3 * 64 * 64 + 4 * 64  # and their router
    assert (
        f"note: model.quantize: {4 * 64 * 64:,} weights are quantised, {experts + 3 * 64:,} beside the embeddings stay whole"
        in capsys.readouterr().err
    )
