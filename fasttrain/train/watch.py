"""The alignment tax, watched while training: the live policy answers a benchmark's questions, and is scored exactly.

Generation leaves nothing behind: attention, training mode and random state are put back, so that the run's numbers are
those of a run without the watch, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from fasttrain.answering.decoding import Decoding, Reply
from fasttrain.answering.local import answer_in_batches, batch_budget, make_generator
from fasttrain.answering.questions import Question, image_hashes
from fasttrain.answering.run import Failed
from fasttrain.config import DataConfig
from fasttrain.errors import UserError
from fasttrain.evaluate.benchmarks import AnswerFile, Benchmark, ReadOptions, benchmark_of, find_benchmark
from fasttrain.files import HashMemo, user_path, write_json
from fasttrain.model.policy import Policy
from fasttrain.progress import Progress, say
from fasttrain.settings import require
from fasttrain.train.step import random_state, set_random_state

MOST_NEW_TOKENS = 128  # an answer that has not named its option by then is counted as it is
START_FILE = "watch_start.json"
_FIGURES = {
    "pope": ("f1", "accuracy", "yes_ratio", "mean_answer_chars"),
    "mmbench": ("accuracy", "undecided", "needs_judge", "mean_answer_chars"),
}


class _Stopped(Exception):
    """Told to stop between two batches."""


@dataclass
class Watch:
    """One benchmark folder of `data.eval`: its questions by part, and how they are scored.

    keys: what is asked in each, text and image hashes; questions of equal keys (in POPE's splits) are asked once.
    """

    benchmark: Benchmark
    data: Path
    parts: dict[str, list[Question]]
    keys: list[tuple[Any, tuple[str, ...]]]
    limit: int | None
    start: dict[str, float] | None = None

    def figures(self, texts: dict[Any, str]) -> dict[str, float]:
        """The benchmark's figures from the texts by what was asked; POPE's are means over its splits."""
        keys = iter(self.keys)
        files = {
            part: AnswerFile(texts={str(q.id): texts[next(keys)] for q in questions}, model="policy")
            for part, questions in self.parts.items()
        }
        assert self.benchmark.score is not None
        scores = self.benchmark.score(self.data, files, self.limit).scores
        name = self.benchmark.name
        found = [scores[part] for part in self.parts] if name == "pope" else [scores]
        return {key: sum(split[key] for split in found) / len(found) for key in _FIGURES[name]}


def split_eval(paths: str | list[str] | None) -> tuple[list[str], list[Path]]:
    """Pair files, and benchmark folders, of `data.eval`; UserError for a folder that is neither."""
    given = [paths] if isinstance(paths, str) else paths or []
    folders = [path for path in given if benchmark_of(user_path(path)) is not None]
    pair_files = [path for path in given if path not in folders]
    for path in map(user_path, pair_files):
        if path.is_dir() and not any(any(path.rglob(name)) for name in ("state.json", "*.parquet")):
            raise UserError(
                f"data.eval: wanted pair files, a folder of datasets, or one with POPE's coco_pope_*.json or MMBench's .tsv, got {path}"
            )
    return pair_files, [user_path(path) for path in folders]


def open_watches(folders: Sequence[Path], data: DataConfig, memo: HashMemo) -> list[Watch]:
    """Read the questions of each folder; UserError for a mistake in them."""
    watches: list[Watch] = []
    for key in ("eval_questions", "eval_prompt_suffix"):
        got = getattr(data, key)
        require(
            bool(folders) or got is None, f"data.{key}", "null without a benchmark folder in data.eval", got
        )
    for folder in folders:
        name = benchmark_of(folder)
        assert name is not None
        if any(watch.benchmark.name == name for watch in watches):
            raise UserError(f"data.eval: wanted one folder of {name}, got {folder} besides {watches[0].data}")
        benchmark = find_benchmark(name)
        options = ReadOptions(suffix=data.eval_prompt_suffix, limit=data.eval_questions)
        parts = benchmark.read(folder, options)
        questions = [question for part in parts.values() for question in part]
        keys = [
            (q.messages, hashes) for q, hashes in zip(questions, image_hashes(questions, memo), strict=True)
        ]
        watches.append(Watch(benchmark, folder, parts, keys, data.eval_questions))
    return watches


def _read_start(path: Path, names: list[str]) -> dict[str, dict[str, float]] | None:
    """The scores before the first step by benchmark, as an earlier start wrote them; None if they are not there, or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: {key: float(found[name][key]) for key in _FIGURES[name]} for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Watcher:
    """Asks the policy the questions of all watches."""

    def __init__(
        self,
        policy: Policy,
        processor: Any,
        stops: Sequence[int],
        watches: list[Watch],
        bos: str = "template",
        today: date | None = None,
    ) -> None:
        self.policy, self.watches, self._bos, self._today = policy, watches, bos, today
        self._processor, self._stops = processor, stops
        self._generator: Any = None

    def open(self, folder: Path) -> None:
        """Score the policy before its first step, or take what an earlier start of this run found."""
        if not self.watches:
            return
        path = folder / START_FILE
        before = _read_start(path, [watch.benchmark.name for watch in self.watches])
        if before is None:
            before = {watch.benchmark.name: self._ask(watch, lambda: False) for watch in self.watches}
            write_json(path, before)
        for watch in self.watches:
            watch.start = before[watch.benchmark.name]
            shown = "  ".join(f"{name} {value:.4f}" for name, value in watch.start.items())
            say(f"{watch.benchmark.name} before training, {len(watch.keys):,} questions: {shown}")

    def metrics(self, stopped: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """`eval_pope/f1` and the like, each first figure also as its change since the start; none when `stopped`."""
        found: dict[str, float] = {}
        for watch in self.watches:
            try:
                figures = self._ask(watch, stopped)
            except _Stopped:
                return {}
            name = f"eval_{watch.benchmark.name}"
            found |= {f"{name}/{key}": value for key, value in figures.items()}
            first = next(iter(figures))
            assert watch.start is not None
            found[f"{name}/{first}_change"] = figures[first] - watch.start[first]
        return found

    def _ask(self, watch: Watch, stopped: Callable[[], bool]) -> dict[str, float]:
        asked = dict(zip(watch.keys, (question for part in watch.parts.values() for question in part)))
        key_of = {id(question): key for key, question in asked.items()}
        texts: dict[Any, str] = {}
        tokens = min(watch.benchmark.max_new_tokens, MOST_NEW_TOKENS)
        with _as_generator(self.policy), Progress(watch.benchmark.name, len(asked), "questions") as progress:
            if self._generator is None:
                self._generator = make_generator(
                    self.policy.model, self._processor, self._stops, self._bos, self._today
                )

            def done(question: Question, replies: list[Reply] | Failed) -> None:
                if stopped():
                    raise _Stopped
                if isinstance(replies, Failed):
                    raise UserError(f"data.eval: {question.where}: {replies}")
                texts[key_of[id(question)]] = replies[0].text
                progress.tick()

            answer_in_batches(
                self._generator, list(asked.values()), [images for _, images in asked],
                Decoding(max_new_tokens=tokens), batch_budget(self.policy.model), done,
            )  # fmt: skip
        return watch.figures(texts)


@contextlib.contextmanager
def _as_generator(policy: Policy) -> Iterator[None]:
    """The policy in evaluation mode with its ordinary attention; everything as it was afterwards."""
    shared, training, random = policy.shared, policy.training, random_state()
    policy.set_shared(False)
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
        policy.set_shared(shared)
        set_random_state(random)
