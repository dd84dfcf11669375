"""Batches: the tokens, targets, pairs, images and references of a pack, the same from worker processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fasttrain.config import DataConfig
from fasttrain.data.batch import PackMaker, load_packs, whole
from fasttrain.data.images import open_image
from fasttrain.data.packs import Pack, Piece, plan_step
from fasttrain.data.prepare import prepare
from fasttrain.data.prepared import PreparedData
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.errors import UserError
from fasttrain.files import HashMemo
from fasttrain.reference.cache import ReferenceCache
from fasttrain.reference.key import CompletionKeys


@pytest.fixture
def chat(tiny_llava: Path) -> ChatTokenizer:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_llava, backend="pil")
    return ChatTokenizer(processor, [processor.tokenizer.eos_token_id])


@pytest.fixture
def data(chat: ChatTokenizer, vision_pairs: Callable[..., Path], tmp_path: Path) -> PreparedData:
    path = vision_pairs(tmp_path / "v", 20, per_prompt=(1, 3, 2, 4))
    memo = HashMemo(tmp_path / "hashes.sqlite")
    prepared = prepare(str(path), DataConfig(train=str(path)), chat, memo, seed=0)
    memo.close()
    return prepared


KEYS = CompletionKeys("model", "pixels")


@pytest.fixture
def cache(data: PreparedData, tmp_path: Path) -> Iterator[ReferenceCache]:
    """References that tell their group, completion and position: group + completion / 100 + token / 10,000."""
    cache = ReferenceCache(tmp_path / "cache.sqlite", {})
    for group in data:
        hashes = [batch_hash(ref.read()) for ref in data.images(group.number)]
        keys = KEYS.of_group(group.prompt_ids, hashes, group.completion_ids)
        cache.put(zip(keys, [known(group.number, c, len(ids)) for c, ids in enumerate(group.completion_ids)]))
    yield cache
    cache.close()


def batch_hash(content: bytes) -> str:
    import hashlib

    return hashlib.blake2b(content, digest_size=16).hexdigest()


def known(group: int, completion: int, tokens: int) -> np.ndarray:
    return (group + completion / 100 + np.arange(tokens) / 10_000).astype(np.float32)


@pytest.fixture
def maker(data: PreparedData, chat: ChatTokenizer, cache: ReferenceCache) -> PackMaker:
    return PackMaker(data, chat.pixels, KEYS, cache)


def packs_of(data: PreparedData, budget: int, shared: bool) -> list[Pack]:
    return list(plan_step(data, 1, 1.0, np.arange(len(data)), budget, shared).packs)


BUDGETS = [(10_000, True), (150, True), (1, True), (10_000, False), (150, False)]


@pytest.mark.parametrize(("budget", "shared"), BUDGETS)
def test_a_batch_holds_its_pack_token_for_token(
    budget: int, shared: bool, data: PreparedData, maker: PackMaker
) -> None:
    for pack in packs_of(data, budget, shared):
        batch = maker[pack]
        tokens: list[int] = []
        targets: list[int] = []
        layout, sequences, reference = [], [], []
        for piece in pack.pieces:
            group = data.group(piece.group)
            answers = [group.completion_ids[index].tolist() for index in piece.completions]
            for run in [answers] if shared else [[answer] for answer in answers]:
                layout.append((len(group.prompt_ids), [len(answer) for answer in run]))
                tokens += [*group.prompt_ids.tolist(), *(token for answer in run for token in answer)]
            targets += [token for answer in answers for token in answer]
            sequences += [(piece.group, index) for index in piece.completions]
            reference += [known(piece.group, i, len(a)) for i, a in zip(piece.completions, answers)]
        assert batch.input_ids_T.tolist() == tokens and batch.target_N.tolist() == targets
        assert batch.layout == layout and batch.sequence_ids == sequences and batch.shared == shared
        assert batch.lengths_S.tolist() == [len(answer) for answer in reference]
        assert batch.reference_N.tolist() == np.concatenate(reference).tolist()
        assert batch.pack == pack and batch.broken == []
        assert (batch.input_ids_T.dtype, batch.reference_N.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(("budget", "shared"), BUDGETS)
def test_pairs_point_at_the_sequences_of_their_answers(
    budget: int, shared: bool, data: PreparedData, maker: PackMaker
) -> None:
    for pack in packs_of(data, budget, shared):
        batch = maker[pack]
        found = [(batch.sequence_ids[c], batch.sequence_ids[r]) for c, r in batch.pairs_P2.tolist()]
        inside = {(piece.group, index) for piece in pack.pieces for index in piece.completions}
        truth = [
            ((piece.group, c), (piece.group, r))
            for piece in pack.pieces
            for c, r in data.pairs(piece.group).tolist()
            if (piece.group, c) in inside and (piece.group, r) in inside
        ]
        assert found == truth


@pytest.mark.parametrize("shared", [True, False])
def test_an_image_is_decoded_once_per_group_and_stands_before_each_of_its_runs(
    shared: bool, data: PreparedData, maker: PackMaker, chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat.pixels is not None
    (pack,) = packs_of(data, 10**6, shared)
    truth = []
    for piece in pack.pieces:
        contents = [ref.read() for ref in data.images(piece.group)]
        for _ in [0] if shared else piece.completions:
            truth += [chat.pixels([content])["pixel_values"] for content in contents]
    opened: list[bytes] = []
    monkeypatch.setattr(
        "fasttrain.data.images.open_image", lambda content: opened.append(content) or open_image(content)
    )
    batch = maker[pack]
    assert len(opened) == sum(data.image_count(number) for number in range(len(data)))
    pixels = [inputs["pixel_values"] for inputs in batch.inputs if inputs]
    assert torch.cat(pixels).equal(torch.cat(truth)) and len(batch.images_per_run) == len(batch.layout)
    assert len(batch.inputs) == (1 if shared else len(batch.layout))
    assert sum(batch.images_per_run) == batch.images == len(truth)
    # every image token of the pack belongs to one of its images, in order
    assert (batch.input_ids_T == chat.image_token_id).sum() == 16 * batch.images


def test_a_pack_of_text_alone_has_no_pixels(data: PreparedData, maker: PackMaker) -> None:
    number = next(number for number in range(len(data)) if not data.image_count(number))
    batch = maker[Pack((Piece(number, (0, 1)),))]
    assert batch.inputs == [{}] and batch.images_per_run == [0]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.equal(right)
    if isinstance(left, list) and left and isinstance(left[0], dict):
        return all(
            a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
            for a, b in zip(left, right, strict=True)
        )
    return bool(left == right)


def test_worker_processes_give_the_same_batches_in_the_same_order(
    data: PreparedData, maker: PackMaker
) -> None:
    packs = [*packs_of(data, 150, True), *packs_of(data, 150, False)]
    made = {workers: list(load_packs(maker, iter(packs), workers, pin=False)) for workers in (0, 2)}
    assert [batch.pack for batch in made[0]] == [batch.pack for batch in made[2]] == packs
    for here, there in zip(made[0], made[2], strict=True):
        assert {name for name, value in vars(here).items() if not same(value, vars(there)[name])} == set()


def test_loading_draws_nothing_from_the_random_state_of_dropout(data: PreparedData, maker: PackMaker) -> None:
    for workers in (0, 2):
        torch.manual_seed(3)
        list(load_packs(maker, packs_of(data, 150, True)[:2], workers, pin=False))
        state = torch.get_rng_state()
        torch.manual_seed(3)
        assert state.equal(torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_after_indexing_leaves_its_group_out_and_is_named(
    workers: int, data: PreparedData, maker: PackMaker
) -> None:
    number = next(number for number in range(len(data)) if data.image_count(number) == 1)
    path = data.images(number)[0].path
    assert path is not None
    path.write_bytes(path.read_bytes()[:60])
    (pack,) = packs_of(data, 10**6, True)
    (batch,) = load_packs(maker, [pack], workers, pin=False)
    assert [entry[0] for entry in batch.broken] == [number] and str(path) in batch.broken[0][1]
    assert number not in {group for group, _ in batch.sequence_ids}
    assert len(batch.layout) == len(data) - 1
    with pytest.raises(UserError, match=rf"line \d+: images: wanted an image, got .*{path.name}"):
        list(whole([batch], data))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_was_exchanged_since_its_reference_was_computed_is_an_error(
    workers: int, data: PreparedData, maker: PackMaker, tiny_models: ModuleType
) -> None:
    number = next(number for number in range(len(data)) if data.image_count(number) == 1)
    path = data.images(number)[0].path
    assert path is not None
    tiny_models.draw_image(path, seed=77)
    with pytest.raises(
        UserError, match="its image or text changed since its reference log-probs were computed"
    ):
        list(load_packs(maker, packs_of(data, 10**6, True), workers, pin=False))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_is_one_line_with_its_row(
    workers: int, data: PreparedData, maker: PackMaker, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "v" / "images")
    with pytest.raises(UserError, match=r"pairs\.jsonl line \d+: images: wanted an existing image file"):
        list(load_packs(maker, packs_of(data, 10**6, True), workers, pin=False))


def test_filling_the_cache_needs_no_references(data: PreparedData, chat: ChatTokenizer) -> None:
    maker = PackMaker(data, chat.pixels, KEYS, None)
    (pack,) = packs_of(data, 10**6, True)
    batch = maker[pack]
    assert batch.reference_N is None and len(set(batch.keys)) == len(batch.sequence_ids) == len(batch.keys)
