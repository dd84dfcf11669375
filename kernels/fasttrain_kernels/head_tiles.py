"""How the (N rows, V columns) of logits are cut into tiles, and the matrix products of one tile, with fp32 results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# CPU: bytes of one fp32 tile of logits; between its two products it has to stay in the L2 cache of one core.
_CPU_TILE_BYTES = 1 << 19
# CPU: bytes of a weight tile widened to fp32 where the operands are 16-bit.
_CPU_WIDE_BYTES = 4 << 20
# Rows of a tile: enough to amortise reading the weight tile, few enough to leave it wide.
_CPU_ROWS, _GPU_ROWS = 512, 1024
# CPU: threads that share a block of rows, each with a slice of the vocabulary and an accumulator of its own.
_CPU_SLICES = 4
# CPU: multiplications below which one thread is not worth leaving.
_CPU_WORTH_THREADS = 1 << 24
# GPU: columns of a tile. A row of it is held in the registers of one program, the tile (32 MiB) in the L2 cache.
_GPU_COLUMNS = 8192


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """[start, stop) in slices of `size`, the last one shorter."""
    return (slice(a, min(a + size, stop)) for a in range(start, stop, size))


@dataclass(frozen=True)
class Cut:
    """Blocks of rows, of which `together` are worked on at a time, each by one task per slice of the vocabulary."""

    rows: list[slice]
    together: int
    vocabulary: list[slice]
    columns: int


def cut(hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Cut:
    """Choose tiles for a product; on CPU as many tasks at a time as torch has threads, on GPU one."""
    (n, d), v = hidden_ND.shape, weight_VD.shape[0]
    if hidden_ND.device.type != "cpu":
        return Cut(list(blocks(0, n, _GPU_ROWS)), 1, [slice(0, v)], min(v, _GPU_COLUMNS))
    threads = torch.get_num_threads() if n * d * v >= _CPU_WORTH_THREADS else 1
    slices = min(threads, _CPU_SLICES)
    together = max(1, min(threads // slices, n // 64))
    rows = max(1, min(_CPU_ROWS, -(-n // together)))
    columns = _CPU_TILE_BYTES // (rows * accumulator_dtype(dtype).itemsize)
    if weight_VD.dtype != accumulator_dtype(dtype):
        columns = min(columns, _CPU_WIDE_BYTES // (d * 4))
    share = -(-v // slices)
    return Cut(list(blocks(0, n, rows)), together, list(blocks(0, v, share)), max(64, columns))


class Tiles:
    """Makes the products of tiles of at most (rows, columns), with a buffer that holds one tile of logits at a time.

    `dtype` is what the operands are rounded to (autocast). 16-bit operands are multiplied into fp32 by cuBLAS; the CPU
    has no such product, and one that returns bf16 would round the logits, so there operands are widened tile by tile.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.columns, self.dtype = rows, columns, dtype
        self.accumulator = accumulator_dtype(dtype)
        self.narrow = device.type != "cpu" and dtype.itemsize == 2
        self._buffer = torch.empty(rows * columns, dtype=self.accumulator, device=device)

    def operand(self, x: Tensor) -> Tensor:
        """Bring a block of hidden states, weights or coefficients to the dtype of the products."""
        x = x.to(self.dtype)
        return x if self.narrow else x.to(self.accumulator)

    def product(self, h: Tensor, w: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
        """scale * (h w^T + bias), fp32: (rows, columns) in the buffer, overwritten by the next call."""
        # The row stride does not follow the last tile's width: aligned rows are what wide loads need.
        tile = self._buffer.view(self.rows, self.columns)[: h.shape[0], : w.shape[0]]
        if self.narrow:
            torch.mm(h, w.t(), out_dtype=self.accumulator, out=tile)
            if bias is not None:
                tile.add_(bias)
            return tile if scale == 1.0 else tile.mul_(scale)
        if bias is not None:
            return torch.addmm(bias.to(self.accumulator), h, w.t(), beta=scale, alpha=scale, out=tile)
        if scale == 1.0:
            return torch.mm(h, w.t(), out=tile)
        return torch.addmm(tile, h, w.t(), beta=0, alpha=scale, out=tile)

    def coefficients(self, tile: Tensor) -> Tensor:
        """The tile's memory in the dtype of the products, each row starting where its logits do, to write over them."""
        if not self.narrow:
            return tile
        stride = tile.stride(0) * self.accumulator.itemsize // self.dtype.itemsize
        return self._buffer.view(self.dtype).as_strided(tile.shape, (stride, 1))

    def accumulate_(self, out: Tensor, coefficients: Tensor, x: Tensor, first: bool = False) -> None:
        """out += coefficients @ x, accumulated in fp32; `first` overwrites what `out` held."""
        beta = 0.0 if first else 1.0
        if self.narrow:
            torch.addmm(out, self.operand(coefficients), x, beta=beta, out_dtype=self.accumulator, out=out)
        else:
            out.addmm_(coefficients, x, beta=beta)
