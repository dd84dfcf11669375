"""The command as a process of its own: what it sets before torch is imported, and what it leaves out or does ahead."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import accelerator

from fasttrain import hash_ahead
from fasttrain.config import DPOConfig, config_from_dict
from fasttrain.files import HashMemo

_TOLD = """
import json, os, sys
from fasttrain.command import main
try:
    main()
finally:
    names = ("bitsandbytes", "torch", "triton")
    print(json.dumps([os.environ.get("GLIBC_TUNABLES"), os.getpid(), *(sys.modules.get(name) is not None for name in names)]))
"""


@pytest.fixture
def command(fresh_cache: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    """Runs the command in a process; its C library's settings, whether it is the process that was started, bitsandbytes, torch, triton."""

    def run(*words: object, **environment: str) -> list[Any]:
        clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        process = subprocess.Popen(
            [sys.executable, "-c", _TOLD, *map(str, words)], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
            env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        tunables, pid, *loaded = json.loads(out.splitlines()[-1])
        return [tunables, pid == process.pid, *loaded]

    return run


def test_standard_files_that_are_closed_are_none_of_ours(tmp_path: Path) -> None:
    """After `<&- 2>&-` the first line of progress was a traceback that nobody saw, and the files opened next were 0 and 2."""
    code = (
        "import fasttrain.cli, os, sys; from fasttrain.command import main; from fasttrain.progress import say;"
        "fasttrain.cli.main = lambda: (say('told'), print(os.open(sys.argv[1], os.O_CREAT | os.O_RDWR))); main()"
    )
    words = ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0 and int(done.stdout) > 2


def test_the_data_tools_tell_by_their_exit_code_where_stderr_is_closed(tmp_path: Path) -> None:
    """A progress line, or a mistake told, was a traceback that nobody saw, and the exit code that of a failure of ours."""
    words = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "fasttrain_data", "stats"]
    assert subprocess.run([*words, str(tmp_path / "none.jsonl")], timeout=300).returncode == 2


@pytest.mark.parametrize("word", ["--local_rank=0", "--local-rank=1"])
def test_the_rank_that_a_launcher_puts_before_the_command_is_no_option(
    command: Callable[..., list[Any]], word: str
) -> None:
    """DeepSpeed's and torch's older one do; both set LOCAL_RANK too."""
    tunables, *_ = command(word, "dpo", "--help")
    assert tunables  # the command was told from it


@pytest.fixture
def recipe(tmp_path: Path, text_pairs: Callable[..., Path]) -> Callable[[Path], Path]:
    """The recipe of one step with a model."""

    def write(model: Path) -> Path:
        raw = {
            "model": {"name": str(model)},
            "lora": {"rank": 2, "alpha": 4},
            "data": {"train": str(text_pairs(tmp_path / "pairs.jsonl", 4)), "workers": 0},
            "train": {"output": "run", "max_steps": 1},
            "track": [],
        }
        (tmp_path / "recipe.json").write_text(json.dumps(raw))
        return tmp_path / "recipe.json"

    return write


def test_training_starts_with_its_memory_settings_and_without_what_it_does_not_use(
    command: Callable[..., list[Any]], recipe: Callable[[Path], Path], tiny_text: Path
) -> None:
    tunables, same, bitsandbytes, torch, triton = command("dpo", "-c", recipe(tiny_text))
    assert tunables == "glibc.malloc.mxfast=0:glibc.malloc.tcache_count=0" and same
    assert torch and not bitsandbytes
    assert triton is accelerator.is_available()


def test_what_the_user_set_stays_and_a_run_that_quantises_has_bitsandbytes(
    command: Callable[..., list[Any]], recipe: Callable[[Path], Path], tiny_text: Path
) -> None:
    own = "glibc.malloc.arena_max=2"
    found = command("dpo", "-c", recipe(tiny_text), "-s", "model.quantize=nf4", GLIBC_TUNABLES=own)
    assert found[:4] == [own, True, True, True]


@pytest.mark.parametrize("setting", ["TRITON_INTERPRET", "train.compile", "model.trust_remote_code"])
def test_triton_stays_for_what_may_use_it(
    command: Callable[..., list[Any]], recipe: Callable[[Path], Path], tiny_text: Path, setting: str
) -> None:
    pytest.importorskip("triton")
    words = ["-s", f"{setting}=true"] if "." in setting else []
    found = command(
        "dpo", "-c", recipe(tiny_text), "--dry-run", *words, TRITON_INTERPRET="0" if words else "1"
    )
    assert found[-1]


def test_weights_that_are_quantised_already_are_not_taken_for_plain_ones(
    tmp_path: Path, tiny_text: Path
) -> None:
    from fasttrain import command as module

    def plain(model: object) -> bool:
        return module._plain_weights(_config(model, tmp_path / "pairs.jsonl"))

    assert plain(tiny_text)
    quantised = tmp_path / "quantised"
    shutil.copytree(tiny_text, quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    assert not plain(quantised)
    (quantised / "config.json").write_text("{")
    assert not plain(quantised)
    assert not plain("nobody/has-this-model") and not plain("no/such/folder") and not plain("a b")


def test_an_interrupt_while_the_command_is_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fasttrain import command

    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "fasttrain.cli", Interrupted("fasttrain.cli"))
    monkeypatch.setattr(command, "_alone", False)
    monkeypatch.setattr(sys, "argv", ["fasttrain", "env"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 130 and capsys.readouterr().err == "fasttrain: interrupted\n"


def test_other_commands_are_not_started_again(command: Callable[..., list[Any]]) -> None:
    assert command("--version") == [None, True, False, False, False]


def _config(model: object, pairs: object) -> DPOConfig:
    return config_from_dict({"model": {"name": str(model)}, "lora": {}, "data": {"train": str(pairs)}})


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path) -> list[Path]:
    """Pairs, a model folder with weights; hashing them is worth a process."""
    (tmp_path / "model").mkdir()
    found = [tmp_path / "pairs.jsonl", tmp_path / "model" / "model.safetensors"]
    for number, file in enumerate(found):
        file.write_bytes(os.urandom(1 << 16) * (number + 20))
    monkeypatch.setattr(hash_ahead, "_WORTH", 1)
    monkeypatch.setattr(hash_ahead, "_hashing", {})
    monkeypatch.setattr(HashMemo, "elsewhere", HashMemo.elsewhere)
    return found


def _digest(file: Path) -> str:
    return blake2b(file.read_bytes(), digest_size=16).hexdigest()


@pytest.mark.forks
def test_another_process_hashes_pairs_and_weights(files: list[Path], fresh_cache: Path) -> None:
    here: list[Path] = []

    def compute(path: Path) -> str:
        here.append(path)
        return "here"

    hash_ahead.hash_ahead(_config(files[1].parent, files[0]))
    memo = HashMemo(fresh_cache / "hashes.sqlite")
    assert [memo(file, compute) for file in files] == [_digest(file) for file in files]
    assert not here
    files[0].write_bytes(b"changed")
    assert memo(files[0], compute) == "here"
    memo.close()


@pytest.mark.forks
def test_a_worker_hashes_for_itself(
    files: list[Path], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_ahead, "_hash", lambda files: time.sleep(60))
    hash_ahead.hash_ahead(_config(files[1].parent, files[0]))
    (sibling,) = set(hash_ahead._hashing.values())
    worker = os.fork()
    if not worker:
        try:
            found = HashMemo(fresh_cache / "hashes.sqlite")(files[0])
            os._exit(0 if found == _digest(files[0]) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
    sibling.kill()


@pytest.mark.forks
def test_a_process_that_ends_early_costs_nothing_but_its_help(
    files: list[Path], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_ahead, "_hash", lambda files: os._exit(9))
    hash_ahead.hash_ahead(_config(files[1].parent, files[0]))
    memo = HashMemo(fresh_cache / "hashes.sqlite")
    assert [memo(file) for file in files] == [_digest(file) for file in files]
    memo.close()


def test_small_or_missing_files_start_no_process(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    hash_ahead.hash_ahead(_config(files[1].parent, files[0].with_name("missing.jsonl")))
    monkeypatch.setattr(hash_ahead, "_WORTH", 1 << 26)
    hash_ahead.hash_ahead(_config(files[1].parent, files[0]))
    assert not hash_ahead._hashing


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
def test_a_rank_ends_with_its_torchrun() -> None:
    """A torchrun that is killed outright, before its ranks have met, left them waiting for each other for hours."""
    rank = (
        "import time; import fasttrain.cli; from fasttrain.command import main; "
        "fasttrain.cli.main = lambda: [print('began', flush=True), time.sleep(20), print('went on', flush=True)]; main()"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "none"},
    ) as torchrun:  # fmt: skip
        assert torchrun.stdout is not None and torchrun.stdout.readline() == "began\n"
        torchrun.kill()
        assert torchrun.stdout.read() == ""  # both processes have closed it
