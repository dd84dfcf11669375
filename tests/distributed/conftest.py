"""Several ranks of one run as forked children of this process, which has imported everything: a start costs nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fasttrain.config import config_from_dict

LIMIT_S = 300  # a rank that hangs is killed by SIGALRM


@dataclass(frozen=True)
class Ended:
    """How a run of several ranks ended: exit codes by rank (negative: the signal), and all that was said."""

    codes: list[int]
    stderr: str

    @property
    def messages(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("fasttrain: ")]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _child(rank: int, size: int, port: int, log: Path, body: Callable[[], None]) -> None:
    """What a launcher gives a rank, then `body`; never returns into pytest."""
    code = 1
    try:
        signal.alarm(LIMIT_S)
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        warnings.simplefilter("ignore")
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 (a forked child must not return into pytest)
        import traceback

        traceback.print_exc()
    finally:
        from fasttrain.rank_watch import leave_watch

        leave_watch()
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., Ended]:
    """`run_ranks(body, size=2)`: run `body()` in every rank and wait; `body` may ask os.environ["RANK"]."""

    import fasttrain.cli
    import fasttrain.train.loop  # noqa: F401 - once, for all children

    def run(body: Callable[[], None], size: int = 2) -> Ended:
        log = tmp_path / "stderr.txt"
        log.unlink(missing_ok=True)
        port = _free_port()
        children = []
        for rank in range(size):
            pid = os.fork()
            if not pid:
                _child(rank, size, port, log, body)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        return Ended(codes, log.read_text() if log.exists() else "")

    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], None]]:
    """`command("dpo", "-c", path)`: a body that runs the command line as a user's process would."""

    def make(*arguments: Any, before: Callable[[], None] = lambda: None) -> Callable[[], None]:
        def body() -> None:
            from fasttrain.cli import main

            before()
            sys.argv = ["fasttrain", *map(str, arguments)]
            main()

        return body

    return make


MIXTURE = "mixtral"
MIXED = "llava"  # its pairs: prompts with one image, two and none

CASES: dict[str, tuple[str, list[str]]] = {
    "text": ("text", []),
    "images": (MIXED, []),
    "full": (MIXED, ["lora=null", "model.train_projector=true", "train.learning_rate=1e-4"]),
    "split": (MIXED, ["train.tokens_per_pack=40", "train.gradient_checkpointing=true", "model.train_projector=true"]),
    "unshared": (MIXED, ["train.share_prefix=false"]),
    "coupled": ("text", ["loss.kind=aot"]),
    "projector rests": (  # some steps have no image: the projector's gradient is zero, not the last step's
        MIXED, ["model.train_projector=true", "train.pairs_per_step=1", "train.max_steps=9"],
    ),
    "tower alone": (  # a pack without images has no gradient
        MIXED, [r"lora.targets=model\.vision_tower\..*q_proj", "train.pairs_per_step=1", "train.max_steps=9"],
    ),
    "mixture": (MIXTURE, ["loss.router_aux_weight=0.5", "train.tokens_per_pack=110"]),
    "experts": (  # alone, so that nothing before the first layer's has a gradient
        MIXTURE, ["lora.targets=[mlp.experts.gate_up_proj,mlp.experts.down_proj]", "train.learning_rate=1e-3"],
    ),
    "nf4": (MIXED, ["model.quantize=nf4"]),
    "few": ("text", ["train.pairs_per_step=1", "data.limit_pairs=5", "train.epochs=4"]),  # a group a step
}  # fmt: skip


@pytest.fixture
def recipes(
    tiny_text: Path,
    tiny_llava: Path,
    text_pairs: Callable[..., Path],
    vision_pairs: Callable[..., Path],
    tiny_models: Any,
    tmp_path: Path,
) -> Callable[[str, str], Any]:
    text = text_pairs(tmp_path / "text.jsonl", 21)
    mixture = tiny_models.build_mixture(tmp_path / "mixture")
    models = {"text": tiny_text, MIXED: tiny_llava, MIXTURE: mixture}
    files = {"text": text, MIXTURE: text, MIXED: vision_pairs(tmp_path / "images", 21)}

    def make(case: str, tag: str, *overrides: str) -> Any:
        kind, changes = CASES[case]
        raw = {
            "model": {"name": str(models[kind])},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(files[kind]), "eval": str(files[kind]), "workers": 0},
            "train": {
                "output": str(tmp_path / f"{case}-{tag}"), "epochs": 3, "pairs_per_step": 8, "learning_rate": 1e-2,
                "tokens_per_pack": 150, "warmup_ratio": 0.0, "schedule": "constant", "checkpoint_every": 4,
            },
            "track": [],
        }  # fmt: skip
        return config_from_dict(raw, [*changes, *overrides])

    return make


@pytest.fixture
def deepspeed_config(tmp_path: Path) -> Callable[..., str]:
    """Writes settings of DeepSpeed's zero_optimization; the override that names the file."""

    def write(**zero: Any) -> str:
        path = tmp_path / f"deepspeed-{len(list(tmp_path.glob('deepspeed-*')))}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        return f"distributed.deepspeed_config={path}"

    return write
