"""The flash backend against dense attention in fp64, over doubles of flash-attn 2, 3 and 4.

flash-attn needs a GPU to be built and run. The doubles have the names, order and defaults of its functions' parameters (of the
source distribution flash-attn 2.8.3 and the wheel flash-attn-4 4.0.0b36), check what its C++ checks, and compute in plain
torch, so that everything around the kernels is run as on a GPU. `gpu` tests run the real ones.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain_kernels import (
    AttentionCase,
    SharedPrefixLayout,
    shared_prefix_attention,
    shared_prefix_attention_ref,
    why_not_attention,
)
from fasttrain_kernels import shared_prefix_flash as flash_module
from fasttrain_kernels.shared_prefix_flash import (
    Flash2,
    Flash3,
    Flash4,
    FlashKernel,
    load_flash,
)
from fasttrain_kernels.shared_prefix_parts import PartsAttention, Scores
from fasttrain_kernels.shared_prefix_varlen import flash_plan

CALLS: list[dict[str, Any]] = []


def check(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int
) -> None:
    """What flash_api.cpp checks of both directions."""
    for x in (q, k, v):
        assert x.dim() == 3 and x.stride(-1) == 1 and x.dtype == q.dtype
    assert q.shape[2] == k.shape[2] <= 256 and q.shape[2] % 8 == 0 and q.shape[1] % k.shape[1] == 0
    for ends, rows, longest in ((ends_q, len(q), longest_q), (ends_k, len(k), longest_k)):
        assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.shape == ends_q.shape
        assert ends[0] == 0 and ends[-1] == rows and isinstance(longest, int)
        # rows beyond the longest are not computed; empty segments have crashed backward kernels
        assert ends.diff().min() >= 1 and ends.diff().max() <= longest


def segments(q: Tensor, k: Tensor, ends_q: Tensor, ends_k: Tensor) -> Any:
    for a, b, c, d in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:]):
        yield slice(int(a), int(b)), slice(int(c), int(d))


def scores_of(
    q: Tensor, k: Tensor, scale: float, causal: bool, left: int, right: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(H, rows, keys) scores with hidden ones at -inf, and the softcap's slope; masks are aligned bottom-right."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    score = torch.einsum("qhd,khd->hqk", q, k) * scale
    slope = torch.ones_like(score)
    if softcap:
        bent = torch.tanh(score / softcap)
        score, slope = softcap * bent, 1 - bent**2
    row = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])[None, :]
    right = 0 if causal else right
    hidden = ((left >= 0) & (key < row - left)) | ((right >= 0) & (key > row + right))
    return score.masked_fill(hidden, float("-inf")), slope


def forward(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, scale: float, causal: bool, left: int, right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = torch.full_like(q, float("nan")), torch.full((q.shape[1], len(q)), float("nan"))
    for rows, keys in segments(q, k, ends_q, ends_k):
        score, _ = scores_of(q[rows], k[keys], scale, causal, left, right, softcap)
        lse[:, rows] = score.logsumexp(-1)
        value = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[rows] = torch.einsum("hqk,khd->qhd", score.softmax(-1), value)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    ends_q: Tensor, ends_k: Tensor, scale: float, causal: bool, left: int, right: int, softcap: float,
) -> None:  # fmt: skip
    assert lse.dtype == torch.float32 and lse.is_contiguous() and lse.shape == (q.shape[1], len(q))
    for x, like in ((dout, q), (out, q), (dq, q), (dk, k), (dv, v)):
        assert x.shape == like.shape and x.stride(-1) == 1 and x.dtype == q.dtype
    groups = q.shape[1] // k.shape[1]
    for rows, keys in segments(q, k, ends_q, ends_k):
        score, slope = scores_of(q[rows], k[keys], scale, causal, left, right, softcap)
        p = (score - lse[:, rows, None]).exp()
        value = v[keys].repeat_interleave(groups, 1)
        delta = (dout[rows] * out[rows]).sum(-1).T[..., None]
        ds = p * (torch.einsum("qhd,khd->hqk", dout[rows], value) - delta) * slope * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, k[keys].repeat_interleave(groups, 1))
        dk[keys] = torch.einsum("hqk,qhd->khd", ds, q[rows]).unflatten(1, (-1, groups)).sum(2)
        dv[keys] = torch.einsum("hqk,qhd->khd", p, dout[rows]).unflatten(1, (-1, groups)).sum(2)


def _flash_attn_varlen_forward(  # 2.8.3
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    leftpad_k=None, seqused_k=None, zero_tensors=False,
):  # fmt: skip
    CALLS.append({name: value for name, value in locals().items() if name != "CALLS"})
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert dropout_p == 0 and alibi_slopes is None and not return_softmax
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size_left,
                       window_size_right, softcap)  # fmt: skip
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_varlen_backward(  # 2.8.3
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal,
             window_size_left, window_size_right, softcap)  # fmt: skip
    return torch.empty(0)


def flash3_forward_pair(  # hopper/, as released with 2.8.3
    q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
    max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
    v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert q_descale is None and out is None and page_table is None and seqused_q is None
    o, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, *window_size, softcap)
    return o, lse, None, None


def flash3_backward_pair(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq, dk,
    dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal,
             *window_size, softcap)  # fmt: skip
    return dq, dk, dv, torch.empty(0)


def flash3_forward(  # hopper/, main branch: custom operators
    q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None,
    seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None,
    leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None,
    v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0,
    softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    o, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size_left, window_size_right,
                     softcap)  # fmt: skip
    return o, lse, torch.empty(0), torch.empty(0)


def flash3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
    max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, is_causal,
             window_size_left, window_size_right, softcap)  # fmt: skip
    return torch.empty(0)


def _flash_attn_fwd(  # flash-attn-4 4.0.0b36, its first 38 parameters
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
    intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None,
    k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
):  # fmt: skip
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert return_lse and softcap != 0
    left, right = (-1 if side is None else side for side in (window_size_left, window_size_right))
    o, stats = forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, left, right, softcap or 0.0
    )
    return o, stats, None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
    num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
    AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):  # fmt: skip
    check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert cu_seqlens_q is None or not softcap, "varlen + score_mod not supported in bwd yet"
    left, right = (-1 if side is None else side for side in (window_size_left, window_size_right))
    backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        softmax_scale,
        causal,
        left,
        right,
        softcap,
    )
    return dq, dk, dv


DOUBLES: dict[str, FlashKernel] = {
    "flash-attn 2": Flash2(_flash_attn_varlen_forward, _flash_attn_varlen_backward),
    "flash-attn 3 with a window pair": Flash3(flash3_forward_pair, flash3_backward_pair),
    "flash-attn 3": Flash3(flash3_forward, flash3_backward),
    "flash-attn 4": Flash4(_flash_attn_fwd, _flash_attn_bwd),
}


def heads_of(tokens: int, heads: int, size: int, seed: int) -> Tensor:
    """(1, heads, tokens, size) laid out as a model's projection leaves it: (1, tokens, heads, size)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, heads, size, generator=g).transpose(1, 2).requires_grad_()


GROUPS = {
    "odd lengths, several groups": [(33, [5, 7, 1]), (17, [9]), (1, [3, 3])],
    "one completion": [(29, [13])],
    "one-token completions": [(8, [1, 1, 1]), (5, [1])],
    "64 completions": [(19, [1 + i % 5 for i in range(64)])],
    "a prompt of one token": [(1, [1])],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "all": {"window": 12, "softcap": 2.0, "sinks": [0.3, -2.0, 4.0, 1.0]},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("version", DOUBLES)
def test_output_and_gradients_over_varlen_kernels_equal_dense_attention(
    version: str, groups: str, options: str
) -> None:
    layout = SharedPrefixLayout.from_groups(GROUPS[groups])
    choice = dict(OPTIONS[options])
    sinks = choice.pop("sinks", None)
    ours = [heads_of(layout.tokens, h, 16, i) for i, h in enumerate((4, 2, 2))]
    true = [x.detach().double().requires_grad_() for x in ours]
    if sinks:
        ours.append(torch.tensor(sinks, requires_grad=True))
        true.append(torch.tensor(sinks, dtype=torch.float64, requires_grad=True))
    plan = flash_plan(layout, choice.get("window"), torch.device("cpu"))
    scores = Scores(0.21, choice.get("softcap"))
    out = PartsAttention.apply(*ours[:3], ours[3] if sinks else None, plan, DOUBLES[version], scores)
    ref = shared_prefix_attention_ref(
        *true[:3], layout, scale=0.21, sinks=true[3] if sinks else None, **choice
    )
    assert (out.detach().double() - ref.detach()).abs().max() < 1e-5
    if scores.softcap and not DOUBLES[version].softcap_backward:
        return
    grad = torch.randn(ref.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(grad.float())
    ref.backward(grad)
    for mine, theirs in zip(ours, true):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad.double() - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max().clamp(min=1)


def test_flash_attn_gets_packed_segments_and_fewer_heads_for_keys() -> None:
    CALLS.clear()
    layout = SharedPrefixLayout.from_groups([(33, [5, 7, 1]), (17, [9]), (6, [3, 2])])
    q, k, v = (heads_of(layout.tokens, h, 16, h) for h in (4, 2, 2))
    plan = flash_plan(layout, None, torch.device("cpu"))
    out = PartsAttention.apply(q, k, v, None, plan, DOUBLES["flash-attn 2"], Scores(1.0))
    a, b = CALLS
    assert a["cu_seqlens_q"].tolist() == a["cu_seqlens_k"].tolist() == [0, 38, 45, 46, 72, 81, 83]
    assert (a["max_seqlen_q"], a["max_seqlen_k"], a["causal"]) == (38, 38, True)
    assert a["q"].shape == (83, 4, 16) and a["k"].shape == (83, 2, 16)
    assert b["cu_seqlens_q"].tolist() == [0, 8, 10] and b["cu_seqlens_k"].tolist() == [0, 33, 39]
    assert (b["max_seqlen_q"], b["max_seqlen_k"], b["causal"]) == (8, 33, False)
    # the pack's own rows where they can be: nothing is copied for part A
    assert a["q"].data_ptr() == q.data_ptr() and a["k"].data_ptr() == k.data_ptr()
    assert out.transpose(1, 2).is_contiguous()


def test_under_a_window_a_completion_gets_only_the_end_of_its_prompt() -> None:
    CALLS.clear()
    layout = SharedPrefixLayout.from_groups([(33, [5, 7, 1]), (4, [9, 2])])
    q, k, v = (heads_of(layout.tokens, h, 16, h) for h in (4, 2, 2))
    plan = flash_plan(layout, 7, torch.device("cpu"))
    PartsAttention.apply(q, k, v, None, plan, DOUBLES["flash-attn 2"], Scores(1.0))
    (call,) = CALLS
    assert call["cu_seqlens_q"].diff().tolist() == [38, 7, 1, 13, 2]
    assert call["cu_seqlens_k"].diff().tolist() == [38, 6 + 7, 6 + 1, 13, 4 + 2]
    assert (call["window_size_left"], call["window_size_right"], call["causal"]) == (6, 0, True)


def test_a_single_group_is_attended_without_any_copy() -> None:
    CALLS.clear()
    layout = SharedPrefixLayout.from_groups([(33, [5, 7])])
    q, k, v = (heads_of(layout.tokens, h, 16, h) for h in (4, 2, 2))
    plan = flash_plan(layout, None, torch.device("cpu"))
    PartsAttention.apply(q, k, v, None, plan, DOUBLES["flash-attn 2"], Scores(1.0))
    first_other = q.data_ptr() + 38 * q.stride(2) * q.element_size()
    assert CALLS[1]["q"].data_ptr() == first_other and CALLS[1]["k"].data_ptr() == k.data_ptr()


def test_a_plan_is_made_once_per_layout_window_and_device() -> None:
    layout = SharedPrefixLayout.from_groups([(33, [5, 7]), (4, [2, 2])])
    cpu = torch.device("cpu")
    assert flash_plan(layout, None, cpu) is flash_plan(layout, None, cpu)
    # a window that reaches over every sequence is no window
    assert flash_plan(layout, 40, cpu) is flash_plan(layout, None, cpu)
    assert flash_plan(layout, 39, cpu) is not flash_plan(layout, None, cpu)


CUDA = torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("version", [2, 3, 4])
def test_the_installed_flash_attn_has_the_parameters_of_its_double(version: int) -> None:
    kernel = load_flash(version)
    if isinstance(kernel, str):
        pytest.skip(kernel)
    double = DOUBLES[f"flash-attn {version}"]
    for name in ("_forward", "_backward"):
        real = flash_module._names(getattr(kernel, name))
        used = inspect.signature(getattr(double, name)).parameters
        if version == 3 and "window_size" in real:
            used = inspect.signature(getattr(DOUBLES["flash-attn 3 with a window pair"], name)).parameters
        assert set(used) - {"zero_tensors"} <= real


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (32, 8, 128), (4, 4, 80), (8, 2, 96)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("groups", [[(626, [130, 145])], [(300, [1, 1, 1]), (17, [40]), (413, [130] * 7)]])
def test_flash_attn_on_a_gpu_equals_dense_attention(
    groups: list, options: str, heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    layout = SharedPrefixLayout.from_groups(groups)
    choice = dict(OPTIONS[options])
    sinks = choice.pop("sinks", None)
    choice["window"] = choice.get("window") and 50 * choice["window"]
    sink = torch.linspace(-2, 4, heads, device="cuda") if sinks else None
    reason = why_not_attention("flash", AttentionCase(CUDA, dtype, size, softcap="softcap" in choice))
    if reason:
        pytest.skip(reason)
    ours = [
        heads_of(layout.tokens, h, size, i).detach().to("cuda", dtype)
        for i, h in enumerate((heads, kv_heads, kv_heads))
    ]
    ours = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in ours]
    true = [x.detach().double().requires_grad_() for x in ours]
    out = shared_prefix_attention(*ours, layout, backend="flash", sinks=sink, **choice)
    ref = shared_prefix_attention_ref(*true, layout, sinks=sink.double() if sinks else None, **choice)
    grad = torch.randn(ref.shape, device="cuda", dtype=torch.float64)
    out.backward(grad.to(dtype))
    ref.backward(grad)
    assert ((out.detach().double() - ref.detach()).abs() <= 1e-2 * ref.detach().abs().clamp(min=1)).all()
    for mine, theirs in zip(ours, true):
        assert (mine.grad.double() - theirs.grad).abs().max() <= 2e-2 * theirs.grad.abs().max()
