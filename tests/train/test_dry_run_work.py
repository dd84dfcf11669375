"""What --dry-run says a step costs is what metrics.jsonl counts for one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.config import config_from_dict
from fasttrain.data.packs import plan_step
from fasttrain.plan.histogram import of_prepared
from fasttrain.plan.work import _count
from fasttrain.train.dry_run import _work
from fasttrain.train.job import build_job
from fasttrain.train.loop import train_dpo


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
