"""A step never waits for the device: no operation whose result the host must know before it can go on.

On a GPU each of these stops the host until the device has caught up. They are the same calls on any device, so they are
counted here on the CPU, from the moved batch to the updated weights, by torch's profiler, which sees what operators call
inside as well. Copies to the device wait where the call makes a tensor of Python's numbers there, or moves one
without `non_blocking`; on the CPU no such copy happens, so the calls themselves are counted.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

# Operators whose output's size or value the host reads; `item` and what is made of it are `_local_scalar_dense`.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal",
    "aten::unique_dim", "aten::_unique2", "aten::unique_consecutive", "aten::bincount", "aten::argwhere",
}  # fmt: skip
# AdamW's CPU kernel reads its step count, which the CUDA kernel does on the device.
ON_CPU_ONLY = {"aten::_fused_adamw_"}
METHODS = ("tolist", "numpy", "cpu")


def _place() -> str:
    frames = [
        f
        for f in traceback.extract_stack()
        if "test_no_waiting" not in f.filename and "/torch/" not in f.filename
    ]
    return f"at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "here"


def _counted(
    name: str,
    function: Callable[..., Any],
    found: Counter[str],
    waits: Callable[..., bool] = lambda *_, **__: True,
) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        if waits(*args, **options):
            found[f"{name} {_place()}"] += 1
        return function(*args, **options)

    return call


def _makes_there(*_: Any, device: Any = None, **__: Any) -> bool:
    return device is not None


def _moves(_: torch.Tensor, *args: Any, device: Any = None, non_blocking: bool = False, **__: Any) -> bool:
    """Whether our code names a device, and a copy would wait. torch's and transformers' name the one a tensor is on already."""
    named = device is not None or any(isinstance(arg, str | torch.device) for arg in args)
    caller = sys._getframe(2).f_code.co_filename  # beyond `call`
    return named and not non_blocking and "/site-packages/" not in caller


@contextmanager
def waiting_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts calls that would make the host wait, by operator and place."""
    found: Counter[str] = Counter()
    with monkeypatch.context() as patch, profile(activities=[ProfilerActivity.CPU]) as seen:
        for name in METHODS:
            patch.setattr(torch.Tensor, name, _counted(f".{name}()", getattr(torch.Tensor, name), found))
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, _counted(name, getattr(torch, name), found, _makes_there))
        patch.setattr(torch.Tensor, "to", _counted(".to()", torch.Tensor.to, found, _moves))
        yield found
    for event in seen.events() or []:
        if event.name in WAITING:
            callers, at = [], event.cpu_parent
            while at is not None:
                callers.append(at.name)
                at = at.cpu_parent
            if not ON_CPU_ONLY & set(callers):
                found[" < ".join([event.name, *callers[:6]])] += 1


WAITS: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x.item(), lambda x: x.tolist(), lambda x: bool(x), lambda x: torch.arange(3)[torch.arange(3) > 1],
    lambda x: torch.arange(3).nonzero(), lambda x: float(x), lambda x: x.numpy(), lambda x: x.cpu(),
    lambda x: torch.arange(3).repeat_interleave(torch.arange(3)), lambda x: torch.tensor([1, 2], device="cpu"),
    lambda x: x.to("cpu"), lambda x: x.to(device=torch.device("cpu")),
    lambda x: torch.segment_reduce(x[None], "sum", lengths=torch.tensor([1])),
    lambda x: torch.zeros(2, requires_grad=True).masked_scatter(
        torch.tensor([True, False]), torch.ones(1, requires_grad=True)
    ).sum().backward(),
]  # fmt: skip
GOES_ON: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x.to("cpu", non_blocking=True), lambda x: x.to(torch.float64), lambda x: torch.tensor([1, 2]),
    lambda x: torch.segment_reduce(x[None], "sum", lengths=torch.ones(1, dtype=torch.int64), unsafe=True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("probe", "waits"), [*((probe, True) for probe in WAITS), *((probe, False) for probe in GOES_ON)]
)
def test_the_counter_sees_what_waits_and_nothing_else(
    probe: Callable[[torch.Tensor], Any], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = torch.tensor(1.0)
    with waiting_calls(monkeypatch) as found:
        probe(one)
    assert bool(found) is waits, dict(found)


PACKING = [[], ["train.tokens_per_pack=60"], ["lora=null"]]
LOSSES = [
    ["loss.use_weighting=true"], ["loss.ld_alpha=0.5"], ["loss.kind=apo_zero"], ["loss.kind=aot"],
    ["loss.kind=bco_pair"], ["loss.kind=sigmoid", "loss.label_smoothing=0.1"],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), [
    *(("text", settings) for settings in PACKING + LOSSES), *(("llava", settings) for settings in PACKING),
    ("llava", ["model.train_projector=true"]),
])  # fmt: skip
def test_a_step_never_waits(
    kind: str, settings: list[str], first_step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttrain.train.engine import TorchEngine
    from fasttrain.train.step import StepRunner

    job, step, batches = first_step(kind, settings)
    batches = [batch.to(job.device) for batch in batches]
    engine = TorchEngine(job.policy, job.config.train, job.checkpointing)
    runner = StepRunner(engine, job.loss, job.train)
    with waiting_calls(monkeypatch) as found:
        runner.run(step, iter(batches), logged=True)
        engine.step(1.0)
    assert not found, dict(found)
