"""Shared fixtures: one thread, no network, private caches, tiny models, pair files, the real samples."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

# Read by torch, tokenizers and huggingface_hub when they are imported, so set before anything imports them,
# and inherited by the processes that tests start. Two threads make tiny matrix products slower, not faster.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"
_private = tempfile.mkdtemp(prefix="fasttrain-tests-")
atexit.register(shutil.rmtree, _private, ignore_errors=True)
os.environ["FASTTRAIN_CACHE"] = str(Path(_private) / "fasttrain")
os.environ["HF_HOME"] = str(Path(_private) / "huggingface")

REPOSITORY = Path(__file__).resolve().parent.parent

# Warnings of other people's code that we cannot avoid; everything else is an error (pyproject.toml).
THIRD_PARTY_WARNINGS = (
    # peft 0.21 asks transformers 5.23 whether checkpointing is on by the name that 5.23 deprecated.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # Python 3.12 warns of every fork beside threads; pytest-xdist's has one that waits for orders.
    "ignore:.*use of fork:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A child forked after this process has begun threads of its own may hang: those tests go first in every process.
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def _load_builders() -> ModuleType:
    # tests/ is no package and not on the path (import mode importlib), so the module is loaded by its file.
    path = Path(__file__).with_name("tiny_models.py")
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_models"] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    """A file beside this one as a module; tests/ is no package and not on the path (import mode importlib)."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """The module tests/tiny_models.py: builders of models, adapters, images and pair files."""
    return sys.modules.get("tiny_models") or _load_builders()


@pytest.fixture(scope="session")
def tiny_families() -> ModuleType:
    """The module tests/tiny_families.py: builders of the vision-language families."""
    return _module("tiny_families")


@pytest.fixture(scope="session")
def launches() -> ModuleType:
    """The module tests/launches.py: the meta device as a GPU whose launches are noted."""
    return _module("launches")


@pytest.fixture(scope="session")
def tiny_text(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Llama with a ChatML tokenizer whose turns end `<|im_end|>` newline."""
    return tiny_models.build_text(tmp_path_factory.mktemp("model") / "tiny-text")


@pytest.fixture(scope="session")
def tiny_llava(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LLaVA (16 image tokens) with a Vicuna template whose turns end `</s>`."""
    return tiny_models.build_llava(tmp_path_factory.mktemp("model") / "tiny-llava")


@pytest.fixture(scope="session")
def tiny_mistral_sliding(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Mistral with a sliding window of 16 tokens."""
    return tiny_models.build_mistral_sliding(tmp_path_factory.mktemp("model") / "tiny-mistral-sliding")


@pytest.fixture(scope="session")
def text_pairs(tiny_models: ModuleType) -> Callable[..., Path]:
    """Writes a text pair file: `text_pairs(path, count, ...)`; see tests/tiny_models.py."""
    return tiny_models.text_pairs


@pytest.fixture(scope="session")
def vision_pairs(tiny_models: ModuleType) -> Callable[..., Path]:
    """Draws images and writes a pair file: `vision_pairs(folder, count, ...)`; see tests/tiny_models.py."""
    return tiny_models.vision_pairs


class FirstStep(NamedTuple):
    """A job whose reference cache is full, and the packs of its first step as batches on the CPU."""

    job: Any
    step: Any
    batches: list[Any]


@pytest.fixture
def first_step(
    tiny_text: Path, tiny_llava: Path, text_pairs: Callable[..., Path], vision_pairs: Callable[..., Path], tmp_path: Path,
    fresh_cache: Path,
) -> Iterator[Callable[[str, list[str]], FirstStep]]:  # fmt: skip
    """`first_step("text" or "llava", settings)`: nine pairs in training mode."""
    jobs = contextlib.ExitStack()

    def make(kind: str, settings: list[str]) -> FirstStep:
        from fasttrain.config import config_from_dict
        from fasttrain.data.packs import Order, plan_step
        from fasttrain.train.job import build_job
        from fasttrain.train.references import fill_references

        pairs = text_pairs(tmp_path / "pairs.jsonl", 9) if kind == "text" else vision_pairs(tmp_path, 9)
        raw = {
            "model": {"name": str(tiny_text if kind == "text" else tiny_llava)},
            "data": {"train": str(pairs), "workers": 0},
            "train": {"output": str(tmp_path / "run"), "pairs_per_step": 9},
            "track": [],
        }
        job = jobs.enter_context(contextlib.closing(build_job(config_from_dict(raw, settings))))
        fill_references(job)  # its first pass with images compares placeholders and features, once
        job.policy.train()
        number, epoch, groups = next(Order(job.train, 9, False, 0).steps(1, 1))
        step = plan_step(job.train, number, epoch, groups, job.tokens_per_pack, job.policy.shared)
        maker = job.maker(job.train, with_reference=True)
        return FirstStep(job, step, [maker[pack] for pack in step.packs])

    with jobs:
        yield make


_WORDS = [
    "the",
    "chart",
    "shows",
    "a",
    "red",
    "bar",
    "left",
    "of",
    "blue",
    "and",
    "highest",
    "value",
    "is",
    "42",
    "percent",
]


def _question(rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(2, 17))) + "?"


@pytest.fixture
def picture_questions(tmp_path: Path, tiny_models: ModuleType) -> Path:
    """Eleven questions: three about one image, two about two images, some without, some of two turns."""
    rng = random.Random(5)
    images = [[0], [0], [], [1], [2, 3], [], [0], [4], [3, 2], [5], []]
    rows = []
    for number, shown in enumerate(images):
        for image in shown:
            tiny_models.draw_image(tmp_path / f"{image}.png", seed=image)
        row: dict[str, Any] = {"question_id": number, "images": [f"{image}.png" for image in shown]}
        rows.append(
            row
            | ({"turns": [_question(rng), _question(rng)]} if number % 4 == 3 else {"text": _question(rng)})
        )
    return tiny_models.write_rows(tmp_path / "questions.jsonl", rows)


@pytest.fixture
def text_questions(tmp_path: Path, tiny_models: ModuleType) -> Path:
    rng = random.Random(6)
    rows = [{"question_id": f"q{n}", "turns": [_question(rng) for _ in range(1 + n % 3)]} for n in range(9)]
    return tiny_models.write_rows(tmp_path / "text.jsonl", rows)


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`run_command("answer", ...)`: the command line in this process; its exit code."""

    def run(*words: object) -> int:
        from fasttrain import cli

        monkeypatch.setattr(sys, "argv", ["fasttrain", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache root for one test; otherwise all tests of a session share one."""
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real samples: $FASTTRAIN_SHARED_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("FASTTRAIN_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real samples at {folder}: set FASTTRAIN_SHARED_DATA to their folder")
    return folder
