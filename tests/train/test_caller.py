"""What a run and the program that called it keep from each other."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.errors import UserError
from fasttrain.train import loop
from fasttrain.train.job import build_job

Runner = Callable[..., Any]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_changes_nothing(
    mode: Callable[[], Any], tiny_text: Path, text: Path, run: Runner
) -> None:
    truth = run(tiny_text, text).metrics
    with mode():
        ours = run(tiny_text, text).metrics
    assert [line["loss"] for line in ours] == [line["loss"] for line in truth]
    assert truth[0]["grad_norm"] == ours[0]["grad_norm"] > 0


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    assert torch.get_default_dtype() == dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "mode", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: default_dtype(torch.bfloat16)]
)
def test_the_callers_precision_changes_neither_the_run_nor_the_cached_references(
    mode: Callable[[], Any], tiny_text: Path, text: Path, run: Runner, fresh_cache: Path
) -> None:
    with mode():
        ours = run(tiny_text, text).metrics
    truth = run(tiny_text, text).metrics  # with the references that were cached in that mode
    assert [line["loss"] for line in ours] == [line["loss"] for line in truth]


def test_the_callers_default_device_changes_nothing(tiny_llava: Path, vision: Path, run: Runner) -> None:
    """With torch.set_default_device("cuda") the workers would ask for a GPU in a forked process."""
    truth = run(tiny_llava, vision).metrics
    with torch.device("meta"):
        ours = run(tiny_llava, vision, "data.workers=1").metrics
    assert [line["loss"] for line in ours] == [line["loss"] for line in truth]


def test_the_callers_random_draws_go_on(tiny_text: Path, text: Path, run: Runner) -> None:
    """A search that draws its next learning rate between two runs drew the same one for ever."""
    torch.manual_seed(5)
    truth = torch.rand(2).tolist()
    torch.manual_seed(5)
    first = float(torch.rand(()))
    run(tiny_text, text)
    assert [first, float(torch.rand(()))] == truth


def test_a_second_run_beside_the_first_is_refused(
    tiny_text: Path, text: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs in two threads drew their adapters and dropout from one random state, and no run was its recipe's."""
    refused: list[BaseException | None] = []

    def build(*given: Any) -> Any:
        monkeypatch.undo()
        with ThreadPoolExecutor() as pool:
            refused.append(pool.submit(run, tiny_text, text, output="second").exception())
        return build_job(*given)

    monkeypatch.setattr(loop, "build_job", build)
    assert run(tiny_text, text, output="first").metrics
    assert isinstance(refused[0], UserError) and "wanted one run at a time in a process" in str(refused[0])


def test_a_finished_run_holds_no_memory(tiny_text: Path, text: Path, run: Runner) -> None:
    """The next run of a notebook loads its model where the last one's was."""
    run(tiny_text, text)
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
        run(tiny_text, text)
        assert sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("end", [KeyboardInterrupt, UserError, torch.OutOfMemoryError])
def test_a_run_that_ends_early_holds_no_memory_though_its_traceback_is_kept(
    end: type[BaseException], tiny_text: Path, text: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook keeps it in sys.last_value while its user changes a setting and runs the cell again."""

    def ends(*_: Any) -> None:
        raise end("as told")

    run(tiny_text, text)
    gc.collect()
    before = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
    monkeypatch.setattr(loop, "check_finite", ends)
    with pytest.raises(end) as kept:
        run(tiny_text, text)
    assert sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()) == before
    assert kept.traceback


def test_a_refused_run_leaves_the_traceback_that_its_caller_is_handling(run: Runner, tmp_path: Path) -> None:
    def fails(kept: str) -> None:
        raise ValueError("the caller's")

    try:
        fails("as it was")
    except ValueError as own:
        with pytest.raises(UserError):
            run(tmp_path / "none", tmp_path / "none.jsonl")
        *_, (frame, _) = traceback.walk_tb(own.__traceback__)
        assert frame.f_locals == {"kept": "as it was"}
