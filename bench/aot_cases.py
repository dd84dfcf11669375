"""The launches that aot.py compiles: each kernel as `fasttrain_kernels` starts it at LLaVA-1.5-13B shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fasttrain_kernels import (
    KINDS,
    head_passes_triton,
    label_logprob_triton,
    layer_passes_triton,
    preference_loss_triton,
    shared_prefix_merge_triton,
)

# LLaVA-1.5-13B, bf16: 16 answers of 130 tokens in a pack of 4096; a tile of the head is 1024 rows of 8192 columns.
ROWS, HIDDEN, VOCABULARY, PAIRS = 2080, 5120, 32064, 128
TOKENS, INNER, HEADS, HEAD_SIZE = 4096, 13824, 40, 128
BLOCK = 8192

_POINTERS = {"z_ptr": "fp32", "m_ptr": "fp32", "s_ptr": "fp32", "a_ptr": "fp32", "q_ptr": "fp32", "top_ptr": "i64",
             "shrink_ptr": "fp32", "moved_ptr": "fp32", "p_ptr": "bf16", "e_ptr": "bf16", "bias_ptr": "bf16",
             "h_ptr": "bf16", "w_ptr": "bf16", "target_ptr": "i64", "acc_ptr": "fp32", "acc_entropy_ptr": "fp32",
             "logprob_ptr": "fp32", "unit_ptr": "bf16", "entropy_unit_ptr": "bf16", "grad_ptr": "fp32",
             "entropy_ptr": "fp32", "grad_entropy_ptr": "fp32", "out_ptr": "bf16"}  # fmt: skip
# Sizes that these shapes make a multiple of 16, which the launcher tells the compiler.
_DIVISIBLE = {
    "z_stride",
    "p_stride",
    "e_stride",
    "out_stride",
    "h_stride",
    "w_stride",
    "columns",
    "elements",
    "first",
    "d",
}
_STRIDES = {"size", "out_row", "out_head", "part_row", "part_head", "half", "x_batch", "x_head", "x_token", "out_batch",
            "out_token", "cos_batch", "cos_token", "sin_batch", "sin_token"}  # fmt: skip
_INTEGERS = (
    _DIVISIBLE
    | _STRIDES
    | {"pairs", "start", "rows", "tokens", "heads", "lse_row", "lse_head", "part_lse_row", "part_lse_head"}
)


@dataclass(frozen=True)
class Case:
    """One compiled variant of one kernel, and what one training step of it moves."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    read_bytes: int = 0
    written_bytes: int = 0
    wide_loads: bool = True
    matrix: bool = False
    pointers: dict[str, str] = field(default_factory=dict)

    @property
    def signature(self) -> dict[str, str]:
        out = {}
        for name in self.kernel.arg_names:
            if name in self.constants:
                out[name] = "constexpr"
            elif name.endswith("_ptr"):
                out[name] = "*" + {**_POINTERS, **self.pointers}.get(name, "fp32")
            else:
                out[name] = "i32" if name in _INTEGERS else "fp32"
        return out

    @property
    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        names = self.kernel.arg_names
        aligned = [
            n for n in names if n not in self.constants and (n.endswith("_ptr") or n in _DIVISIBLE | _STRIDES)
        ]
        return {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}


def _flags(names: str, on: str = "") -> dict[str, bool]:
    return {name: name in on.split() for name in names.split()}


def cases() -> list[Case]:
    """Every kernel of the package, in the variants that training and the reference pass use."""
    head, label, preference = head_passes_triton, label_logprob_triton, preference_loss_triton
    layer = layer_passes_triton
    logits, hidden = ROWS * VOCABULARY, ROWS * HIDDEN
    warps = head._warps(BLOCK)
    fold: Callable[[str], dict[str, Any]] = lambda on: {  # noqa: E731
        **_flags("HAS_BIAS HAS_CAP ENTROPY LOG_P2 TOP MEAN UNIT ENTROPY_UNIT", on), "BLOCK": BLOCK}  # fmt: skip
    finish: Callable[[str], dict[str, Any]] = lambda on: {  # noqa: E731
        **_flags("HAS_BIAS HAS_CAP UNIT ENTROPY_UNIT", on), "BLOCK": head._BLOCK_D}  # fmt: skip
    gradient: Callable[[str], dict[str, Any]] = lambda on: {  # noqa: E731
        **_flags("HAS_BIAS HAS_CAP ENTROPY", on), "BLOCK": BLOCK}  # fmt: skip
    every = tuple(range(len(KINDS)))
    sorting = tuple(KINDS.index(k) for k in ("aot", "aot_unpaired"))
    loss = lambda kinds, lengths: {  # noqa: E731
        "KINDS": kinds, "WEIGHTS": (1.0,) * len(kinds), "F": 0, "HAS_REFERENCE": True, "HAS_LENGTHS": lengths,
        "HAS_WEIGHT": lengths, "PER_TOKEN": False, "BLOCK": preference._BLOCK}  # fmt: skip
    gated: Callable[[bool], dict[str, Any]] = lambda gelu: {"GELU": gelu, "BLOCK": layer._BLOCK}  # noqa: E731
    norm = {"ONE_PLUS": False, **layer.tile(HIDDEN)}
    norm_warps = norm.pop("num_warps")
    width, inner, turned = TOKENS * HIDDEN * 2, TOKENS * INNER * 2, TOKENS * HEADS * HEAD_SIZE * 2
    half = {
        f"{name}_ptr": "bf16"
        for name in ("x", "weight", "grad", "gate", "up", "gate_grad", "up_grad", "cos", "sin")
    }
    double = {name: "fp64" for name in preference.preference_kernel.arg_names if name.endswith("_ptr")}
    return [
        Case("fold, reference pass", head.fold_kernel, fold(""), warps, logits * 4, ROWS * 12),
        Case("fold, frozen head", head.fold_kernel, fold("UNIT"), warps, logits * 4, logits * 2),
        Case("fold, everything on", head.fold_kernel,
             fold("HAS_BIAS HAS_CAP ENTROPY LOG_P2 TOP MEAN UNIT ENTROPY_UNIT"), warps, logits * 4, logits * 4),
        Case("shrink", head.shrink_kernel, {"BLOCK": head._BLOCK_D}, 4, hidden * 4, hidden * 4),
        Case("finish, reference pass", head.finish_kernel, finish(""), 4, hidden * 4, ROWS * 4),
        Case("finish, frozen head", head.finish_kernel, finish("UNIT"), 4, hidden * 10, hidden * 2),
        Case("finish, everything on", head.finish_kernel, finish("HAS_BIAS HAS_CAP UNIT ENTROPY_UNIT"), 4,
             hidden * 14, hidden * 4),
        Case("gradient, trained head", head.gradient_kernel, gradient(""), warps, logits * 4, logits * 2),
        Case("gradient, everything on", head.gradient_kernel, gradient("HAS_BIAS HAS_CAP ENTROPY"), warps,
             logits * 4, logits * 2),
        Case("label forward", label.label_forward_kernel, {"LOWEST": -3.0e38, "BLOCK": label._BLOCK}, 8,
             logits * 2, ROWS * 12, pointers={"z_ptr": "bf16"}),
        Case("label backward", label.label_backward_kernel, {"BLOCK": label._BLOCK}, 8, logits * 2, logits * 2,
             pointers={"z_ptr": "bf16"}),
        Case("preference, sigmoid", preference.preference_kernel, loss((0,), False), 4, PAIRS * 16, PAIRS * 24,
             wide_loads=False),
        Case("preference, every kind that does not sort", preference.preference_kernel,
             loss(tuple(k for k in every if k not in sorting), True), 4, PAIRS * 32, PAIRS * 24, wide_loads=False),
        # as training calls it: a log-ratio is a small difference of two sums in the hundreds
        Case("preference, sigmoid, fp64", preference.preference_kernel, loss((0,), True), 4, PAIRS * 64, PAIRS * 48,
             wide_loads=False, pointers=double),
        Case("attention merge", shared_prefix_merge_triton.merge_kernel,
             {"INDEXED": True, "BLOCK_H": 16, "BLOCK_K": 128}, 4, ROWS * HIDDEN * 4 + ROWS * 40 * 8,
             ROWS * HIDDEN * 2 + ROWS * 40 * 4, pointers={"out_ptr": "bf16", "part_ptr": "bf16", "index_ptr": "i64"}),
        Case("norm", layer.norm_kernel, norm, norm_warps, width, width, pointers=half),
        Case("norm backward", layer.norm_backward_kernel, norm, norm_warps, 2 * width, width, pointers=half),
        Case("swiglu", layer.gated_kernel, gated(False), 4, 2 * inner, inner, pointers=half),
        Case("swiglu backward", layer.gated_backward_kernel, gated(False), 4, 3 * inner, 2 * inner, pointers=half),
        Case("geglu", layer.gated_kernel, gated(True), 4, 2 * inner, inner, pointers=half),
        Case("geglu backward", layer.gated_backward_kernel, gated(True), 4, 3 * inner, 2 * inner, pointers=half),
        Case("rotary, queries or keys", layer.rotary_kernel, {"BACKWARD": False, "BLOCK_H": 16, "BLOCK_K": HEAD_SIZE // 2}, 4,
             turned + TOKENS * HEAD_SIZE * 4, turned, pointers=half),
    ]  # fmt: skip
