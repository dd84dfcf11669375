"""A pack as tensors: made in a worker process ahead of the step, moved to the device whole."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasttrain.data.images import PixelMaker, hash_bytes
from fasttrain.data.packs import Pack
from fasttrain.data.prepared import Group, PreparedData
from fasttrain.errors import UserError
from fasttrain.reference.cache import ReferenceCache
from fasttrain.reference.key import CompletionKeys


@dataclass(frozen=True, kw_only=True)
class PackBatch:
    """One forward pass. Sequences are completions, in the order of the pack's pieces; N rows are their tokens in turn.

    `layout` lists (prompt length, completion lengths) of each run: a group with its completions, or one sequence.
    Pairs index the pack's sequences; those of split groups are left to the step (`sequence_ids`).
    """

    pack: Pack
    shared: bool
    layout: list[tuple[int, list[int]]]
    input_ids_T: Tensor
    target_N: Tensor
    lengths_S: Tensor
    sequence_ids: list[tuple[int, int]]
    pixel_ICHW: Tensor | None
    images_per_run: list[int]
    pairs_P2: Tensor
    reference_N: Tensor | None
    keys: list[bytes]
    broken: list[tuple[int, str]]

    def to(self, device: torch.device) -> PackBatch:
        moved = {
            entry.name: getattr(self, entry.name).to(device, non_blocking=True)
            for entry in dataclasses.fields(self)
            if isinstance(getattr(self, entry.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> PackBatch:
        pinned = {
            entry.name: getattr(self, entry.name).pin_memory()
            for entry in dataclasses.fields(self)
            if isinstance(getattr(self, entry.name), Tensor)
        }
        return dataclasses.replace(self, **pinned)


class PackMaker(Dataset[Any]):
    """Makes the PackBatch of a Pack: tokens from the prepared data, pixels from the images, references from the cache."""

    def __init__(
        self,
        data: PreparedData,
        pixels: PixelMaker | None,
        keys: CompletionKeys,
        cache: ReferenceCache | None,
    ) -> None:
        self.data, self.pixels, self.keys, self.cache = data, pixels, keys, cache

    def __getitem__(self, pack: Pack) -> PackBatch | UserError:  # type: ignore[override]
        """The batch, or the user's mistake as a value: raised in a worker it would arrive as a traceback."""
        try:
            return self._make(pack)
        except UserError as error:
            return UserError(str(error))

    def _make(self, pack: Pack) -> PackBatch:
        batch = _Builder(pack.shared)
        for piece in pack.pieces:
            group = self.data.group(piece.group)
            try:
                hashes, pixels = self._images(group)
            except (OSError, ValueError) as error:
                batch.broken.append((piece.group, str(error)))
                continue
            keys = self.keys.of_group(
                group.prompt_ids, hashes, [group.completion_ids[c] for c in piece.completions]
            )
            batch.add(group, piece.completions, pixels, keys)
        return batch.finish(pack, self._reference(batch))

    def _images(self, group: Group) -> tuple[list[str], Tensor | None]:
        refs = self.data.images(group.number)
        if not refs or self.pixels is None:
            return [], None
        contents = [ref.read() for ref in refs]
        try:
            return [hash_bytes(content) for content in contents], self.pixels(contents)
        except ValueError as error:
            raise ValueError(
                f"{refs[0].name() if len(refs) == 1 else 'one of its images'}: {error}"
            ) from None

    def _reference(self, batch: _Builder) -> Tensor | None:
        if self.cache is None or not batch.keys:
            return None
        found = self.cache.get(batch.keys)
        missing = [batch.where[index] for index, key in enumerate(batch.keys) if key not in found]
        if missing:
            raise UserError(
                f"{missing[0]}: its image or text changed since its reference log-probs were computed; run again"
            )
        return torch.from_numpy(np.concatenate([found[key] for key in batch.keys]))


class _Builder:
    """Collects runs of a pack."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.layout: list[tuple[int, list[int]]] = []
        self.ids: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.sequence_ids: list[tuple[int, int]] = []
        self.pixels: list[Tensor] = []
        self.images_per_run: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.keys: list[bytes] = []
        self.where: list[str] = []
        self.broken: list[tuple[int, str]] = []

    def add(
        self, group: Group, completions: tuple[int, ...], pixels: Tensor | None, keys: list[bytes]
    ) -> None:
        first = {completion: len(self.keys) + index for index, completion in enumerate(completions)}
        texts = [group.completion_ids[completion] for completion in completions]
        runs = [texts] if self.shared else [[text] for text in texts]
        for run in runs:
            self.layout.append((len(group.prompt_ids), [len(text) for text in run]))
            self.ids += [group.prompt_ids, *run]
            self.images_per_run.append(0 if pixels is None else len(pixels))
            if pixels is not None:
                self.pixels.append(pixels)
        self.targets += texts
        self.sequence_ids += [(group.number, completion) for completion in completions]
        self.keys += keys
        self.where += [group.where] * len(keys)
        for chosen, rejected in group.pairs.tolist():
            if chosen in first and rejected in first:
                self.pairs.append((first[chosen], first[rejected]))

    def finish(self, pack: Pack, reference: Tensor | None) -> PackBatch:
        empty = [np.zeros(0, np.int32)]
        return PackBatch(
            pack=pack,
            shared=self.shared,
            layout=self.layout,
            input_ids_T=torch.from_numpy(np.concatenate(self.ids or empty).astype(np.int64)),
            target_N=torch.from_numpy(np.concatenate(self.targets or empty).astype(np.int64)),
            lengths_S=torch.tensor([len(text) for text in self.targets], dtype=torch.int64),
            sequence_ids=self.sequence_ids,
            pixel_ICHW=torch.cat(self.pixels) if self.pixels else None,
            images_per_run=self.images_per_run,
            pairs_P2=torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2),
            reference_N=reference,
            keys=self.keys,
            broken=self.broken,
        )


def _start_worker(_: int) -> None:
    # The parent decides when training ends; a signal to the whole process group must not kill its workers first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _itself(value: Any) -> Any:
    return value


def whole(batches: Iterable[PackBatch], data: PreparedData) -> Generator[PackBatch]:
    """The same batches; UserError at one that had to leave a group out because its image no longer opens."""
    for batch in batches:
        for number, problem in batch.broken:
            raise UserError(f"{data.where(number)}: images: wanted an image, got {problem}")
        yield batch


def load_packs(maker: PackMaker, packs: Iterable[Pack], workers: int, pin: bool) -> Generator[PackBatch]:
    """Batches of `packs`, in order, prepared ahead of time by worker processes; `packs` may be lazy."""
    options: dict[str, Any] = {}
    if workers:
        options = {"prefetch_factor": 2, "multiprocessing_context": "fork", "worker_init_fn": _start_worker}
    loader: DataLoader[Any] = DataLoader(
        maker,
        batch_size=None,
        sampler=packs,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_itself,
        pin_memory=pin,
        generator=torch.Generator(),  # the global one belongs to dropout: a loader must not draw from it
        **options,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
