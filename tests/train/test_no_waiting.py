"""A step never waits for the device: no operation whose result the host must know before it can go on.

On a GPU each of these stops the host until the device has caught up. They are the same calls on any device, so they are
counted here on the CPU, from the moved batch to the updated weights.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Operations whose output's size or value the host reads.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.unique_dim,
    aten._unique2, aten.unique_consecutive, aten.bincount, aten.argwhere, aten.nonzero_numpy,
}  # fmt: skip
METHODS = ("tolist", "numpy", "cpu", "item")


class _Watch(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        masked = packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        sized = packet is aten.repeat_interleave and (kwargs or {}).get("output_size") is None
        if packet in WAITING or masked or sized:
            self.found[f"{packet} {_place()}"] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    frames = [
        f
        for f in traceback.extract_stack()
        if "test_no_waiting" not in f.filename and "/torch/" not in f.filename
    ]
    return f"at {Path(frames[-1].filename).name}:{frames[-1].lineno}"


def _counted(name: str, method: Callable[..., Any], found: Counter[str]) -> Callable[..., Any]:
    def call(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        found[f".{name}() {_place()}"] += 1
        return method(self, *args, **options)

    return call


@contextmanager
def waiting_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts calls that would make the host wait, by operation and place."""
    found: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for name in METHODS:
            patch.setattr(torch.Tensor, name, _counted(name, getattr(torch.Tensor, name), found))
        with _Watch(found):
            yield found


@pytest.mark.parametrize("probe", [
    lambda x: x.item(), lambda x: x.tolist(), lambda x: bool(x), lambda x: torch.arange(3)[torch.arange(3) > 1],
    lambda x: torch.arange(3).nonzero(), lambda x: float(x), lambda x: x.numpy(), lambda x: x.cpu(),
    lambda x: torch.arange(3).repeat_interleave(torch.arange(3)),
])  # fmt: skip
def test_the_counter_sees_what_waits(
    probe: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting_calls(monkeypatch) as found:
        probe(torch.tensor(1.0))
    assert found


@pytest.mark.parametrize("kind", ["text", "llava"])
@pytest.mark.parametrize(
    "settings", [[], ["loss.use_weighting=true"], ["train.tokens_per_pack=60"], ["lora=null"]]
)
def test_a_step_never_waits(
    kind: str, settings: list[str], tiny_text: Path, tiny_llava: Path, text_pairs: Callable[..., Path],
    vision_pairs: Callable[..., Path], tmp_path: Path, fresh_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fasttrain.config import config_from_dict
    from fasttrain.data.packs import Order, plan_step
    from fasttrain.train.engine import TorchEngine
    from fasttrain.train.job import build_job
    from fasttrain.train.loop import fill_references
    from fasttrain.train.step import StepRunner

    pairs = text_pairs(tmp_path / "pairs.jsonl", 9) if kind == "text" else vision_pairs(tmp_path, 9)
    raw = {
        "model": {"name": str(tiny_text if kind == "text" else tiny_llava)},
        "data": {"train": str(pairs), "workers": 0},
        "train": {"output": str(tmp_path / "run"), "pairs_per_step": 9},
        "track": [],
    }
    job = build_job(config_from_dict(raw, settings))
    fill_references(job)  # its first pass with images compares placeholders and features, once
    job.policy.train()
    order = Order(job.train, 9, False, 0)
    number, epoch, groups = next(order.steps(1, 1))
    step = plan_step(job.train, number, epoch, groups, job.tokens_per_pack, job.policy.shared)
    maker = job.maker(job.train, with_reference=True)
    batches = [maker[pack].to(job.device) for pack in step.packs]
    engine = TorchEngine(job.policy, job.config.train, job.checkpointing)
    runner = StepRunner(engine, job.loss, job.train)
    with waiting_calls(monkeypatch) as found:
        runner.run(step, iter(batches), changes=True)
        engine.step(1.0)
    job.close()
    assert not found, dict(found)
