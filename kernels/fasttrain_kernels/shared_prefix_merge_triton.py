"""The merge of attention parts in Triton.

kernel    grid                     reads                              writes
merge     rows x heads / BLOCK_H   both outputs, both log-sum-exps    output and log-sum-exp, in place
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .backends import device_of

_ELEMENTS = 2048


# what differs from pack to pack: Triton would compile anew where it is 1, and where 16 divides it
@triton.jit(do_not_specialize=["start", "lse_head", "part_lse_head"])
def merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, index_ptr, start, heads, size,
    out_row, out_head, lse_row, lse_head, part_row, part_head, part_lse_row, part_lse_head,
    INDEXED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    if INDEXED:
        row = tl.load(index_ptr + part)
    else:
        row = part + start
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    lse_place = lse_ptr + row * lse_row + head * lse_head
    a = tl.load(lse_place, mask=head < heads, other=0.0)
    b = tl.load(part_lse_ptr + part * part_lse_row + head * part_lse_head, mask=head < heads, other=0.0)
    top = tl.maximum(a, b)
    weight_a = tl.exp(a - top)
    weight_b = tl.exp(b - top)
    total = weight_a + weight_b
    inside = (head < heads)[:, None] & (k < size)[None, :]
    place = out_ptr + row * out_row + head[:, None] * out_head + k[None, :]
    x = tl.load(place, mask=inside, other=0.0).to(a.dtype)
    y = tl.load(part_ptr + part * part_row + head[:, None] * part_head + k[None, :], mask=inside, other=0.0)
    merged = x * (weight_a / total)[:, None] + y.to(a.dtype) * (weight_b / total)[:, None]
    tl.store(place, merged.to(out_ptr.dtype.element_ty), mask=inside)
    # Every warp reads the heads' log-sum-exps for its part of the output; one of them writes them.
    tl.debug_barrier()
    tl.store(lse_place, top + tl.log(total), mask=head < heads)


def merge_rows_(
    out: Tensor, lse: Tensor, start: int, index: Tensor | None, part: Tensor, part_lse: Tensor
) -> None:
    """Merge part (H, M, K), part_lse (H, M) into rows `index`, or `start` and following, of out (H, T, K), lse (H, T)."""
    heads, rows, size = part.shape
    if out.stride(2) != 1 or part.stride(2) != 1:
        raise ValueError(f"merge_rows_: wanted a last stride of 1, got {out.stride()} and {part.stride()}")
    width = triton.next_power_of_2(size)
    block = max(1, min(triton.next_power_of_2(heads), _ELEMENTS // width))
    with device_of(out):
        merge_kernel[(rows, triton.cdiv(heads, block))](
            out, lse, part, part_lse, lse if index is None else index, start, heads, size,
            out.stride(1), out.stride(0), lse.stride(1), lse.stride(0),
            part.stride(1), part.stride(0), part_lse.stride(1), part_lse.stride(0),
            INDEXED=index is not None, BLOCK_H=block, BLOCK_K=width, num_warps=4,
        )  # fmt: skip
