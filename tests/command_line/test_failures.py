"""Other ends of a command: the machine's failure is one line and exit code 1, an interrupt says what is kept, a bug keeps its traceback."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fasttrain import cli


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: writing more fails as on a full disk, inside safetensors as well.

    Only around the writing itself: the test runner's own output may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_saving_is_one_line_and_the_old_checkpoint_stays(
    project: Path, fasttrain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttrain.train import loop

    save = loop.save_checkpoint

    def save_while_there_is_room(folder: Path, step: int, *rest: Any) -> Path:
        with small_disk(20_000) if step == 2 else contextlib.nullcontext():
            return save(folder, step, *rest)

    monkeypatch.setattr(loop, "save_checkpoint", save_while_there_is_room)
    answer = fasttrain("dpo", "-c", project, "-s", "train.checkpoint_every=1")
    assert answer.code == 1 and "Traceback" not in answer.err
    last = answer.err.splitlines()[-1]
    assert last.startswith("fasttrain: error: the machine failed: ") and "File too large" in last
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-000001"]
    monkeypatch.undo()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), Exception("Input/output error (os error 5)")],
    ids=["system", "Rust"],
)
def test_a_disk_that_fails_is_told_with_what_was_being_written(
    project: Path, fasttrain: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from fasttrain.train import final

    def fail(*given: object) -> None:
        raise error

    monkeypatch.setattr(final, "save_processor", fail)
    answer = fasttrain("dpo", "-c", project, "-s", "train.max_steps=1")
    assert answer.code == 1 and "Traceback" not in answer.err
    assert answer.err.splitlines()[-1].endswith("the machine failed: Input/output error: run/final")


def test_a_machine_without_memory_is_one_line(project: Path, fasttrain: Any) -> None:
    answer = fasttrain(
        "dpo", "-c", project, "-s", f"lora.rank={1 << 50}"
    )  # more than any address space holds
    assert answer.code == 1 and "Traceback" not in answer.err
    last = answer.err.splitlines()[-1]
    assert last.startswith("fasttrain: error: out of memory: ") and "lower train.tokens_per_pack" in last


@pytest.mark.parametrize(
    "told",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_a_gpu_without_memory_is_one_line_whoever_tells_it(
    project: Path, fasttrain: Any, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    from fasttrain.train import loop

    def fail(*given: object) -> None:
        raise RuntimeError(told)

    monkeypatch.setattr(loop, "build_job", fail)
    answer = fasttrain("dpo", "-c", project)
    assert answer.code == 1 and "Traceback" not in answer.err
    assert answer.err.splitlines()[-1].startswith(f"fasttrain: error: out of memory: {told.splitlines()[0]}")


@pytest.mark.parametrize("key", ["train.output", "data.train", "model.name", "reference.cache"])
def test_a_name_that_no_disk_can_hold_is_the_users_mistake(project: Path, fasttrain: Any, key: str) -> None:
    answer = fasttrain("dpo", "-c", project, "-s", f"{key}={'x' * 300}")
    (last,) = answer.err.splitlines()[-1:]
    assert answer.code == 2 and last.startswith("fasttrain: error: ") and "xxx" in last, last
    assert "File name too long" in last and len(last) < 400


def test_a_run_goes_on_from_the_checkpoint_that_a_full_disk_left(
    project: Path, fasttrain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttrain.train import loop

    settings = ["-s", "train.checkpoint_every=1", "-s", "train.learning_rate=1e-3"]
    assert fasttrain("dpo", "-c", project, *settings, "-s", "train.output=whole").code == 0
    write = loop.write_final

    def write_while_there_is_room(*given: Any) -> Path:
        with small_disk(20_000):
            return write(*given)

    monkeypatch.setattr(loop, "write_final", write_while_there_is_room)
    assert fasttrain("dpo", "-c", project, *settings).code == 1
    assert not Path("run/final").exists() and not list(Path("run").glob(".*"))
    monkeypatch.setattr(loop, "write_final", write)
    assert fasttrain("dpo", "-c", project, *settings, "--resume").code == 0
    weights = [Path(run, "final/adapter_model.safetensors").read_bytes() for run in ("whole", "run")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ((), "; what is done is kept, go on with --resume"),
        (("; the checkpoint x is kept",), "; the checkpoint x is kept"),
    ],
)
def test_an_interrupt_says_what_is_kept(
    where: tuple[str, ...], said: str, project: Path, fasttrain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt(*where)

    monkeypatch.setattr("fasttrain.train.loop.train", interrupted)
    answer = fasttrain("dpo", "-c", project)
    assert answer.code == 130
    assert answer.err.strip() == f"fasttrain: interrupted{said}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["answer", "-m", "model"], "; what is done is kept, the same command goes on with it"),
        (["dpo", "-c", "recipe.yaml", "--dry-run"], ""),
        (["plan", "-c", "recipe.yaml"], ""),
    ],
)
def test_an_interrupt_names_no_option_that_the_command_lacks(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "cli", interrupted)
    monkeypatch.setattr("sys.argv", ["fasttrain", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and capsys.readouterr().err.strip() == f"fasttrain: interrupted{said}"


def test_a_failure_of_ours_keeps_its_traceback(
    project: Path, fasttrain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("fasttrain.train.loop.train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        fasttrain("dpo", "-c", project)
