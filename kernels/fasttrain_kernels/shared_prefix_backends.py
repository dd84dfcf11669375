"""Which backend runs shared-prefix attention: flash-attn, FlexAttention, or torch's own kernels, and why not the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import autocast_dtype, triton_installed
from .shared_prefix import SharedPrefixLayout
from .shared_prefix_flash import FlashKernel, flash_versions, load_flash

ATTENTION_BACKENDS = ("flash", "flex", "sdpa")


class AttentionCase(NamedTuple):
    """What decides: where, in which type, at which head size, whether spans are bidirectional, gradients wanted, and scores
    bent by a softcap."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    bidirectional: bool = False
    gradients: bool = True
    softcap: bool = False


def attention_case(
    q: Tensor, layout: SharedPrefixLayout, gradients: bool = True, softcap: bool = False
) -> AttentionCase:
    """The case of queries (1, H, T, K) over a layout."""
    return AttentionCase(q.device, q.dtype, q.shape[-1], bool(layout.bidirectional), gradients, softcap)


def flash_kernel(case: AttentionCase) -> FlashKernel | str:
    """The best flash-attn kernel that can run the case, or why none can."""
    reason = _why_no_flash(case)
    if reason:
        return reason
    capability = torch.cuda.get_device_capability(case.device)
    reasons = []
    for version in flash_versions(capability):
        found = load_flash(version)
        if isinstance(found, str):
            reasons.append(found)
        elif case.head_size > found.largest_head:
            reasons.append(
                f"flash-attn {version} wants a head size of at most {found.largest_head}, got {case.head_size}"
            )
        elif case.softcap and case.gradients and not found.softcap_backward:
            reasons.append(f"flash-attn {version} has no backward with a softcap for packed sequences")
        else:
            return found
    return (
        "; ".join(reasons)
        or f"flash-attn wants compute capability 8.0 or more, got {capability[0]}.{capability[1]}"
    )


def _why_no_flash(case: AttentionCase) -> str | None:
    """Why no version of flash-attn runs the case, whatever is installed."""
    if case.device.type != "cuda":
        return f"flash-attn wants a CUDA device, got {case.device.type}"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn wants bfloat16 or float16, got {str(case.dtype).removeprefix('torch.')}"
    if case.head_size % 8 or case.head_size > 256:
        return f"flash-attn wants a head size that 8 divides, at most 256, got {case.head_size}"
    if case.bidirectional:
        return "flash-attn cannot make spans of a prompt bidirectional"
    return None


def why_not_attention(backend: str, case: AttentionCase, elsewhere: bool = False) -> str | None:
    """Why a backend cannot run a case; None if it can. ValueError for an unknown backend.

    elsewhere: on another machine, so that what is installed here does not count.
    """
    if backend == "flash" and elsewhere:
        return _why_no_flash(case)
    if backend == "flash":
        found = flash_kernel(case)
        return found if isinstance(found, str) else None
    if backend == "flex":
        return _why_not_flex(case, elsewhere)
    if backend == "sdpa":
        return None
    raise ValueError(
        f"shared_prefix_attention: backend: wanted one of {', '.join(ATTENTION_BACKENDS)}, got {backend!r}"
    )


def _why_not_flex(case: AttentionCase, elsewhere: bool) -> str | None:
    # on a CPU it has no backward, no log-sum-exp for sinks, and code that does not compile at most head sizes
    if case.device.type != "cuda":
        return f"FlexAttention wants a CUDA device, got {case.device.type}"
    if not (elsewhere or triton_installed()):
        return "FlexAttention needs triton, which is not installed"
    if case.head_size < 16:
        return f"FlexAttention wants a head size of 16 or more, got {case.head_size}"
    if case.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return (
            f"FlexAttention wants float16, bfloat16 or float32, got {str(case.dtype).removeprefix('torch.')}"
        )
    # torch's compiler passes bfloat16 over there, and the whole matrix of scores would be made
    if case.dtype == torch.bfloat16 and not elsewhere:
        capability = torch.cuda.get_device_capability(case.device)
        if capability < (8, 0):
            return f"FlexAttention wants compute capability 8.0 or more for bfloat16, got {capability[0]}.{capability[1]}"
    return None


def choose_attention(case: AttentionCase) -> tuple[str, str]:
    """(backend, why) that `backend=None` picks: flash, else flex, else sdpa; sdpa on CPU, whose kernels are exact there."""
    if case.device.type == "cpu":
        return "sdpa", "torch's CPU flash kernels do exactly the visible pairs"
    reasons = []
    for backend in ATTENTION_BACKENDS:
        reason = why_not_attention(backend, case)
        if reason is None:
            break
        reasons.append(reason)
    if backend == "flash":
        found = flash_kernel(case)
        assert isinstance(found, FlashKernel)
        return backend, f"flash-attn {found.version} can be imported"
    return backend, "; ".join(reasons)


def attention_backend_for(tensor: Tensor, layout: SharedPrefixLayout | None = None) -> str:
    """Name of the backend that `backend=None` picks for queries like this one, over this layout if given; under autocast
    for the dtype that they will be rounded to."""
    dtype = autocast_dtype(tensor)
    case = AttentionCase(tensor.device, dtype, tensor.shape[-1], bool(layout and layout.bidirectional))
    return choose_attention(case)[0]
