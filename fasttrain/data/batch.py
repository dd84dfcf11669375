"""A pack as tensors: made in a worker process ahead of the step, moved to the device whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasttrain.data.ahead import itself, start_worker, started
from fasttrain.data.answer_tokens import plain
from fasttrain.data.images import PixelMaker, hash_bytes, join_inputs
from fasttrain.data.packs import Pack
from fasttrain.data.prepared import Group, PreparedData
from fasttrain.errors import UserError
from fasttrain.reference.cache import ReferenceCache
from fasttrain.reference.key import CompletionKeys

if TYPE_CHECKING:
    from fasttrain.model.families import FamilyInputs, ImageInputs

NOBODY = -1  # the group of sequences that run at weight zero


@dataclass(frozen=True, kw_only=True)
class PackBatch:
    """One forward pass. Sequences are completions, in the order of the pack's pieces; N rows are their targets in turn: all their
    tokens, or those at the places `scored_N`.

    `layout` lists (prompt length, completion lengths) of each run: a group with its completions, or one sequence.
    Pairs index the pack's sequences; those of split groups are left to the step (`sequence_ids`).
    `inputs` are the model's arguments besides token ids: one entry for a shared pack, one for each run of another.
    `both_ways` lists, per run, the spans of its prompt that are not seen causally.
    `uses_T` says in how many of an ordinary trainer's sequences, two a pair, each token stands: 0 in repeats of other work.
    """

    pack: Pack
    shared: bool
    layout: list[tuple[int, list[int]]]
    input_ids_T: Tensor
    uses_T: Tensor
    target_N: Tensor
    lengths_S: Tensor
    sequence_ids: list[tuple[int, int]]
    inputs: list[ImageInputs]
    images_per_run: list[int]
    both_ways: list[list[tuple[int, int]]]
    pairs_P2: Tensor
    reference_N: Tensor | None
    keys: list[bytes]
    broken: list[tuple[int, str]]
    pair_ids: list[tuple[int, int, int]] = field(default_factory=list)  # group, chosen, rejected of pairs_P2
    scored_N: Tensor | None = None
    image_tokens: int = 0  # places of the prompts that image features fill

    @property
    def images(self) -> int:
        """How many images the pass encodes."""
        return sum(self.images_per_run)

    @property
    def given(self) -> int:
        """How many tokens of its completions are no targets."""
        return sum(sum(completions) for _, completions in self.layout) - len(self.target_N)

    def to(self, device: torch.device) -> PackBatch:
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackBatch:
        return self._mapped(lambda tensor: tensor.pin_memory())

    def without_inputs(self) -> PackBatch:
        """The same batch without its images, which are most of its bytes; it cannot be run any more."""
        return dataclasses.replace(self, inputs=[])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> PackBatch:
        done: dict[int, Tensor] = {}  # the runs of one prompt have the same image tensors

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = change(tensor)
            return done[id(tensor)]

        changed: dict[str, Any] = {
            entry.name: once(getattr(self, entry.name))
            for entry in dataclasses.fields(self)
            if isinstance(getattr(self, entry.name), Tensor)
        }
        inputs = [{name: once(value) for name, value in entry.items()} for entry in self.inputs]
        return dataclasses.replace(self, inputs=inputs, **changed)


class PackMaker(Dataset[Any]):
    """Makes the PackBatch of a Pack: tokens from the prepared data, pixels from the images, references from the cache."""

    def __init__(
        self,
        data: PreparedData,
        pixels: PixelMaker | None,
        keys: CompletionKeys,
        cache: ReferenceCache | None,
        family: FamilyInputs | None = None,
        image_token_id: int | None = None,
    ) -> None:
        self.data, self.pixels, self.keys, self.cache, self.family = data, pixels, keys, cache, family
        self.image_token_id = image_token_id

    def __getitem__(self, item: Pack | _Carried) -> PackBatch | UserError:  # type: ignore[override]
        """The batch, or the user's mistake as a value: raised in a worker it would arrive as a traceback."""
        pack = item.pack if isinstance(item, _Carried) else item
        if isinstance(item, _Carried):
            self.data.remember(item.groups)
        try:
            return self._make(pack)
        except UserError as error:
            return UserError(str(error))

    def _make(self, pack: Pack) -> PackBatch:
        batch = _Builder(pack.shared, self.family, pack.fill, self.image_token_id)
        for piece in pack.pieces:
            group = self.data.group(piece.group)
            try:
                hashes, images = self._images(group)
            except (OSError, ValueError) as error:
                batch.broken.append((piece.group, str(error)))
                continue
            keys = self.keys.of_group(
                group.prompt_ids, hashes, [group.completion_ids[c] for c in piece.completions]
            )
            batch.add(group, piece.completions, images, len(hashes), keys)
        return batch.finish(pack, self._reference(batch))

    def _images(self, group: Group) -> tuple[list[str], ImageInputs | None]:
        refs = self.data.images(group.number)
        if not refs or self.pixels is None:
            return [], None
        contents = [ref.read() for ref in refs]
        try:
            return [hash_bytes(content) for content in contents], self.pixels(contents)
        except ValueError as error:
            problem = " ".join(str(error).split())  # processors give advice on lines of its own
            raise ValueError(
                f"{refs[0].name() if len(refs) == 1 else 'one of its images'}: {problem}"
            ) from None

    def _reference(self, batch: _Builder) -> Tensor | None:
        if self.cache is None or not batch.keys:
            return None
        found = self.cache.get(batch.keys)
        missing = [batch.where[index] for index, key in enumerate(batch.keys) if key not in found]
        if missing:
            self.cache.forget_complete()  # else a cache that lost the row would stop every later run too
            raise UserError(
                f"{missing[0]}: its image or text changed since its reference log-probs were computed; run again"
            )
        return torch.from_numpy(np.concatenate([found[key] for key in batch.keys]))


class _Carried(NamedTuple):
    """A pack on its way to another process, with those of its groups that only this one has tokens of."""

    pack: Pack
    groups: list[Group]


def _carried(packs: Iterable[Pack], data: PreparedData) -> Generator[Pack | _Carried]:
    for pack in packs:
        numbers = dict.fromkeys(piece.group for piece in pack.pieces)
        groups = [data.group(number) for number in numbers if data.is_lazy(number)]
        yield _Carried(pack, groups) if groups else pack


class _Builder:
    """Collects runs of a pack."""

    def __init__(
        self, shared: bool, family: FamilyInputs | None, fill: bool, image_token_id: int | None = None
    ) -> None:
        self.shared, self.family, self.image_token_id = shared, family, image_token_id
        self.fill = (
            fill  # repeats another rank's work: its sequences belong to nobody, its pairs do not count
        )
        self.layout: list[tuple[int, list[int]]] = []
        self.ids: list[np.ndarray] = []
        self.uses: list[np.ndarray] = []
        self.completions: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []  # the same, what is no target as ~id
        self.prompts: list[np.ndarray] = []
        self.sequence_ids: list[tuple[int, int]] = []
        self.images: list[ImageInputs | None] = []
        self.images_per_run: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.pair_ids: list[tuple[int, int, int]] = []
        self.keys: list[bytes] = []
        self.where: list[str] = []
        self.broken: list[tuple[int, str]] = []

    def add(
        self, group: Group, completions: tuple[int, ...], images: ImageInputs | None, count: int, keys: list[bytes]
    ) -> None:  # fmt: skip
        first = {completion: len(self.keys) + index for index, completion in enumerate(completions)}
        written = [group.completion_ids[completion] for completion in completions]
        texts = [plain(ids) for ids in written]
        counts = np.bincount(group.pairs.reshape(-1), minlength=max(completions) + 1) * (not self.fill)
        used = counts[list(completions)]
        runs = [(texts, used)] if self.shared else [([text], used[[n]]) for n, text in enumerate(texts)]
        for run, times in runs:
            lengths = [len(text) for text in run]
            self.layout.append((len(group.prompt_ids), lengths))
            self.ids += [group.prompt_ids, *run]
            self.uses.append(np.repeat([times.sum(), *times], [len(group.prompt_ids), *lengths]))
            self.images_per_run.append(count)
            self.images.append(images)
            self.prompts.append(group.prompt_ids)
        self.completions += texts
        self.targets += written
        self.sequence_ids += [(NOBODY if self.fill else group.number, c) for c in completions]
        self.keys += keys
        self.where += [group.where] * len(keys)
        for chosen, rejected in () if self.fill else group.pairs.tolist():
            if chosen in first and rejected in first:
                self.pairs.append((first[chosen], first[rejected]))
                self.pair_ids.append((group.number, chosen, rejected))

    def finish(self, pack: Pack, reference: Tensor | None) -> PackBatch:
        empty = [np.zeros(0, np.int32)]
        written = np.concatenate(self.targets or empty).astype(np.int64)
        scored = written >= 0
        return PackBatch(
            pack=pack,
            shared=self.shared,
            layout=self.layout,
            input_ids_T=torch.from_numpy(np.concatenate(self.ids or empty).astype(np.int64)),
            uses_T=torch.from_numpy(np.concatenate(self.uses or empty).astype(np.float32)),
            target_N=torch.from_numpy(written[scored]),
            scored_N=None if scored.all() else torch.from_numpy(np.flatnonzero(scored)),
            lengths_S=torch.tensor([np.count_nonzero(ids >= 0) for ids in self.targets], dtype=torch.int64),
            sequence_ids=self.sequence_ids,
            inputs=self._inputs(),
            images_per_run=self.images_per_run,
            both_ways=[self.family.spans(prompt) if self.family else [] for prompt in self.prompts],
            pairs_P2=torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2),
            reference_N=reference,
            keys=self.keys,
            broken=self.broken,
            pair_ids=self.pair_ids,
            image_tokens=sum(int((prompt == self.image_token_id).sum()) for prompt in self.prompts),
        )

    def _inputs(self) -> list[ImageInputs]:
        """The arguments of the one shared pass, or of every run's pass."""
        if not self.layout:
            return []
        if not self.shared:
            return [self._inputs_of_run(number) for number in range(len(self.layout))]
        inputs = join_inputs([images for images in self.images if images])
        if self.family is not None:
            lengths = [completions for _, completions in self.layout]
            positions = self.family.positions(list(zip(self.prompts, lengths, self.images, strict=True)))
            if positions is not None:
                inputs["position_ids"] = positions[:, None]
            inputs.update(self.family.expert_types(np.concatenate(self.ids)))
        return [inputs]

    def _inputs_of_run(self, number: int) -> ImageInputs:
        images = self.images[number]
        if self.family is None:
            return dict(images or {})
        ids = np.concatenate([self.prompts[number], self.completions[number]])
        prompt = len(self.prompts[number])
        return {**(images or {}), **self.family.sequence(ids, images, prompt)}


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
        options = {"prefetch_factor": 2, "multiprocessing_context": "fork", "worker_init_fn": start_worker}
        packs = _carried(packs, maker.data) if maker.data.lazy else packs  # type: ignore[assignment]
    loader: DataLoader[Any] = DataLoader(
        maker,
        batch_size=None,
        sampler=packs,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=itself,
        pin_memory=pin,
        generator=torch.Generator(),  # the global one belongs to dropout: a loader must not draw from it
        **options,
    )
    for batch in started(loader):
        if isinstance(batch, UserError):
            raise batch
        yield batch
