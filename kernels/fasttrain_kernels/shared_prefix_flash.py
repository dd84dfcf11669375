"""flash-attn's varlen kernels as kernels of attention in parts: versions 2, 3 and 4 behind one seam.

The functions called are those below flash-attn's autograd functions: they return and accept the log-sum-exp. Their
signatures are those of flash-attn 2.8.3, of flash-attn 3 as released with it and as on its main branch of 2025, and of
flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .shared_prefix_parts import Scores
from .shared_prefix_varlen import Varlen


class FlashKernel:
    """A `Kernel` of attention in parts over one flash-attn version. Subclasses call the version's functions."""

    version = 0
    largest_head = 256
    softcap_backward = True

    def __init__(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self._forward, self._backward = forward, backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: Varlen, scores: Scores) -> tuple[Tensor, Tensor]:
        out, lse = self.call_forward(_packed(q), _packed(k), _packed(v), how, scores)
        return out.transpose(0, 1)[None], lse[None]

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        how: Varlen,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = (_packed(x) for x in (grad, q, k, v, out))
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        # the kernels read the log-sum-exp by its address, as (H, rows)
        self.call_backward(grad, q, k, v, out, lse[0].contiguous(), dq, dk, dv, how, scores)
        return dq.transpose(0, 1)[None], dk.transpose(0, 1)[None], dv.transpose(0, 1)[None]

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, how: Varlen, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """q (rows, H, K), k and v (keys, Hkv, K) -> out (rows, H, K), lse fp32 (H, rows)."""
        raise NotImplementedError

    def call_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, how: Varlen, scores: Scores,
    ) -> None:  # fmt: skip
        """Fill dq, dk and dv."""
        raise NotImplementedError


def _packed(x: Tensor) -> Tensor:
    """(1, H, M, K) as (M, H, K), the last dimension contiguous."""
    x = x[0].transpose(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


class Flash2(FlashKernel):
    """flash-attn 2: flash_attn.flash_attn_interface._flash_attn_varlen_forward and _flash_attn_varlen_backward."""

    version = 2

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, how: Varlen, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        out, lse, _, _ = self._forward(q, k, v, **self._options(how, scores), return_softmax=False)
        return out, lse

    def call_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, how: Varlen, scores: Scores,
    ) -> None:  # fmt: skip
        deterministic = torch.are_deterministic_algorithms_enabled()
        self._backward(
            grad, q, k, v, out, lse, dq, dk, dv, **self._options(how, scores), deterministic=deterministic
        )

    def _options(self, how: Varlen, scores: Scores) -> dict[str, Any]:
        return {
            "cu_seqlens_q": how.ends_q,
            "cu_seqlens_k": how.ends_k,
            # queries of one row each would take the path for decoding
            "max_seqlen_q": max(2, how.longest_q),
            "max_seqlen_k": how.longest_k,
            "dropout_p": 0.0,
            "softmax_scale": scores.scale,
            "causal": how.causal,
            "window_size_left": -1 if how.window is None else how.window - 1,
            "window_size_right": 0 if how.causal else -1,
            "softcap": scores.softcap or 0.0,
            "alibi_slopes": None,
        }


class Flash3(FlashKernel):
    """flash-attn 3 (Hopper): flash_attn_interface._flash_attn_forward and _flash_attn_backward.

    Its first releases took the window as a pair, and its backward has called `causal` by two names.
    """

    version = 3

    def __init__(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        super().__init__(forward, backward)
        self._forward_names, self._backward_names = _names(forward), _names(backward)

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, how: Varlen, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        options = self._options(how, scores, self._forward_names)
        # older signatures have no defaults
        unused = ("k_new", "v_new", "qv", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "kv_batch_idx",
                  "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale",
                  "out", "out_")  # fmt: skip
        options |= {name: None for name in unused if name in self._forward_names}
        out, lse, *_ = self._forward(q, k, v, **options)
        return out, lse

    def call_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, how: Varlen, scores: Scores,
    ) -> None:  # fmt: skip
        options = self._options(how, scores, self._backward_names)
        deterministic = torch.are_deterministic_algorithms_enabled()
        self._backward(
            grad, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, sequed_q=None, sequed_k=None,
            deterministic=deterministic, **options,
        )  # fmt: skip

    def _options(self, how: Varlen, scores: Scores, names: frozenset[str]) -> dict[str, Any]:
        window = (-1 if how.window is None else how.window - 1, 0 if how.causal else -1)
        pair = {"window_size": window}
        two = {"window_size_left": window[0], "window_size_right": window[1]}
        return {
            "cu_seqlens_q": how.ends_q,
            "cu_seqlens_k": how.ends_k,
            "max_seqlen_q": how.longest_q,
            "max_seqlen_k": how.longest_k,
            "softmax_scale": scores.scale,
            "is_causal" if "is_causal" in names else "causal": how.causal,
            "softcap": scores.softcap or 0.0,
            **(pair if "window_size" in names else two),
        }


class Flash4(FlashKernel):
    """flash-attn 4 (Hopper, Blackwell): flash_attn.cute.interface._flash_attn_fwd and _flash_attn_bwd."""

    version = 4
    largest_head = 128
    softcap_backward = False

    def call_forward(
        self, q: Tensor, k: Tensor, v: Tensor, how: Varlen, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward(
            q, k, v, softcap=scores.softcap, return_lse=True, **self._options(how, scores)
        )
        return out, lse

    def call_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, how: Varlen, scores: Scores,
    ) -> None:  # fmt: skip
        self._backward(
            q, k, v, out, grad, lse, softcap=scores.softcap or 0.0, dq=dq, dk=dk, dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(), **self._options(how, scores),
        )  # fmt: skip

    def _options(self, how: Varlen, scores: Scores) -> dict[str, Any]:
        return {
            "cu_seqlens_q": how.ends_q,
            "cu_seqlens_k": how.ends_k,
            "max_seqlen_q": how.longest_q,
            "max_seqlen_k": how.longest_k,
            "softmax_scale": scores.scale,
            "causal": how.causal,
            "window_size_left": None if how.window is None else how.window - 1,
            "window_size_right": None if how.window is None else 0,
        }


def _names(function: Callable[..., Any]) -> frozenset[str]:
    """Parameter names of a function or of a torch custom operator."""
    operator = getattr(function, "_opoverload", None)
    if operator is not None:
        return frozenset(argument.name for argument in operator._schema.arguments)
    return frozenset(inspect.signature(function).parameters)


_PLACES: dict[int, tuple[type[FlashKernel], str, str, str]] = {
    2: (
        Flash2,
        "flash_attn.flash_attn_interface",
        "_flash_attn_varlen_forward",
        "_flash_attn_varlen_backward",
    ),
    3: (Flash3, "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
    4: (Flash4, "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd"),
}


def flash_versions(capability: tuple[int, int]) -> tuple[int, ...]:
    """flash-attn versions with kernels for a CUDA compute capability, the best first."""
    major = capability[0]
    if major == 9:
        return (3, 2, 4)
    if major in (10, 11):
        return (4, 2)
    return (2,) if major >= 8 else ()


@functools.cache
def load_flash(version: int) -> FlashKernel | str:
    """The kernel of an installed flash-attn version, or why there is none."""
    kind, module, forward, backward = _PLACES[version]
    try:
        found = importlib.import_module(module)
        return kind(getattr(found, forward), getattr(found, backward))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # an extension built for another torch fails with a long list of symbols
        return f"flash-attn {version} cannot be imported ({str(error).splitlines()[0][:120]})"
