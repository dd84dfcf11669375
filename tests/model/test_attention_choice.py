"""model.attention: what a recipe may ask for, what it gets, and what it is told."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fasttrain.devices import pick_dtype
from fasttrain.errors import UserError
from fasttrain.model.attention import attention_facts, check_attention
from fasttrain_kernels.shared_prefix_flash import Flash2

CUDA = torch.device("cuda", 0)


def config(**entries: int) -> SimpleNamespace:
    made = SimpleNamespace(hidden_size=512, num_attention_heads=4, **entries)
    made.get_text_config = lambda: made
    return made


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has an A100 and flash-attn 2."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    kernel = Flash2(lambda: None, lambda: None)
    monkeypatch.setattr("fasttrain_kernels.shared_prefix_backends.load_flash", lambda version: kernel)


@pytest.mark.parametrize(
    ("dtype", "entries", "bidirectional", "said"),
    [
        (torch.bfloat16, {}, False, None),
        (torch.bfloat16, {"head_dim": 80}, False, None),
        (torch.float32, {}, False, "flash-attn wants bfloat16 or float16, got float32"),
        (torch.bfloat16, {"head_dim": 36}, False, "a head size that 8 divides, at most 256, got 36"),
        (torch.bfloat16, {"head_dim": 256, "global_head_dim": 512}, False, "at most 256, got 512"),
        (torch.bfloat16, {}, True, "flash-attn cannot make spans of a prompt bidirectional"),
    ],
)
def test_a_backend_that_cannot_run_a_model_is_a_users_mistake_in_one_line(
    dtype: torch.dtype, entries: dict[str, int], bidirectional: bool, said: str | None, ampere: None
) -> None:
    if said is None:
        check_attention("flash", config(**entries), CUDA, dtype, bidirectional)
        return
    with pytest.raises(UserError) as caught:
        check_attention("flash", config(**entries), CUDA, dtype, bidirectional)
    message = str(caught.value)
    assert message.startswith("model.attention: wanted a backend that can run here, got flash: ")
    assert message.endswith(said)
    check_attention("auto", config(**entries), CUDA, dtype, bidirectional)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_is_left_to_float32_where_it_has_no_bfloat16(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4: torch emulates bfloat16 there, its compiler leaves such code as it is."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    assert pick_dtype("auto", CUDA) == dtype
    assert pick_dtype("bfloat16", CUDA) == torch.bfloat16


def test_a_runs_facts_name_the_backend_of_its_passes(ampere: None) -> None:
    model = SimpleNamespace(config=config(), dtype=torch.bfloat16)
    policy = SimpleNamespace(
        model=model, device=CUDA, shared=True, attention="auto", ordinary_attention="sdpa"
    )
    assert attention_facts(policy) == {
        "attention_backend": "flash",
        "attention_reason": "flash-attn 2 can be imported",
    }
    policy.attention = "sdpa"
    assert attention_facts(policy) == {"attention_backend": "sdpa", "attention_reason": "model.attention"}
    policy.shared = False
    assert attention_facts(policy)["attention_reason"] == "completions run as ordinary sequences"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_window_that_a_models_code_keeps_to_itself_is_noticed_before_training(
    tiny_models: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The check runs on a group that the window cuts, though a smaller group is there."""
    from transformers import AttentionInterface

    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict
    from fasttrain.model import attention
    from fasttrain.train import first_step

    def deaf(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return attention._attention(*args, **kwargs)

    AttentionInterface.register(attention.SHARED, deaf)
    monkeypatch.setattr(first_step, "VERIFIED", set())
    rows = [
        {"prompt": prompt, "chosen": "the red bar is highest", "rejected": "no"}
        for prompt in ("a bar", "the chart " * 40)
    ]
    pairs = tiny_models.write_rows(tmp_path / "pairs.jsonl", rows)
    model = tiny_models.build_mistral_sliding(tmp_path / "model", window=48)
    train = {"output": str(tmp_path / "run"), "max_steps": 1, "pairs_per_step": 2}
    raw = {"model": {"name": str(model)}, "data": {"train": str(pairs)}, "train": train, "track": []}
    try:
        train_dpo(config_from_dict(raw))
    finally:
        AttentionInterface.register(attention.SHARED, attention._attention)
    assert "sharing prefixes changes the log-probs of MistralForCausalLM" in capfd.readouterr().err
