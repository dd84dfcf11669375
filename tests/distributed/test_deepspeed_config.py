"""A deepspeed_config is merged over ours, except what the recipe decides and what has never been run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.config import config_from_dict
from fasttrain.errors import UserError
from fasttrain.train.deepspeed_settings import deepspeed_settings


def settings(folder: Path, written: Any, stage: int = 3) -> dict[str, Any]:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(written))
    config = config_from_dict(
        {
            "model": {"name": "unused"},
            "data": {"train": "unused"},
            "distributed": {"zero_stage": stage, "deepspeed_config": str(path)},
        }
    )
    return deepspeed_settings(config, torch.float32)


def test_what_the_file_says_stands_and_the_rest_stays_ours(tmp_path: Path) -> None:
    zero = {"stage": 3, "sub_group_size": 7, "offload_param": {"device": "cpu"}, "overlap_comm": "auto"}
    merged = settings(tmp_path, {"zero_optimization": zero, "train_batch_size": "auto"})
    assert merged["zero_optimization"]["sub_group_size"] == 7
    assert merged["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert merged["zero_optimization"]["overlap_comm"] is torch.cuda.is_available()
    assert merged["train_micro_batch_size_per_gpu"] == 1 and "train_batch_size" not in merged


def test_auto_null_and_what_is_switched_off_say_nothing(tmp_path: Path) -> None:
    """As in files that were written for the Hugging Face Trainer."""
    written = {
        "fp16": {"enabled": "auto", "loss_scale": 0}, "bf16": {"enabled": "auto"}, "flops_profiler": {"enabled": False},
        "gradient_clipping": "auto",
        "zero_optimization": {"offload_param": None, "offload_optimizer": {"device": "cpu", "pin_memory": "auto"}},
    }  # fmt: skip
    merged, ours = settings(tmp_path, written), settings(tmp_path, {})
    assert merged["zero_optimization"].pop("offload_optimizer") == {"device": "cpu"}
    assert merged == ours


@pytest.mark.parametrize(
    ("written", "stage", "words"),
    [
        ([1], 3, "wanted a JSON object, got list"),
        ({"optimizer": {"type": "Adam"}}, 3, "optimizer is set by the recipe"),
        ({"optimizer": {}, "scheduler": {}, "fp16": {"enabled": True}}, 2, "optimizer, scheduler, fp16 are set by the recipe"),
        ({"zero_optimisation": {}}, 2, "wanted any of .*, got zero_optimisation; did you mean 'zero_optimization'"),
        ({"gradient_allreduce_op": "sum"}, 2, "wanted any of .*, got gradient_allreduce_op"),
        ({"steps_per_print": 0}, 2, "steps_per_print: wanted an integer of at least 1, got 0"),
        ({"steps_per_print": "never"}, 2, 'steps_per_print: wanted an integer of at least 1, got "never"'),
        ({"zero_optimization": [1]}, 2, r"zero_optimization: wanted a JSON object, got \[1\]"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, 2, 'zero_optimization.offload_optimizer: wanted a JSON object, got "cpu"'),
        ({"zero_optimization": {"stgae": 2}}, 2, "zero_optimization.stgae: Extra inputs are not permitted, got 2"),
        ({"zero_optimization": {"reduce_bucket_size": "big"}}, 2, "zero_optimization.reduce_bucket_size: .* got 'big'"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, 3, "zero_quantized_weights has never been run here"),
        ({"communication_data_type": "float16"}, 2, "communication_data_type.*float16"),
        ({"zero_optimization": {"stage": 2}}, 3, "wanted zero_optimization.stage 3 .*, got 2"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, 3, "offload_optimizer.device: wanted cpu or none, got nvme"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, 3, "offload_param.device: wanted cpu or none, got nvme"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, 2, "offload_param: wanted distributed.zero_stage 3, .* got 2"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, 3, "ratio: wanted 1, .* got 0.5"),
    ],
)  # fmt: skip
def test_mistakes_are_told_by_name(tmp_path: Path, written: Any, stage: int, words: str) -> None:
    with pytest.raises(UserError, match=rf"^distributed.deepspeed_config: .*deepspeed.json: .*{words}"):
        settings(tmp_path, written, stage)


def test_8_bit_states_are_not_offloaded(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    config = config_from_dict(
        {
            "model": {"name": "unused"},
            "data": {"train": "unused"},
            "train": {"optimizer": "adamw_8bit"},
            "distributed": {"zero_stage": 2, "deepspeed_config": str(tmp_path / "zero.json")},
        }
    )
    with pytest.raises(UserError, match=r"^train.optimizer: wanted adamw with .*offload_optimizer"):
        deepspeed_settings(config, torch.float32)
