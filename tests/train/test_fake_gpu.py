"""A whole step as a GPU would run it: no tensor on the wrong device, no value that the host must know; see tests/launches.py."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
META = torch.device("meta")


def move(policy: nn.Module) -> None:
    """The policy's parameters and buffers as tensors of the meta device, in bfloat16."""
    moved: dict[int, Any] = {}
    for module in policy.modules():
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is None:
                    continue
                if id(x) not in moved:
                    dtype = torch.bfloat16 if isinstance(x, nn.Parameter) else x.dtype
                    there = torch.empty(x.shape, dtype=dtype, device="meta")
                    moved[id(x)] = (
                        nn.Parameter(there, requires_grad=x.requires_grad)
                        if isinstance(x, nn.Parameter)
                        else there
                    )
                held[name] = moved[id(x)]


SETTINGS = [
    [], ["train.tokens_per_pack=60"], ["lora=null"], ["train.gradient_checkpointing=true"],
    ["loss.use_weighting=true"], ["loss.ld_alpha=0.5"], ["loss.kind=aot"], ["loss.kind=[sigmoid, sft]"],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), [
    *(("text", settings) for settings in SETTINGS), *(("llava", settings) for settings in SETTINGS[:4]),
    ("llava", ["model.train_projector=true"]),
])  # fmt: skip
def test_a_step_runs_on_a_gpu_without_asking_it_for_a_value(
    kind: str,
    settings: list[str],
    first_step: Callable[..., Any],
    launches: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fasttrain.train.engine import TorchEngine
    from fasttrain.train.step import StepRunner

    job, step, batches = first_step(kind, settings)
    move(job.policy)
    job.policy.device = META
    batches = [batch.to(META) for batch in batches]
    monkeypatch.setattr("fasttrain.train.step.random_state", list)  # of CPU and GPU: the meta device has none
    monkeypatch.setattr("fasttrain.train.step.set_random_state", lambda state: None)
    # the fused update does not take tensors of the meta device
    monkeypatch.setattr(
        "fasttrain.train.optimizer.make_optimizer", lambda groups, name: torch.optim.SGD(groups)
    )
    engine = TorchEngine(job.policy, job.config.train, job.checkpointing)
    runner = StepRunner(engine, job.loss, job.train)
    launched = launches.note_launches(monkeypatch)
    result = runner.run(step, iter(batches), logged=True)
    norm = engine.step(1.0)
    assert result.sums.device == norm.device == META
    kernels = {launch.kernel for launch in launched}
    assert all(launch.devices == {"meta"} for launch in launched)
    assert {
        "fold_kernel",
        "finish_kernel",
        "gated_kernel",
        "gated_backward_kernel",
        "rotary_kernel",
    } <= kernels
    assert ({"norm_kernel", "norm_backward_kernel"} <= kernels) is (
        job.config.lora is not None
    )  # of frozen weights
    assert ("preference_kernel" in kernels) is not job.loss.couples_pairs
    assert "merge_kernel" in kernels or "train.tokens_per_pack=60" in settings  # there, answers are apart
    assert ("gradient_kernel" in kernels) is (job.config.lora is None)
