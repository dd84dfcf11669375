"""A layout's visible (query, key) pairs cut into parts that ordinary attention kernels do, each pair in one part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shared_prefix import SharedPrefixLayout

# CPU kernels do whole squares where causality needs half. Segments are therefore cut into blocks of about this many rows:
# less waste on the diagonal, still enough rows to keep the matrix products busy.
BLOCK = 128


class Slice(NamedTuple):
    """Rows [start, stop) of a (1, heads, T, ...) tensor."""

    start: int
    stop: int

    def take(self, x: Tensor) -> Tensor:
        return x[:, :, self.start : self.stop]

    def put(self, whole: Tensor, part: Tensor) -> None:
        self.take(whole).copy_(part)

    def add(self, whole: Tensor, part: Tensor) -> None:
        self.take(whole).add_(part)


class Segments(NamedTuple):
    """`segments` neighbouring segments of `length` rows from `start`, as a batch (segments, heads, length, ...): a view."""

    start: int
    segments: int
    length: int

    def take(self, x: Tensor) -> Tensor:
        rows = x[0, :, self.start : self.start + self.segments * self.length]
        return rows.unflatten(1, (self.segments, self.length)).transpose(0, 1)

    def put(self, whole: Tensor, part: Tensor) -> None:
        self.take(whole).copy_(part)

    def add(self, whole: Tensor, part: Tensor) -> None:
        self.take(whole).add_(part)


class All(NamedTuple):
    """Every row, in order. A plan whose first part has it has no other first part."""

    def take(self, x: Tensor) -> Tensor:
        return x

    def collect(self, part: Tensor, whole: Tensor) -> Tensor:
        return part


class Gather(NamedTuple):
    """The rows of an int64 index, copied."""

    rows: Tensor

    def take(self, x: Tensor) -> Tensor:
        # in the order of memory, (1, T, heads, K)
        return x.transpose(1, 2).index_select(1, self.rows).transpose(1, 2)

    def put(self, whole: Tensor, part: Tensor) -> None:
        whole.transpose(1, 2).index_copy_(1, self.rows, part.transpose(1, 2))

    def add(self, whole: Tensor, part: Tensor) -> None:
        whole.transpose(1, 2).index_add_(1, self.rows, part.transpose(1, 2))

    def collect(self, part: Tensor, whole: Tensor) -> Tensor:
        """Rows summed, in fp32, to where they were taken from; a row may have been taken several times."""
        sums = torch.zeros_like(whole, dtype=torch.promote_types(whole.dtype, torch.float32))
        self.add(sums, part.to(sums.dtype))
        return sums.to(whole.dtype)


class Part(NamedTuple):
    """Queries over keys. `how` is the kernel's own business; here it is a `Visible`."""

    queries: Any
    keys: Any
    how: Any


class Visible(NamedTuple):
    """Which pairs of a part count: all, the causal ones, or those with key index - query index >= `above`."""

    causal: bool = False
    above: int | None = None


class Plan(NamedTuple):
    """`first` holds every row once as query and as key; the parts in `more` are merged onto it."""

    first: list[Part]
    more: list[Part]


class Piece(NamedTuple):
    """Positions [start, stop) that are one diagonal square; a bidirectional span that was cut goes on to `end`."""

    start: int
    stop: int
    end: int
    causal: bool


def attention_plan(layout: SharedPrefixLayout, window: int | None = None, block: int = BLOCK) -> Plan:
    """Cut a layout into squares on the diagonal and rectangles beside it.

    A prompt and its first completion are one causal run; the other completions are runs of their own, whose queries also
    see the prompt.
    """
    window = layout.binding_window(window)
    squares: list[tuple[int, int, bool]] = []
    more: list[Part] = []
    row = 0
    for (prompt, lengths), spans in zip(layout.groups, layout.spans(), strict=True):
        own = row + prompt + lengths[0]
        end = row + prompt + sum(lengths)
        if window is None and own < end:
            more.append(Part(Slice(own, end), Slice(row, row + prompt), Visible()))
        runs = [(row, 0, prompt + lengths[0])]
        for length in lengths[1:]:
            runs.append((own, prompt, prompt + length))
            own += length
        for start, first, stop in runs:
            shift = start - first
            for piece in _pieces(first, stop, () if first else spans, block, window):
                squares.append((piece.start + shift, piece.stop - piece.start, piece.causal))
                if piece.end > piece.stop:
                    keys = Slice(piece.stop + shift, piece.end + shift)
                    more.append(Part(Slice(piece.start + shift, piece.stop + shift), keys, Visible()))
                more += _before(piece, shift, first, piece.start, shift, window)
                if window is not None and first:
                    more += _before(piece, shift, 0, first, row, window)
        row = end
    return Plan(_batched(squares), more)


def _pieces(
    first: int, stop: int, spans: tuple[tuple[int, int], ...], block: int, window: int | None
) -> Iterator[Piece]:
    """Cut positions [first, stop) at the spans' ends, and to at most about `block`, at most `window`, positions."""
    for a, b in [*spans, (stop, stop)]:
        for start, end in _cut(first, a, block, window):
            yield Piece(start, end, end, True)
        # a span needs no cut but for the window: its square has no half to waste
        for start, end in _cut(a, b, max(block, b - a), window):
            yield Piece(start, end, b, False)
        first = b


def _cut(start: int, stop: int, block: int, window: int | None) -> Iterator[tuple[int, int]]:
    if start >= stop:
        return
    length = stop - start
    pieces = max(1, round(length / block))
    if window is not None and length > window * pieces:
        pieces = -(-length // min(block, window))
    size = -(-length // pieces)
    for a in range(start, stop, size):
        yield a, min(a + size, stop)


def _before(
    piece: Piece, shift: int, first: int, stop: int, key_shift: int, window: int | None
) -> Iterator[Part]:
    """Parts of a piece's queries over the earlier positions [first, stop); rows are positions plus a shift."""
    start, end = piece.start, piece.stop
    if window is None:
        if first < stop:
            yield Part(
                Slice(start + shift, end + shift), Slice(first + key_shift, stop + key_shift), Visible()
            )
        return
    first = max(first, start - window + 1)
    seen_by_all = max(first, end - window)
    if seen_by_all < stop:
        keys = Slice(seen_by_all + key_shift, stop + key_shift)
        yield Part(Slice(start + shift, end + shift), keys, Visible())
    stop = min(stop, seen_by_all)
    if first < stop:
        # the strip that moves out of the window row by row; rows that see none of it are left out
        rows = Slice(start + shift, min(end, stop - 1 + window) + shift)
        keys = Slice(first + key_shift, stop + key_shift)
        yield Part(rows, keys, Visible(above=start - first - window + 1))


def _batched(squares: list[tuple[int, int, bool]]) -> list[Part]:
    # Neighbours of equal length become one batch, without a copy: a strided view.
    runs: list[tuple[Segments, bool]] = []
    for start, length, causal in squares:
        if runs:
            last, alike = runs[-1]
            if last.length == length and alike == causal and last.start + last.segments * length == start:
                runs[-1] = (last._replace(segments=last.segments + 1), causal)
                continue
        runs.append((Segments(start, 1, length), causal))
    return [Part(rows, rows, Visible(causal=causal)) for rows, causal in runs]
