"""`linear_logprob` in plain torch: tiles over rows and vocabulary, online softmax, products by MKL or cuBLAS.

The running state of a block of rows, after some vocabulary tiles with logits z:

    m = max z      s = sum exp(z - m)      q = sum exp(2 (z - m))      a = sum (z - m) exp(z - m)
    acc = sum exp(z - m) z' W                                          (z' = dz / d(h.W))

When a later tile raises the maximum by d, s and acc shrink by exp(-d), q by its square, a by a (s-dependent) shift: what
FlashAttention does with K = V = W. Only one tile of logits exists at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .head_options import LogitTransform

# Bytes of one fp32 tile of logits. On CPU the tile has to stay in the last-level cache between the two products
# and few tiles mean few threads' meeting points; on CUDA it has to feed a whole GPU.
_TILE_BYTES = {"cpu": 6 << 20, "cuda": 64 << 20}
# Rows of a tile: enough to amortise reading the weight tile, few enough to leave it wide.
_TILE_ROWS = {"cpu": 512, "cuda": 1024}
# Bytes of a weight tile widened to fp32 where the products have to be made in fp32.
_WIDE_BYTES = 8 << 20


@dataclass(frozen=True)
class Scores:
    """What the forward keeps of all rows: (N,) each, and the unit gradients (N, D).

    The log-sum-exp is maximum + log(total), kept apart: added up, a large maximum would swallow the logarithm.
    """

    logprob: Tensor
    maximum: Tensor
    total: Tensor
    entropy: Tensor | None
    log_p2: Tensor | None
    unit: Tensor | None


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _narrow_products(dtype: torch.dtype, device: torch.device) -> bool:
    # cuBLAS multiplies 16-bit operands into fp32; the CPU has no such product, and one that returns bf16 would round
    # the logits, so there the operands are widened tile by tile.
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


class Tiles:
    """Cuts (N rows, V columns) into tiles and makes their products with fp32 (fp64) results."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> None:
        self.hidden, self.weight, self.dtype = hidden_ND, weight_VD, dtype
        self.accumulator = accumulator_dtype(dtype)
        self.narrow = _narrow_products(dtype, hidden_ND.device)
        kind = hidden_ND.device.type
        n, d = hidden_ND.shape
        self.rows = max(1, min(n, _TILE_ROWS.get(kind, 1024)))
        columns = _TILE_BYTES.get(kind, 64 << 20) // (self.rows * self.accumulator.itemsize)
        if not self.narrow and weight_VD.dtype != self.accumulator:
            columns = min(columns, _WIDE_BYTES // (d * self.accumulator.itemsize))
        self.columns = max(1, min(weight_VD.shape[0], max(columns, 64)))
        self._tile = hidden_ND.new_empty(self.rows * self.columns, dtype=self.accumulator)

    def row_blocks(self) -> Iterator[slice]:
        n = self.hidden.shape[0]
        return (slice(a, min(a + self.rows, n)) for a in range(0, n, self.rows))

    def column_blocks(self) -> Iterator[slice]:
        v = self.weight.shape[0]
        return (slice(a, min(a + self.columns, v)) for a in range(0, v, self.columns))

    def operand(self, x: Tensor) -> Tensor:
        """Bring a block of hidden states, weights or coefficients to the dtype of the products."""
        return x.to(self.dtype).to(self.dtype if self.narrow else self.accumulator)

    def logits(self, h: Tensor, w: Tensor, bias_V: Tensor | None, scale: float) -> Tensor:
        """scale * (h w^T + bias) into the tile buffer: (rows, columns), overwritten by the next call."""
        tile = self._tile[: h.shape[0] * w.shape[0]].view(h.shape[0], w.shape[0])
        if self.narrow:
            torch.mm(h, w.t(), out_dtype=self.accumulator, out=tile)
            if bias_V is not None:
                tile.add_(bias_V.to(self.accumulator))
            return tile if scale == 1.0 else tile.mul_(scale)
        if bias_V is not None:
            return torch.addmm(bias_V.to(self.accumulator), h, w.t(), beta=scale, alpha=scale, out=tile)
        if scale == 1.0:
            return torch.mm(h, w.t(), out=tile)
        return torch.addmm(tile, h, w.t(), beta=0, alpha=scale, out=tile)

    def accumulate_(self, out: Tensor, coefficients: Tensor, x: Tensor) -> Tensor:
        """out += coefficients @ x, accumulated in fp32 (fp64)."""
        if self.narrow:
            return out.add_(torch.mm(self.operand(coefficients), x, out_dtype=self.accumulator))
        return out.addmm_(coefficients, x)


class _Running:
    """Online softmax of one block of rows; see the module's docstring."""

    def __init__(self, rows: int, like: Tensor, entropy: bool, log_p2: bool) -> None:
        # The lowest finite number instead of -inf: (m - m') * 0 stays 0 in the first step.
        self.m = like.new_full((rows,), torch.finfo(like.dtype).min)
        self.s = like.new_zeros(rows)
        self.a = like.new_zeros(rows) if entropy else None
        self.q = like.new_zeros(rows) if log_p2 else None

    def fold_(self, z: Tensor) -> Tensor:
        """Take in a tile of logits, leave exp(z - m) in its place, return the factor for what was summed before."""
        m = torch.maximum(self.m, z.amax(1))
        shrink = torch.exp(self.m - m)
        p = z.sub_(m[:, None]).exp_()
        if self.a is not None:
            self.a.addcmul_(self.m - m, self.s).mul_(shrink).sub_(torch.special.entr(p).sum(1))
        if self.q is not None:
            self.q.mul_(shrink * shrink).add_(torch.linalg.vector_norm(p, dim=1).square_())
        self.s.mul_(shrink).add_(p.sum(1))
        self.m = m
        return shrink


def _target_logit(h: Tensor, w_target: Tensor, bias: Tensor | None, target: Tensor, tr: LogitTransform,
                  dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The target's logit as an exact dot product, and its soft-cap slope."""
    dot = torch.linalg.vecdot(h.to(dtype), w_target.to(dtype))
    if bias is not None:
        dot = dot + bias[target].to(dtype)
    dot = dot * tr.product_scale
    slope = tr.finish_(dot)
    return dot, slope


def score_rows(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, bias_V: Tensor | None, tr: LogitTransform,
               dtype: torch.dtype, *, unit: bool, entropy: bool, log_p2: bool) -> Scores:  # fmt: skip
    """Log-probs of the targets, and with `unit` their gradients with respect to the hidden states.

    One product without `unit`, two with it. `dtype` is what the operands are rounded to (autocast); sums are fp32.
    """
    tiles = Tiles(hidden_ND, weight_VD, dtype)
    n, d = hidden_ND.shape
    acc_dtype = tiles.accumulator
    new = lambda *shape: hidden_ND.new_empty(shape, dtype=acc_dtype)  # noqa: E731
    out = Scores(new(n), new(n), new(n), new(n) if entropy else None, new(n) if log_p2 else None,
                 hidden_ND.new_empty(n, d) if unit else None)  # fmt: skip
    for rows in tiles.row_blocks():
        h = tiles.operand(hidden_ND[rows])
        run = _Running(h.shape[0], out.total, entropy, log_p2)
        acc = hidden_ND.new_zeros(h.shape, dtype=acc_dtype) if unit else None
        for columns in tiles.column_blocks():
            w = tiles.operand(weight_VD[columns])
            z = tiles.logits(h, w, None if bias_V is None else bias_V[columns], tr.product_scale)
            slope = tr.finish_(z)
            shrink = run.fold_(z)
            if acc is not None:
                acc.mul_(shrink[:, None])
                tiles.accumulate_(acc, z if slope is None else slope.mul_(z), w)
        w_target = weight_VD[target_N[rows]].to(dtype)
        z_target, slope = _target_logit(h, w_target, bias_V, target_N[rows], tr, acc_dtype)
        out.maximum[rows], out.total[rows] = run.m, run.s
        # A log-prob is never positive; rounding of two close numbers may say otherwise.
        out.logprob[rows] = (z_target - run.m - run.s.log()).clamp_(max=0)
        if out.entropy is not None and run.a is not None:
            out.entropy[rows] = run.s.log() - run.a / run.s
        if out.log_p2 is not None and run.q is not None:
            out.log_p2[rows] = run.q.log() - 2 * run.s.log()
        if out.unit is not None and acc is not None:
            target_part = w_target.to(acc_dtype)
            if slope is not None:
                target_part = target_part * slope[:, None]
            acc.div_(run.s[:, None])
            out.unit[rows] = torch.sub(target_part, acc, out=acc).mul_(tr.slope_scale)
    return out


def head_gradients(grad_N: Tensor, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor,
                   softmax_2N: tuple[Tensor, Tensor],
                   bias_V: Tensor | None, tr: LogitTransform, dtype: torch.dtype, *, wants: tuple[bool, bool, bool],
                   ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of sum(grad * logprob) with respect to hidden, weight and bias; logits are made again, tile by tile.

    `softmax_2N` is (maximum, total) of the forward. With p = exp(z - maximum) / total and
    G[t, v] = grad[t] (1[v = y_t] - p[t, v]) z'[t, v]: dhidden = G W, dweight = G^T hidden, dbias = column sums of G;
    each is made only if `wants` says so.
    """
    tiles = Tiles(hidden_ND, weight_VD, dtype)
    acc = tiles.accumulator
    maximum_N, total_N = softmax_2N
    grad_N = grad_N.to(acc) * tr.slope_scale
    dh = hidden_ND.new_zeros(hidden_ND.shape, dtype=acc) if wants[0] else None
    dw = torch.empty_like(weight_VD) if wants[1] else None
    db = torch.empty_like(bias_V) if wants[2] and bias_V is not None else None
    for columns in tiles.column_blocks():
        w = tiles.operand(weight_VD[columns])
        b = None if bias_V is None else bias_V[columns]
        dw_tile = hidden_ND.new_zeros(w.shape, dtype=acc) if dw is not None else None
        db_tile = hidden_ND.new_zeros(w.shape[0], dtype=acc) if db is not None else None
        for rows in tiles.row_blocks():
            h = tiles.operand(hidden_ND[rows])
            z = tiles.logits(h, w, b, tr.product_scale)
            slope = tr.finish_(z)
            z.sub_(maximum_N[rows, None]).exp_().mul_((grad_N[rows] / -total_N[rows])[:, None])
            g = _add_target_(z, slope, grad_N[rows], target_N[rows], columns)
            if dh is not None:
                tiles.accumulate_(dh[rows], g, w)
            if dw_tile is not None:
                tiles.accumulate_(dw_tile, g.t(), h)
            if db_tile is not None:
                db_tile += g.sum(0)
        if dw is not None and dw_tile is not None:
            dw[columns] = dw_tile
        if db is not None and db_tile is not None:
            db[columns] = db_tile
    return (None if dh is None else dh.to(hidden_ND.dtype)), dw, db


def _add_target_(g: Tensor, slope: Tensor | None, grad_N: Tensor, target_N: Tensor, columns: slice) -> Tensor:
    """Complete a tile of -grad * softmax to grad * (onehot - softmax) * slope, in place."""
    inside = (target_N >= columns.start) & (target_N < columns.stop)
    index = (target_N - columns.start).clamp(0, g.shape[1] - 1)
    g.scatter_add_(1, index[:, None], (grad_N * inside)[:, None])
    return g if slope is None else g.mul_(slope)
