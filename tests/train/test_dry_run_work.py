"""What --dry-run says of a step, its cost and its answers' log-probs, is what a step has; what would stop one is refused."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.config import config_from_dict
from fasttrain.data.packs import plan_step
from fasttrain.errors import UserError
from fasttrain.plan.histogram import of_prepared
from fasttrain.plan.work import _count
from fasttrain.train.dry_run import _work, dry_run
from fasttrain.train.job import build_job
from fasttrain.train.loop import train_dpo
from fasttrain.train.losses import PairLoss


@pytest.mark.parametrize(
    ("train", "loss", "data"),
    [
        ({}, {}, {}),
        ({"share_prefix": False}, {}, {}),  # every prompt and image again for each of its answers
        ({"tokens_per_pack": 60}, {}, {}),  # groups in parts run twice
        ({}, {"kind": "aot"}, {}),  # all packs run twice
        ({}, {}, {"group_by": "image"}),  # questions that no row predicts
    ],
)
def test_a_dry_run_counts_the_work_of_a_step_as_training_does(
    train: dict[str, Any], loss: dict[str, Any], data: dict[str, str], tiny_llava: Path, vision_pairs: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    pairs = vision_pairs(tmp_path, 6)
    if data:
        pairs.write_text(re.sub(r"images/\d+\.png", "images/0.png", pairs.read_text()))
    config = config_from_dict(
        {
            "model": {"name": str(tiny_llava)}, "lora": {"rank": 4, "alpha": 8}, "loss": loss,
            "data": {"train": str(pairs), "workers": 0} | data,
            "train": {"output": str(tmp_path / "run"), "pairs_per_step": 6, "max_steps": 1} | train,
        }
    )  # fmt: skip
    logged = next(entry for entry in train_dpo(config).metrics if "tflops" in entry)
    with contextlib.closing(build_job(config)) as job:
        number, epoch, groups = next(iter(job.order.steps(1, 1)))
        step = plan_step(
            job.train, number, epoch, groups, job.tokens_per_pack, job.policy.shared, 1, job.packs_filled_to
        )
        tokens, _, flops = _work(job, [step])
        counts = _count(
            step, of_prepared(job.train, "here"), job.shape, job.checkpointing, loss == {"kind": "aot"}
        )
    assert tokens == logged["tokens"]
    assert flops == pytest.approx(logged["tflops"] * 1e12 * logged["step_s"], rel=1e-6)
    assert counts == ([tokens], [flops])  # what plan counts of it


@pytest.fixture
def one_pair(tiny_llava: Path, vision_pairs: Callable[..., Path], tmp_path: Path) -> Callable[[Path], Any]:
    def config(model: Path) -> Any:
        return config_from_dict(
            {
                "model": {"name": str(model)}, "lora": {"rank": 4, "alpha": 8},
                "data": {"train": str(vision_pairs(tmp_path, 1)), "workers": 0},
                "train": {"output": str(tmp_path / "run"), "pairs_per_step": 1, "max_steps": 1},
            }
        )  # fmt: skip

    return config


def test_a_dry_run_says_how_likely_the_model_finds_answers(
    one_pair: Callable[[Path], Any], tiny_llava: Path
) -> None:
    config = one_pair(tiny_llava)
    told = dry_run(config, PairLoss(config.loss), resume=False, overwrite=False)
    (found,) = re.findall(r"log-probs +(-\d+\.\d\d) nats a token, in the mean over the answers of ", told)
    step = next(entry for entry in train_dpo(config).metrics if "logps/chosen" in entry)
    mean = sum(step[f"logps/{side}"] for side in ("chosen", "rejected")) / sum(
        step[f"lengths/{side}"] for side in ("chosen", "rejected")
    )
    assert float(found) == pytest.approx(mean, abs=0.006)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_additional_image_tokens": 3}, "the model makes another number of features"),
        (
            {"size": 14},
            r"LlavaForConditionalGeneration, .* fails on the first images: Input image size \(14\*14\)",
        ),
    ],
)
def test_a_dry_run_refuses_a_processor_that_a_first_step_would_refuse(
    settings: dict[str, int], told: str, one_pair: Callable[[Path], Any], tiny_llava: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_llava, tmp_path / "model")
    known = json.loads((model / "processor_config.json").read_text())
    if size := settings.get("size"):
        known["image_processor"] |= {
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
        }
    else:
        known |= settings
    (model / "processor_config.json").write_text(json.dumps(known))
    config = one_pair(model)
    with pytest.raises(UserError, match=told):
        dry_run(config, PairLoss(config.loss), resume=False, overwrite=False)
