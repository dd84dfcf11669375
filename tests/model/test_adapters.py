"""Adapters to start from: what they hold is used, what they lack or fasttrain cannot run is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.errors import UserError


@pytest.fixture
def adapter(tiny_models: Any, tmp_path: Path) -> Callable[..., Path]:
    """A LoRA on q_proj and v_proj with every trained weight moved away from where peft starts it."""

    def build(base: Path, **options: Any) -> Path:
        import peft
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        vision = hasattr(AutoConfig.from_pretrained(base), "vision_config")
        auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        adapted = peft.get_peft_model(auto.from_pretrained(base), peft.LoraConfig(**settings | options))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return build


@pytest.fixture
def train(
    tmp_path: Path, text_pairs: Callable[..., Path], vision_pairs: Callable[..., Path]
) -> Callable[..., Any]:
    def run(model: Path, start: Path, *settings: str, vision: bool = False) -> Any:
        from fasttrain import train_dpo
        from fasttrain.config import config_from_dict

        pairs = vision_pairs(tmp_path / "vision", 8) if vision else text_pairs(tmp_path / "pairs.jsonl", 8)
        raw = {
            "model": {"name": str(model)},
            "lora": {"init_from": str(start)},
            "data": {"train": str(pairs), "workers": 0},
            "train": {
                "output": str(tmp_path / "run"), "max_steps": 2, "pairs_per_step": 100, "learning_rate": 1e-2,
                "warmup_ratio": 0.0, "schedule": "constant",
            },
            "track": [],
        }  # fmt: skip
        return train_dpo(config_from_dict(raw, settings), overwrite=True)

    return run


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("error::FutureWarning")
def test_what_packages_tell_each_other_about_a_new_adapter_is_not_told_on(
    tiny_text: Path, train: Callable[..., Any]
) -> None:
    assert train(tiny_text, Path("none"), "lora.init_from=null").metrics


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_the_head_is_refused_not_ignored(
    tiny_text: Path, adapter: Callable[..., Path], train: Callable[..., Any], options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"lora.init_from: wanted layers below the head, got the head too"):
        train(tiny_text, adapter(tiny_text, **options))


def test_an_adapter_of_another_model_is_refused_not_drawn_anew(
    tiny_text: Path, tiny_llava: Path, tiny_models: Any, adapter: Callable[..., Path], train: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    start = adapter(tiny_text)
    deeper = tiny_models.build_text(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(
        UserError, match=r"got none in .*adapter for .*layers.2.self_attn.*\(4 weights in all"
    ):
        train(deeper, start)
    with pytest.raises(UserError, match=r"lora.init_from: wanted an adapter of this model, got none in"):
        train(tiny_llava, start, vision=True)
    narrower = tiny_models.build_text(tmp_path / "narrower", hidden_size=32)
    with pytest.raises(UserError, match=r"lora.init_from: .* does not fit the model: .*size mismatch"):
        train(narrower, start)


@pytest.mark.parametrize("damage", ["json", "deep json", "type", "rank", "modules", "weights"])
def test_a_damaged_adapter_is_one_line(
    tiny_text: Path, adapter: Callable[..., Path], train: Callable[..., Any], damage: str
) -> None:
    start = adapter(tiny_text)
    about, weights = start / "adapter_config.json", start / "adapter_model.safetensors"
    if damage == "json":
        about.write_text("{nope")
    elif damage == "deep json":
        about.write_text("[" * 100_000)
    elif damage != "weights":
        change = {"type": {"peft_type": "NOPE"}, "rank": {"r": "3"}, "modules": {"modules_to_save": 7}}[
            damage
        ]
        about.write_text(json.dumps(json.loads(about.read_text()) | change))
    else:
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"lora.init_from: "):
        train(tiny_text, start)


@pytest.mark.parametrize("trained", [False, True])
def test_a_projector_in_the_adapter_trains_only_if_the_recipe_says_so(
    tiny_llava: Path, adapter: Callable[..., Path], train: Callable[..., Any], trained: bool
) -> None:
    start = adapter(tiny_llava, modules_to_save=["multi_modal_projector"])
    settings = ["model.train_projector=true", "train.projector_learning_rate=1e-2"] if trained else []
    result = train(tiny_llava, start, *settings, vision=True)
    before, after = weights_of(start), weights_of(result.adapter)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("projector" in name for name in moved) == trained
    assert all(name in moved for name in before if "lora_B" in name and "language_model" in name)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_projector_beside_nf4_weights_stays_whole(
    tiny_llava: Path, adapter: Callable[..., Path], train: Callable[..., Any]
) -> None:
    """Where it trains, where an adapter goes on that holds one, and where that answers."""
    pytest.importorskip("bitsandbytes")
    from fasttrain.answering.local import LocalModel
    from fasttrain.config import ModelConfig

    start, nf4 = adapter(tiny_llava, modules_to_save=["multi_modal_projector"]), "model.quantize=nf4"
    before, found = weights_of(start), {}
    for trained in (False, True):
        settings = ["model.train_projector=true", "train.projector_learning_rate=1e-2"] if trained else []
        result = train(tiny_llava, start, nf4, *settings, vision=True)
        assert result.metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
        found[trained] = weights_of(result.adapter)
        moved = {name for name in before if not torch.equal(before[name], found[trained][name])}
        assert any("projector" in name for name in moved) == trained
        assert any("language_model" in name for name in moved)
    model = LocalModel(ModelConfig(name=str(tiny_llava), quantize="nf4"), result.adapter).generator.model
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["model.language_model.layers.0.mlp.up_proj"] == "Linear4bit"
    assert (
        kinds["lm_head"] == kinds["model.multi_modal_projector.modules_to_save.default.linear_1"] == "Linear"
    )
    used = model.model.multi_modal_projector.modules_to_save["default"].linear_1.weight
    held = next(value for name, value in found[True].items() if "linear_1.weight" in name)
    torch.testing.assert_close(used.data, held, rtol=0, atol=0)


def test_dora_and_rank_stabilised_adapters_go_on_as_what_they_are(
    tiny_text: Path, adapter: Callable[..., Path], train: Callable[..., Any], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start = adapter(tiny_text, use_dora=True, use_rslora=True)
    result = train(tiny_text, start)
    assert result.metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    before, after = weights_of(start), weights_of(result.adapter)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_text), result.adapter)
    assert loaded.peft_config["default"].use_dora and loaded.peft_config["default"].use_rslora


@pytest.mark.parametrize(
    "options", [{"alora_invocation_tokens": [4]}, {"layer_replication": [[0, 2], [1, 2]]}, {"init_lora_weights": "pissa_niter_4"}],
    ids=str,
)  # fmt: skip
def test_adapters_that_would_run_as_another_function_are_refused(
    tiny_text: Path, adapter: Callable[..., Path], train: Callable[..., Any], options: dict[str, Any]
) -> None:
    name, wanted = next(iter(options)), "wanted an adapter (without|over)"
    with pytest.raises(UserError, match=rf"^lora.init_from: {wanted} .*{name}"):
        train(tiny_text, adapter(tiny_text, **options))


def test_an_adapter_on_fused_experts_alone_is_gone_on_with(
    tiny_models: Any, adapter: Callable[..., Path], train: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny_models.build_mixture(tmp_path / "mixture")
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    start = adapter(base, target_modules=[], target_parameters=experts)
    before, after = weights_of(start), weights_of(train(base, start).adapter)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft tells that it saves the embedding
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids=str)
def test_embeddings_that_an_adapter_brings_with_it_are_in_final_too(
    targets: list[str], tiny_text: Path, train: Callable[..., Any], tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    ids = torch.arange(9, 40)[None]

    def logits(folder: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tiny_text)
        with torch.no_grad():
            return peft.PeftModel.from_pretrained(base, folder).eval()(ids).logits

    model = AutoModelForCausalLM.from_pretrained(tiny_text)
    about = peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.3)
    peft.get_peft_model(model, about).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    result = train(tiny_text, tmp_path / "adapter", "train.learning_rate=1e-9")
    torch.testing.assert_close(logits(result.adapter), logits(tmp_path / "adapter"), rtol=1e-4, atol=1e-4)


def test_final_names_the_hub_model_not_a_folder_of_this_machine(
    tiny_text: Path, adapter: Callable[..., Path], train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    import fasttrain.train.job as job

    snapshot = tmp_path / "snapshots" / "0123"
    shutil.copytree(tiny_text, snapshot)
    monkeypatch.setattr(job, "find_folder", lambda config: snapshot)
    result = train(Path("someone/model"), adapter(tiny_text), "model.revision=v2")
    about = json.loads((result.adapter / "adapter_config.json").read_text())
    assert (about["base_model_name_or_path"], about["revision"]) == ("someone/model", "v2")


def test_an_adapter_on_the_projector_trains_at_the_adapters_rate(
    tiny_llava: Path, adapter: Callable[..., Path], train: Callable[..., Any]
) -> None:
    """AdamW's first two steps move what has a gradient by about the rate each."""
    start = adapter(tiny_llava, target_modules=["q_proj", "linear_1"])
    result = train(tiny_llava, start, vision=True)
    before, after = weights_of(start), weights_of(result.adapter)
    (projector,) = (name for name in before if "projector" in name and "lora_B" in name)
    assert (after[projector] - before[projector]).abs().max() > 5e-3


def test_all_that_trains_with_an_adapter_is_planned(
    tiny_text: Path, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    from fasttrain.config import config_from_dict
    from fasttrain.plan.planned_model import build_planned_model

    start = adapter(tiny_text, modules_to_save=["embed_tokens"], rank_pattern={"q_proj": 7}, use_dora=True)
    raw = {"model": {"name": str(tiny_text)}, "lora": {"init_from": str(start)}, "data": {"train": "none"}}
    config = AutoConfig.from_pretrained(tiny_text)
    planned = build_planned_model(config_from_dict(raw), config, torch.float32)
    assert planned.weights.trained == sum(value.numel() for value in weights_of(start).values())


def test_layers_whose_adapter_peft_could_not_load_again_are_refused(tiny_models: Any) -> None:
    import transformers

    from fasttrain.config import LoraConfig
    from fasttrain.model.head import install_head
    from fasttrain.model.lora import attach_lora

    tokenizer = tiny_models.build_tokenizer(tiny_models.CHATML, eos="<|im_end|>")
    text = tiny_models.language_config(tokenizer, num_key_value_heads=4, mlp_layer_types=["dense", "sparse"])
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(
            transformers.DeepseekOcr2Config(text_config=text)
        )
    install_head(model)
    with pytest.raises(UserError, match=r"lora\.targets: wanted layers .* got down_proj, .* by another name"):
        attach_lora(model, LoraConfig(rank=2, alpha=4, targets="auto"), False)


def test_a_quantised_projector_is_not_trained(tiny_llava: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    from fasttrain.config import LoraConfig
    from fasttrain.model.head import install_head
    from fasttrain.model.lora import attach_lora

    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    install_head(model)
    packed = torch.zeros(1024, 1, dtype=torch.uint8)  # as bitsandbytes writes two values a byte
    model.model.multi_modal_projector.linear_1.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(UserError, match=r"model\.train_projector: wanted false with a projector that"):
        attach_lora(model, LoraConfig(rank=2, alpha=4), True)


def _laguna() -> Any:
    """A mixture whose shared experts peft renames when it loads an adapter."""
    from transformers import LagunaConfig, LagunaForCausalLM

    from fasttrain.model.head import install_head

    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4}
    model = LagunaForCausalLM(
        LagunaConfig(
            **sizes, **heads, vocab_size=50, shared_expert_intermediate_size=24, num_experts_per_tok=2
        )
    )
    install_head(model)
    return model


def _mistral_large() -> Any:
    """One that does so with images, and whose first layer has no shared experts."""
    from transformers import AutoModelForImageTextToText, MistralLarge4Config

    from fasttrain.model.head import install_head

    text = {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50,
        "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "index_head_dim": 8, "index_n_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "pixtral", "head_dim": 8}
    config = MistralLarge4Config(text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    install_head(model)
    return model


@pytest.mark.parametrize("build", [_laguna, _mistral_large])
def test_a_fresh_adapter_is_on_layers_that_peft_finds_again(
    build: Callable[[], Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    import peft

    from fasttrain.config import LoraConfig
    from fasttrain.model import lora

    adapted = lora.attach_lora(build(), LoraConfig(rank=2, alpha=4), False)
    assert any("o_proj.lora_A" in name for name, _ in adapted.named_parameters())
    adapted.save_pretrained(tmp_path)
    recwarn.clear()
    peft.PeftModel.from_pretrained(build(), tmp_path)
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
    named = LoraConfig(rank=2, alpha=4, targets=["gate_proj", "up_proj"])
    wanted = r"lora.targets: wanted layers whose adapters peft can load again, got gate_proj, up_proj of"
    with pytest.raises(UserError, match=wanted):
        lora.attach_lora(build(), named, False)


def test_linears_that_compute_something_else_get_no_adapter_of_themselves() -> None:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    from fasttrain.model.lora import auto_targets

    sizes = {
        "hidden_size": 32,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "q_lora_rank": 8,
    }
    heads = {
        "num_attention_heads": 4,
        "o_groups": 2,
        "o_lora_rank": 8,
        "n_routed_experts": 4,
        "vocab_size": 50,
    }
    index = {"index_n_heads": 2, "index_head_dim": 16, "num_experts_per_tok": 2}
    targets = auto_targets(DeepseekV4ForCausalLM(DeepseekV4Config(**sizes, **heads, **index)))
    assert "o_a_proj" not in targets and "o_b_proj" in targets
