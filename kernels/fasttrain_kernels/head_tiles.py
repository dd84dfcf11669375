"""Cuts (N rows, V columns) of logits into tiles and makes their matrix products with fp32 results."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of one fp32 tile of logits on CPU, with the widened weight tile where there is one: they have to stay in the
# last-level cache between the two products, yet few tiles mean few meeting points of threads.
_CPU_TILE_BYTES = 8 << 20
# Rows of a tile: enough to amortise reading the weight tile, few enough to leave it wide.
_CPU_ROWS, _GPU_ROWS = 512, 1024
# Columns of a tile on GPU: a row of it is held in the registers of one program, the tile (32 MiB) in the L2 cache.
_GPU_COLUMNS = 8192


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Tiles:
    """The tiles of one (N, D) x (V, D) product, and one buffer that holds the logits of one tile at a time.

    `dtype` is what the operands are rounded to (autocast). 16-bit operands are multiplied into fp32 by cuBLAS; the CPU
    has no such product, and one that returns bf16 would round the logits, so there operands are widened tile by tile.
    """

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> None:
        self.hidden, self.weight, self.dtype = hidden_ND, weight_VD, dtype
        self.accumulator = accumulator_dtype(dtype)
        on_cpu = hidden_ND.device.type == "cpu"
        self.narrow = not on_cpu and dtype.itemsize == 2
        n, d = hidden_ND.shape
        self.rows = max(1, min(n, _CPU_ROWS if on_cpu else _GPU_ROWS))
        self.columns = max(1, min(weight_VD.shape[0], self._width(on_cpu, d)))
        self._buffer = hidden_ND.new_empty(self.rows * self.columns, dtype=self.accumulator)

    def _width(self, on_cpu: bool, d: int) -> int:
        if not on_cpu:
            return _GPU_COLUMNS
        widened = d if self.weight.dtype != self.accumulator else 0
        return max(64, _CPU_TILE_BYTES // ((self.rows + widened) * self.accumulator.itemsize))

    def row_blocks(self) -> Iterator[slice]:
        n = self.hidden.shape[0]
        return (slice(a, min(a + self.rows, n)) for a in range(0, n, self.rows))

    def column_blocks(self) -> Iterator[slice]:
        v = self.weight.shape[0]
        return (slice(a, min(a + self.columns, v)) for a in range(0, v, self.columns))

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


class Running:
    """Online softmax of one block of rows, after some tiles with logits z; vectors (rows,), fp32.

        s = sum exp(z - m)      q = sum exp(2 (z - m))      a = sum (z - m) exp(z - m)

    m is the maximum so far, or near enough below it that nothing overflows. `top` is the id of the first maximum, `z`
    the plain sum. When a tile raises m, `follow` is True and what was accumulated before has to follow: `shrink` is
    exp(old m - m), `moved` is old m - m.
    """

    def __init__(
        self, rows: int, like: Tensor, *, entropy: bool, log_p2: bool, top: bool, mean: bool
    ) -> None:
        # The lowest finite number instead of -inf: (m - m') * 0 stays 0 in the first step.
        self.m = like.new_full((rows,), torch.finfo(like.dtype).min)
        self.s = like.new_zeros(rows)
        self.a = like.new_zeros(rows) if entropy else None
        self.q = like.new_zeros(rows) if log_p2 else None
        self.z = like.new_zeros(rows) if mean else None
        self.top = like.new_zeros(rows, dtype=torch.int64) if top else None
        self.shrink, self.moved = like.new_zeros(rows), like.new_zeros(rows)
        self.started, self.follow = False, True

    def entropy(self) -> Tensor | None:
        return None if self.a is None else self.s.log() - self.a / self.s

    def log_p2(self) -> Tensor | None:
        return None if self.q is None else self.q.log() - 2 * self.s.log()
