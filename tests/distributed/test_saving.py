"""Under ZeRO-3 a model goes from its files to checkpoints and back to files, and no rank ever holds the whole of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fasttrain.config import config_from_dict
from fasttrain.merge import merge
from fasttrain.plan.allocated import peak_allocated
from fasttrain.ranks import ranks
from fasttrain.train import final
from fasttrain.train.loop import train_dpo

pytestmark = pytest.mark.forks


@pytest.fixture
def model(tiny_models: ModuleType, tmp_path: Path) -> Path:
    """A Llama of twelve equal layers in files of one layer or two, so that a part is small beside the whole."""
    from transformers import AutoModelForCausalLM

    whole = tiny_models.build_text(
        tmp_path / "whole", num_hidden_layers=12, hidden_size=64, intermediate_size=384
    )
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "model", max_shard_size="500KB")
    for path in whole.iterdir():
        if path.suffix != ".safetensors" and not (tmp_path / "model" / path.name).exists():
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 8
    return tmp_path / "model"


@pytest.fixture
def recipe(model: Path, text_pairs: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    text_pairs(tmp_path / "pairs.jsonl", 12)
    zero = {"stage3_param_persistence_threshold": 0}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))

    def make(tag: str, *overrides: str) -> Any:
        raw = {
            "model": {"name": str(model)},
            "lora": None,
            "data": {"train": str(tmp_path / "pairs.jsonl"), "workers": 0},
            "train": {"output": str(tmp_path / tag), "max_steps": 2, "pairs_per_step": 4, "tokens_per_pack": 300,
                      "learning_rate": 1e-3, "warmup_ratio": 0.0},
            "track": [],
        }  # fmt: skip
        return config_from_dict(raw, list(overrides))

    return make


@pytest.mark.slow
def test_no_rank_holds_the_model_while_it_is_loaded_saved_and_written(
    recipe: Callable[..., Any], model: Path, run_ranks: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Loading: what DeepSpeed gathers at a time, and what stays. Saving: bytes as torch's allocator reports them."""
    train_dpo(recipe("one"))
    config = recipe(
        "two", "distributed.zero_stage=3", f"distributed.deepspeed_config={tmp_path / 'zero.json'}"
    )
    monkeypatch.setattr(final, "PART_BYTES", 500_000)

    def body() -> None:
        import deepspeed

        import fasttrain.train.job as job
        import fasttrain.train.loop as loop

        seen: dict[str, Any] = {"gathered": []}
        load, enter = job.load_model, deepspeed.zero.GatheredParameters.__enter__  # type: ignore[attr-defined]

        def entered(self: Any) -> None:
            enter(self)
            seen["gathered"].append(4 * sum(p.numel() for p in getattr(self, "params", [])))

        def loaded(*arguments: Any, **options: Any) -> Any:
            deepspeed.zero.GatheredParameters.__enter__ = entered
            model = load(*arguments, **options)
            deepspeed.zero.GatheredParameters.__enter__ = enter
            seen["whole"] = 4 * sum(p.numel() for p in model.parameters())
            seen["parts"] = 4 * sum(p.ds_tensor.numel() for p in model.parameters())
            return model

        def measured(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> None:
                seen[name] = peak_allocated(lambda: call(*arguments, **options))

            return wrapped

        job.load_model = loaded  # type: ignore[attr-defined]
        loop.save_checkpoint = measured("save", loop.save_checkpoint)  # type: ignore[attr-defined]
        loop.write_final = measured("write", loop.write_final)  # type: ignore[attr-defined]
        train_dpo(config)
        (tmp_path / f"seen{ranks().rank}.json").write_text(json.dumps(seen))

    ended = run_ranks(body)
    assert ended.codes == [0, 0], ended.stderr
    whole = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen{rank}.json").read_text())
        assert 0.9 * whole < sum(seen["gathered"]) < 1.1 * whole and max(seen["gathered"]) < 0.1 * whole
        assert seen["whole"] == 0 and 0.45 * whole < seen["parts"] < 0.55 * whole
        assert seen["save"] < 0.6 * whole  # of three times the whole: weights and two moments
        assert seen["write"] < 0.8 * whole

    two = tmp_path / "two"
    files = sorted(path.name for path in (two / "final").glob("*.safetensors"))
    assert len(files) >= 8 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    ours, theirs, base = (load(folder) for folder in (two / "final", tmp_path / "one" / "final", model))
    assert ours.keys() == theirs.keys()
    for (
        name,
        value,
    ) in theirs.items():  # Adam's first steps are signs: where a gradient is rounding they may differ
        assert torch.dist(ours[name], value) < 0.02 * torch.dist(value, base[name]), name
    merge(two, tmp_path / "merged")
    assert all(torch.equal(load(tmp_path / "merged")[name], value) for name, value in ours.items())


def test_a_model_saved_from_zero_3_has_the_names_of_its_files(
    recipes: Callable[..., Any], tiny_llava: Path, run_ranks: Callable[..., Any]
) -> None:
    """transformers keeps every renaming that it knows there, also of versions that doubled a part of the names."""
    config = recipes("full", "zero", "distributed.zero_stage=3", "train.max_steps=1", "data.eval=null")
    ended = run_ranks(lambda: train_dpo(config), size=1)
    assert ended.codes == [0], ended.stderr
    base, ours = (
        load_file(folder / "model.safetensors")
        for folder in (tiny_llava, Path(config.train.output) / "final")
    )
    assert ours.keys() == base.keys()


def load(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
