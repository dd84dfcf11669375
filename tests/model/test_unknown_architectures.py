"""Architectures that nobody has seen: sharing is compared with ordinary sequences at the start, and given up where it changes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# A Llama with attention of its own in one layer, beside whatever attention function is set: it sees all that came before in
# the pass, other answers and other prompts too, or does so only beyond `leaks_from` tokens.
CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class LeakyConfig(LlamaConfig):
    model_type = "leaky"

    def __init__(self, leaky_layer=0, leaks_from=0, **options):
        self.leaky_layer, self.leaks_from = leaky_layer, leaks_from
        super().__init__(**options)


class Mixer(torch.nn.Module):
    def __init__(self, inner, config):
        super().__init__()
        self.inner, self.leaks_from = inner, config.leaks_from

    def forward(self, hidden_states, **options):
        out, weights = self.inner(hidden_states=hidden_states, **options)
        before = hidden_states.cumsum(1).roll(self.leaks_from, 1)
        seen = torch.arange(hidden_states.shape[1], device=hidden_states.device) >= self.leaks_from
        return out + 0.05 * before * seen[None, :, None], weights


class LeakyForCausalLM(LlamaForCausalLM):
    config_class = LeakyConfig

    def __init__(self, config):
        super().__init__(config)
        layer = self.model.layers[config.leaky_layer]
        layer.self_attn = Mixer(layer.self_attn, config)
"""


def test_models_whose_image_tokens_see_each_other_by_masks_of_their_own_do_not_share() -> None:
    from types import SimpleNamespace

    from transformers import Gemma4TextConfig, Molmo2Config

    from fasttrain.model.attention import why_unshared

    for config, sees in (
        (Gemma4TextConfig(use_bidirectional_attention="vision"), True),
        (Gemma4TextConfig(), False),
        (Molmo2Config(), True),
    ):
        config.allow_global_per_layer_attribute_access = True
        reason = why_unshared(SimpleNamespace(config=config, _supports_attention_backend=True), 100)
        assert (reason == "an image's tokens see each other in it") is sees, reason


def test_batch_norms_keep_their_statistics_in_training() -> None:
    """What an image's features are must not depend on the images that share its pack."""
    import torch

    from fasttrain.model.silence import silence_dropout

    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5))
    silence_dropout(tower)
    images = torch.randn(2, 3, 5, 5)
    alone = tower.eval()(images[:1])
    together = tower.train()(images)
    torch.testing.assert_close(together[:1], alone)
    assert tower[1].num_batches_tracked == 0


@pytest.fixture
def leaky(tiny_models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")

    def build(**settings: int) -> Path:
        folder = tmp_path / "leaky"
        namespace: dict[str, Any] = {"__name__": "modeling_leaky"}
        exec(CODE, namespace)
        tokenizer = tiny_models.build_tokenizer(tiny_models.CHATML, eos="<|im_end|>")
        config = namespace["LeakyConfig"](**tiny_models.language_config(tokenizer), **settings)
        tiny_models.draw_weights(namespace["LeakyForCausalLM"](config), 3).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "modeling_leaky.py").write_text(CODE)
        about = json.loads((folder / "config.json").read_text())
        about["auto_map"] = {
            "AutoConfig": "modeling_leaky.LeakyConfig", "AutoModelForCausalLM": "modeling_leaky.LeakyForCausalLM",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(about))
        return folder

    return build


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"leaky_layer": 0}, False),
        ({"leaky_layer": 1}, False),  # the last layer only
        ({"leaky_layer": 1, "leaks_from": 60}, False),  # long sequences only
        ({"leaky_layer": 1, "leaks_from": 4000}, True),  # never, in this data
    ],
    ids=str,
)
def test_an_architecture_that_leaks_between_answers_is_told_and_run_unshared(
    settings: dict[str, int], shares: bool, leaky: Callable[..., Path], text_pairs: Callable[..., Path], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    pairs = text_pairs(tmp_path / "pairs.jsonl", 12, turns=(1, 3))
    raw = {
        "model": {"name": str(leaky(**settings)), "trust_remote_code": True},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(pairs)},
        "train": {"output": str(tmp_path / "run"), "max_steps": 1, "pairs_per_step": 12},
        "track": [],
    }
    (first,) = train_dpo(config_from_dict(raw), overwrite=True).metrics
    told = "warning: sharing prefixes changes the log-probs of LeakyForCausalLM" in capfd.readouterr().err
    assert told != shares
    (ordinary,) = train_dpo(config_from_dict(raw, ["train.share_prefix=false"]), overwrite=True).metrics
    assert (first["tokens"] < ordinary["tokens"]) == shares
    assert first["grad_norm"] == pytest.approx(ordinary["grad_norm"], rel=5e-5)
    assert first["logps/chosen"] == pytest.approx(ordinary["logps/chosen"], rel=1e-5)


def test_a_model_whose_own_code_fails_is_one_line(tiny_models: ModuleType) -> None:
    """Llama 4's with images in transformers 5.24, for one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fasttrain.errors import UserError
    from fasttrain.model.head import check_head, install_head

    def fails(**inputs: Any) -> None:
        raise AttributeError("'Output' object\nhas no 'image_outputs'")

    tokenizer = tiny_models.build_tokenizer(tiny_models.CHATML, eos="<|im_end|>")
    model = LlamaForCausalLM(LlamaConfig(**tiny_models.language_config(tokenizer)))
    head = install_head(model)
    model.forward = fails
    wanted = r"LlamaForCausalLM, as .* has it, fails on a text: AttributeError: 'Output' object has no 'image_outputs'$"
    with pytest.raises(UserError, match=wanted):
        check_head(model, head, torch.device("cpu"))


def test_a_model_that_makes_other_hidden_states_than_one_a_token_is_one_line(
    tiny_models: ModuleType,
) -> None:
    """DiffusionGemma's makes those of a canvas of answers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fasttrain.errors import UserError
    from fasttrain.model.head import check_head, install_head

    tokenizer = tiny_models.build_tokenizer(tiny_models.CHATML, eos="<|im_end|>")
    model = LlamaForCausalLM(LlamaConfig(**tiny_models.language_config(tokenizer)))
    head, run = install_head(model), model.model.forward

    def twice(**inputs: Any) -> Any:
        out = run(**inputs)
        out.last_hidden_state = out.last_hidden_state.repeat(1, 2, 1)
        return out

    model.model.forward = twice
    with pytest.raises(
        UserError, match="LlamaForCausalLM computes its logits in a way fasttrain does not know"
    ):
        check_head(model, head, torch.device("cpu"))


def test_a_multiplier_below_a_softcap_is_the_models_own(tiny_models: ModuleType) -> None:
    """Muse Glimmer's."""
    import torch
    from transformers import AutoModelForImageTextToText, MuseGlimmerConfig

    from fasttrain.model.head import check_head, install_head

    tokenizer = tiny_models.build_tokenizer(tiny_models.CHATML, eos="<|im_end|>")
    text = tiny_models.language_config(
        tokenizer, head_dim=16, layer_rope_theta=[1e4, 0], final_logit_softcapping=3.0, output_multiplier=0.3
    )
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MuseGlimmerConfig(text_config=text, vision_config=vision, out_hidden_size=128)
    model = tiny_models.draw_weights(AutoModelForImageTextToText.from_config(config), 1)
    head = install_head(model)
    check_head(model, head, torch.device("cpu"))
    assert (head.softcap, head.logit_scale) == (3.0, 0.3)
