"""Text model families with their real classes: shared prompts give the ordinary sequences' losses, or a warning says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 112}
# sizes by the names of GPT-2's successors
OWN_WORDS = {"n_embd": 64, "n_layer": 2, "n_head": 4}

# model class prefix -> changes to the common configuration, and a part of the warning where it cannot share
FAMILIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "Llama": ({"tie_word_embeddings": True}, None),
    "Qwen2": ({}, None),
    "Qwen3": ({"head_dim": 16}, None),
    "Mistral": ({"sliding_window": 4096}, None),
    "Mistral of a short window": ({"sliding_window": 11}, None),
    "Qwen2 of a short window": (
        {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1},
        None,
    ),
    "Gemma3 text": (
        {"head_dim": 16, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
        None,
    ),
    "Gemma": ({"head_dim": 16}, None),
    "Phi3": ({}, None),
    "Phi": ({"partial_rotary_factor": 0.5}, None),
    "Olmo": ({"clip_qkv": 0.5}, None),
    "Glm": ({"head_dim": 16}, None),
    "Olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, None),
    "Granite": ({"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3}, None),
    "HyperCLOVAX": ({"logits_scaling": 3.0, "head_dim": 16}, None),
    "Cohere": ({"logit_scale": 0.25}, None),
    "Mixtral": ({"num_local_experts": 4}, None),
    "Qwen3Moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
        None,
    ),
    "GPTNeoX": ({}, None),
    "OPT": ({"word_embed_proj_dim": 64, "ffn_dim": 112}, None),
    "GPT2": (OWN_WORDS, None),
    "Gemma2": ({"head_dim": 16, "attn_logit_softcapping": 2.0, "sliding_window": 12}, None),
    "Phi3 longrope": (
        {
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
            },
        },
        "its longrope position scaling depends on the longest sequence",
    ),
    "Gemma3 text of two scalings": (
        {
            "head_dim": 16,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": 256,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "original_max_position_embeddings": 32,
                    "short_factor": [1.0] * 8,
                    "long_factor": [4.0] * 8,
                },
            },
        },
        "its longrope position scaling depends on the longest sequence",
    ),
    "GptOss": ({"head_dim": 16, "num_local_experts": 4, "sliding_window": 14}, None),
    "Gemma3n": (
        {
            "head_dim": 16,
            "sliding_window": 13,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "intermediate_size": 112,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
        None,
    ),
    "Gemma4": (
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "sliding_window": 13,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
        },
        None,
    ),
    "Olmo2": ({}, None),
    "SmolLM3": ({"no_rope_layers": [1, 0]}, None),
    "Glm4": ({"head_dim": 16}, None),
    "DeepseekV3": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        None,
    ),
    "Phimoe": ({"num_local_experts": 4, "router_jitter_noise": 0.01, "input_jitter_noise": 0.1}, None),
    "Llama4": (
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "intermediate_size_mlp": 112,
            "attention_chunk_size": 14,
            "layer_types": ["chunked_attention", "full_attention"],
            "moe_layers": [0],
            "no_rope_layers": [1, 0],
        },
        "it has layers of type chunked_attention",
    ),
    "Nemotron": ({"head_dim": 16}, "NemotronAttention is not told which tokens belong together"),
    "Falcon": ({}, "does not take attention functions"),
    "FalconH1": (
        {
            "lm_head_multiplier": 0.5,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
            "head_dim": 16,
        },
        "it has layers of type hybrid",
    ),
    "Mamba": ({"state_size": 4}, "it has layers of type linear_attention"),
    "Qwen3Next": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        "it has layers of type linear_attention",
    ),
    "Olmo3": ({"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]}, None),
    "Starcoder2": ({"sliding_window": 11}, None),
    "Ernie4_5": ({"head_dim": 16}, None),
    "HunYuanDenseV1": ({"head_dim": 16}, None),
    "Glm4Moe": (
        {
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        None,
    ),
    "Cohere2": (
        {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 0.25},
        None,
    ),
    "Apertus": ({}, None),
    "SeedOss": ({"head_dim": 16}, None),
    "Arcee": ({}, None),
    "BitNet": ({}, None),
    "GPTJ": ({**OWN_WORDS, "rotary_dim": 8}, None),
    "GPTBigCode": (OWN_WORDS, None),
    "Persimmon": ({}, None),
    "Helium": ({"head_dim": 16}, None),
    "NanoChat": ({}, None),
    "DiffLlama": ({}, None),
    "Doge": ({}, "DogeAttention asks for attention with a mask or dropout"),
    "StableLm": ({}, "does not take attention functions"),
    "Bloom": ({"n_layer": 2, "n_head": 4, "hidden_size": 64}, "does not take attention functions"),
    "Mpt": (
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2},
        "does not take attention functions",
    ),
    "Lfm2": (
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "it has layers of type conv",
    ),
    "Bamba": (
        {
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
            "attn_layer_indices": [1],
        },
        "it has layers of type linear_attention",
    ),
    "Jamba": (
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
        },
        "it has layers of type linear_attention",
    ),
    "Zamba2": (
        {
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 32,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
        },
        "it has layers of type hybrid, linear_attention",
    ),
    "RecurrentGemma": (
        {"lru_width": 64, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
        "it has layers of type linear_attention",
    ),
    "MiniMax": (
        {
            "num_local_experts": 4,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 16,
        },
        "it has layers of type linear_attention",
    ),
}


@pytest.fixture(scope="module")
def build(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    import transformers

    def make(name: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("family") / name
        family = name.split()[0]
        tokenizer = tiny_models.build_tokenizer(tiny_models.CHATML, eos="<|im_end|>")
        common = tiny_models.language_config(tokenizer)
        named_otherwise = ("GPT2", "GPTJ", "GPTBigCode", "Bloom", "Mpt")
        if name in ("GPTNeoX", "OPT", "Falcon", *named_otherwise):
            ids = {key: value for key, value in common.items() if key.endswith("_id") or key == "vocab_size"}
            common = ids | ({} if name in named_otherwise else SMALL)
        text = (
            "TextConfig"
            if name.startswith("Gemma3 text") or name in ("Gemma3n", "Gemma4", "Llama4")
            else "Config"
        )
        settings = FAMILIES[name][0] if name in FAMILIES else {}
        config = getattr(transformers, f"{family}{text}")(**(common | settings | changes))
        kind = {"GPT2": "GPT2LMHeadModel", "BertGeneration": "BertGenerationDecoder"}.get(
            name, f"{family}ForCausalLM"
        )
        tiny_models.draw_weights(getattr(transformers, kind)(config), 1).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_sharing_prompts_gives_the_losses_of_ordinary_sequences(
    name: str, build: Callable[[str], Path], text_pairs: Callable[..., Path], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    raw = {
        "model": {"name": str(build(name))},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(text_pairs(tmp_path / "pairs.jsonl", 12))},
        "train": {
            "output": str(tmp_path / "run"), "max_steps": 3, "pairs_per_step": 6, "learning_rate": 1e-2,
            "warmup_ratio": 0.0, "schedule": "constant", "tokens_per_pack": 200,
        },
        "track": [],
    }  # fmt: skip
    shared = train_dpo(config_from_dict(raw), overwrite=True).metrics
    warning = FAMILIES[name][1]
    err = capfd.readouterr().err
    assert (warning in err) if warning else ("warning" not in err)
    ordinary = train_dpo(config_from_dict(raw, ["train.share_prefix=false"]), overwrite=True).metrics
    assert shared[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert abs(shared[2]["loss"] - 0.6931472) > 1e-3
    assert (shared[0]["tokens"] < ordinary[0]["tokens"]) == (warning is None)
    for a, b in zip(shared, ordinary):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=5e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "rate"), [("Falcon", "hidden_dropout"), ("Persimmon", "attention_dropout")])
def test_dropout_that_layers_ask_the_configuration_for_is_silent_and_saved_as_it_was(
    name: str, rate: str, build: Callable[..., Path], text_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    found = []
    for model in (build(name, **{rate: 0.4}), build(name, **{rate: 0.0})):
        raw = {
            "model": {"name": str(model)},
            "lora": None,
            "data": {"train": str(text_pairs(tmp_path / "pairs.jsonl", 4))},
            "train": {"output": str(tmp_path / "run"), "max_steps": 2, "pairs_per_step": 4},
            "track": [],
        }  # fmt: skip
        result = train_dpo(config_from_dict(raw), overwrite=True)
        found.append([line["loss"] for line in result.metrics])
        saved = json.loads((result.adapter / "config.json").read_text())
        assert saved[rate] == json.loads((model / "config.json").read_text())[rate]
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_hidden_states_of_fp32_meet_a_head_of_bf16(
    build: Callable[[str], Path], text_pairs: Callable[..., Path], tmp_path: Path
) -> None:
    """Mamba keeps its residual stream in fp32 and hands it to the head so, whatever type its weights have."""
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    raw = {
        "model": {"name": str(build("Mamba"))},
        "lora": {"rank": 4},
        "data": {"train": str(text_pairs(tmp_path / "pairs.jsonl", 4))},
        "train": {"output": str(tmp_path / "run"), "max_steps": 1, "pairs_per_step": 4},
        "track": [],
    }  # fmt: skip
    (whole,) = train_dpo(config_from_dict(raw)).metrics
    (half,) = train_dpo(config_from_dict(raw, ["model.dtype=bfloat16"]), overwrite=True).metrics
    assert half["logps/chosen"] == pytest.approx(whole["logps/chosen"], rel=0.01)
    assert half["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("BertGeneration", {"is_decoder": False}, "BertGenerationDecoder, in which a token sees what"),
        ("RemBert", {"is_decoder": True, "num_hidden_layers": 1}, "RemBertForCausalLM computes its logits in a way"),
    ],
)  # fmt: skip
def test_a_model_that_sees_ahead_or_has_another_head_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, build: Callable[..., Path], text_pairs: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict
    from fasttrain.errors import UserError

    pairs = text_pairs(tmp_path / "pairs.jsonl", 2)
    raw = {
        "model": {"name": str(build(name, **changes))},
        "data": {"train": str(pairs)},
        "train": {"output": str(tmp_path / "run")},
    }
    with pytest.raises(UserError, match=rf"model.name: .*{message}"):
        train_dpo(config_from_dict(raw))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("GPT2", {"n_positions": 40}, "it has 40 positions"),
        ("OPT", {"max_position_embeddings": 40}, "it has 40 positions"),
        (
            "Llama",
            {
                "max_position_embeddings": 40,
                "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            },
            "beyond 40 tokens its dynamic position scaling depends on the sequences that ran before",
        ),
    ],
)
@pytest.mark.parametrize("share", ["true", "false"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
def test_sequences_beyond_a_models_positions_are_refused(
    name: str, changes: dict[str, Any], message: str, share: str, build: Callable[..., Path],
    text_pairs: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict
    from fasttrain.errors import UserError

    raw = {
        "model": {"name": str(build(name, **changes))},
        "data": {"train": str(text_pairs(tmp_path / "pairs.jsonl", 6))},
        "train": {"output": str(tmp_path / "run")},
    }
    with pytest.raises(UserError, match=rf"data.max_length: .* cannot run .* of \d+ tokens: {message}"):
        train_dpo(config_from_dict(raw, [f"train.share_prefix={share}"]))
