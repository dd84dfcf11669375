"""How long the prompts and answers are: from the recipe's pair file, from `--lengths`, or typical numbers that are said to be."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fasttrain.config import DPOConfig
from fasttrain.data.packs import run_tokens
from fasttrain.data.prepare import prepare
from fasttrain.data.prepared import PreparedData
from fasttrain.errors import UserError
from fasttrain.files import user_path
from fasttrain.plan.planned_model import cached_snapshot

if TYPE_CHECKING:
    from fasttrain.data.tokens import ChatTokenizer

# arXiv 2402.10884: 5,084 pairs, one per prompt; 576 image tokens of LLaVA-1.5, its template and a question; two answers.
TYPICAL_PAIRS, TYPICAL_PROMPT, TYPICAL_ANSWER = 5084, 630, 130


@dataclass(frozen=True)
class GroupShape:
    """`count` prompts of so many tokens and images, each with these completions, so many tokens `scored`, and pairs of them."""

    prompt: int
    completions: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    images: int
    count: int = 1
    scored: tuple[int, ...] | None = None  # None: all tokens of the completions

    def run_tokens(self, shared: bool) -> int:
        """Tokens that one of them costs in one pass."""
        return run_tokens(np.array([self.prompt, *self.completions]), shared)

    def run_images(self, shared: bool) -> int:
        return self.images * (1 if shared else len(self.completions))


@dataclass
class Histogram:
    """The groups of a data set by length. Answers what planning asks of PreparedData: lengths, pairs and images by number."""

    shapes: list[GroupShape]
    source: str
    evaluated: Histogram | None = None  # of data.eval, where its pairs were read
    _starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._starts = np.cumsum([shape.count for shape in self.shapes])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _shape(self, number: int) -> GroupShape:
        return self.shapes[int(np.searchsorted(self._starts, number, side="right"))]

    def lengths(self, number: int) -> np.ndarray:
        """Prompt length, then completion lengths."""
        shape = self._shape(number)
        return np.array([shape.prompt, *shape.completions], np.int64)

    def scored(self, number: int) -> np.ndarray:
        """How many tokens of each completion are targets."""
        shape = self._shape(number)
        return np.array(shape.completions if shape.scored is None else shape.scored, np.int64)

    def pairs(self, number: int) -> np.ndarray:
        return np.array(self._shape(number).pairs, np.int64).reshape(-1, 2)

    def pair_count(self, number: int) -> int:
        return len(self._shape(number).pairs)

    def pair_counts(self) -> np.ndarray:
        """int64 (groups,): pairs of every group."""
        pairs = np.array([len(shape.pairs) for shape in self.shapes], np.int64)
        return np.repeat(pairs, [shape.count for shape in self.shapes])

    def image_count(self, number: int) -> int:
        return self._shape(number).images

    @property
    def pair_total(self) -> int:
        return sum(len(shape.pairs) * shape.count for shape in self.shapes)

    @property
    def tokens(self) -> int:
        """Prompts once, completions each."""
        return sum(shape.run_tokens(True) * shape.count for shape in self.shapes)

    @property
    def rows(self) -> int:
        """Targets, each of which a row predicts."""
        return sum(sum(shape.scored or shape.completions) * shape.count for shape in self.shapes)

    @property
    def images(self) -> int:
        return sum(shape.images * shape.count for shape in self.shapes)

    @property
    def completion_count(self) -> int:
        return sum(len(shape.completions) * shape.count for shape in self.shapes)

    def longest(self, shared: bool) -> int:
        """Tokens that the largest group costs in one pass."""
        return max(shape.run_tokens(shared) for shape in self.shapes)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with one completion, which no pack divides."""
        return max(shape.prompt + max(shape.completions, default=0) for shape in self.shapes)


def of_prepared(data: PreparedData, source: str) -> Histogram:
    """Every group of tokenized data, equal ones counted together."""
    seen: dict[GroupShape, int] = {}
    for number in range(len(data)):
        if not data.pair_count(number):
            continue
        prompt, *completions = data.lengths(number).tolist()
        pairs = tuple((int(c), int(r)) for c, r in data.pairs(number))
        scored = tuple(data.scored(number).tolist())
        shape = GroupShape(prompt, tuple(completions), pairs, data.image_count(number), scored=scored)
        seen[shape] = seen.get(shape, 0) + 1
    return Histogram([replace(shape, count=count) for shape, count in seen.items()], source)


def parse_lengths(texts: Sequence[str], images: int) -> Histogram:
    """From `PROMPT,COMPLETION,COUNT`: so many prompts with two completions of that length each; UserError if it is not that."""
    shapes = []
    for text in texts:
        match = re.fullmatch(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,12})\s*", text)
        if not match or min(map(int, match.groups())) < 1:
            raise UserError(
                f"--lengths: wanted PROMPT,COMPLETION,COUNT in tokens and pairs, each at least 1, got {text!r}"
            )
        prompt, completion, count = map(int, match.groups())
        shapes.append(GroupShape(prompt, (completion, completion), ((0, 1),), images, count))
    return Histogram(shapes, f"--lengths {' '.join(texts)}")


def typical(images: int, why: str) -> Histogram:
    """The paper's data: one pair per prompt, one image, LLaVA-1.5's lengths."""
    shape = GroupShape(TYPICAL_PROMPT, (TYPICAL_ANSWER, TYPICAL_ANSWER), ((0, 1),), images, TYPICAL_PAIRS)
    return Histogram([shape], f"typical lengths of LLaVA-1.5 data, not yours: {why}")


def find_histogram(config: DPOConfig, lengths: Sequence[str], model: Any) -> Histogram:
    """`--lengths`; else the recipe's pairs, tokenized, if they and the processor are there; else typical lengths.

    UserError for pairs, or for a processor of `model`, that training would refuse.
    """
    vision = hasattr(model.config, "vision_config")
    images = int(vision)
    if lengths:
        return parse_lengths(lengths, images)
    paths = [config.data.train] if isinstance(config.data.train, str) else config.data.train
    absent = [path for path in paths if not user_path(path).exists()]
    if absent:
        return typical(images, f"{absent[0]} is not there")
    folder = user_path(config.model.name)
    if folder.is_dir():
        return _read_pairs(config, _tokenizer(folder, config, vision), model, ", ".join(paths))
    snapshot = cached_snapshot(config.model)
    if snapshot is None:
        missing = f"{config.model.name} is neither a folder nor in the local hub cache"
        return typical(images, f"{missing}, so there is no tokenizer for {paths[0]}")
    try:
        chat = _tokenizer(snapshot, config, vision)
    except UserError as error:  # the cache need not hold all of a model
        return typical(images, f"the hub cache has no tokenizer for {paths[0]}: {error}")
    return _read_pairs(config, chat, model, ", ".join(paths))


def _tokenizer(folder: Path, config: DPOConfig, vision: bool) -> ChatTokenizer:
    from fasttrain.data.tokens import ChatTokenizer
    from fasttrain.model.load import load_processor, stop_token_ids

    processor = load_processor(folder, config.model, vision)
    return ChatTokenizer(processor, stop_token_ids(processor, folder), config.model.bos)


def _read_pairs(config: DPOConfig, chat: ChatTokenizer, model: Any, source: str) -> Histogram:
    from fasttrain.files import HashMemo, cache_root
    from fasttrain.progress import ticker
    from fasttrain.train.job_checks import check_grouping, check_image_token, check_vocabulary
    from fasttrain.train.watch import open_watches, split_eval

    check_grouping(config, model.config)
    check_vocabulary(chat, model)
    check_image_token(chat, model)
    data, seed = config.data, config.train.seed
    pair_files, folders = split_eval(data.eval)
    with contextlib.closing(HashMemo(cache_root() / "hashes.sqlite")) as memo:
        read = functools.partial(
            prepare, data=data, chat=chat, memo=memo, seed=seed, progress=ticker, whole=True
        )
        open_watches(folders, data, memo)
        found = of_prepared(read(data.train, limit_pairs=data.limit_pairs), source)
        if pair_files:
            found.evaluated = of_prepared(read(pair_files, limit_pairs=None), source)
    return found
