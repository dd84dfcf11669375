"""The flex backend: its block mask against torch's own, its results against dense attention, its compilations counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from fasttrain_kernels import SharedPrefixLayout, shared_prefix_attention, shared_prefix_attention_ref
from fasttrain_kernels import shared_prefix_flex as flex_module
from fasttrain_kernels.shared_prefix_flex import block_mask, flex, kernel_options
from fasttrain_kernels.shared_prefix_parts import Scores

CPU = torch.device("cpu")
LENGTH = st.integers(1, 300)


@st.composite
def layouts(draw: st.DrawFn) -> SharedPrefixLayout:
    groups = draw(
        st.lists(st.tuples(LENGTH, st.lists(LENGTH, min_size=1, max_size=3)), min_size=1, max_size=3)
    )
    edges = [sorted(draw(st.sets(st.integers(0, prompt), max_size=4))) for prompt, _ in groups]
    return SharedPrefixLayout.from_groups(groups, [list(zip(e[::2], e[1::2])) for e in edges])


@settings(deadline=None, max_examples=40)
@given(layout=layouts(), window=st.none() | st.integers(1, 400))
def test_the_block_mask_is_the_one_torch_makes_from_the_dense_mask(
    layout: SharedPrefixLayout, window: int | None
) -> None:
    ours = block_mask(layout, window, CPU)
    dense = layout.dense_mask(window=window)
    t = layout.tokens
    assert ours.shape == (1, 1, t, t)
    assert torch.equal(torch_flex.create_mask(ours.mask_mod, 1, 1, t, t, device="cpu")[0, 0], dense)
    truth = torch_flex.create_block_mask(lambda b, h, q, kv: dense[q, kv], None, None, t, t, device="cpu")
    for number, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices"),
                            ("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")):  # fmt: skip
        assert torch.equal(getattr(ours, number), getattr(truth, number))
        for row, count in enumerate(getattr(ours, number)[0, 0].tolist()):
            mine, theirs = (getattr(mask, indices)[0, 0, row, :count] for mask in (ours, truth))
            assert torch.equal(mine, theirs)


def test_a_block_mask_is_made_once_per_pack_and_window() -> None:
    layout = SharedPrefixLayout.from_groups([(300, [40, 41])])
    assert block_mask(layout, None, CPU) is block_mask(layout, None, CPU) is block_mask(layout, 341, CPU)
    assert block_mask(layout, 340, CPU) is not block_mask(layout, None, CPU)


@pytest.mark.parametrize(
    ("kib", "dtype", "size", "wanted"),
    [
        (227, torch.bfloat16, 128, None),
        (0, torch.bfloat16, 128, None),  # AMD's
        (163, torch.bfloat16, 256, None),
        (99, torch.bfloat16, 128, {"fwd_num_stages": 2}),
        (99, torch.float32, 128, {"fwd_num_stages": 1}),
        (
            99,
            torch.bfloat16,
            256,
            {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "bwd_BLOCK_M1": 32, "bwd_BLOCK_N2": 32},
        ),
        (64, torch.float32, 128, {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 16, "FORCE_USE_FLEX_ATTENTION": True}),
    ],
)
def test_tiles_are_smaller_where_a_block_has_too_little_shared_memory_for_torchs(
    kib: int, dtype: torch.dtype, size: int, wanted: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An RTX 4090's 99 KiB did not hold what torch compiled for heads of 128."""
    there = SimpleNamespace(**({"shared_memory_per_block_optin": kib << 10} if kib else {}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: there)
    q: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 4, 7, size))
    options = kernel_options(q)
    assert (options is None) is (wanted is None) and (wanted or {}).items() <= (options or {}).items()


def test_the_tiles_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        given.update(options)
        return q

    monkeypatch.setattr(flex_module, "compiled", lambda: attend)
    monkeypatch.setattr(flex_module, "kernel_options", lambda q: {"fwd_num_stages": 2})
    q = torch.ones(1, 2, 7, 16)
    flex(q, q, q, SharedPrefixLayout.from_groups([(3, [4])]), Scores(1.0), None, None)
    assert given["kernel_options"] == {"fwd_num_stages": 2}


def heads_of(tokens: int, heads: int, size: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, heads, size, generator=g).transpose(1, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own imports
def test_one_compilation_serves_packs_of_all_lengths_and_windows_beyond_a_block() -> None:
    """Compiled by inductor for the CPU, which has the forward only."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    flex_module.compiled.cache_clear()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for groups, spans, window in (
        ([(300, [40, 41]), (17, [1, 1]), (1, [333])], None, None),
        ([(128, [128])], None, None),
        ([(129, [3, 255])], [[(5, 120)]], 100),
        ([(701, [50, 61, 70])], None, 64),
        ([(1000, [257, 30])], None, None),
        ([(5, [3])], None, None),
        ([(101, [3, 9])], [[(5, 90)]], 44),
    ):
        layout = SharedPrefixLayout.from_groups(groups, spans)
        q, k, v = (heads_of(layout.tokens, heads, 32, heads) for heads in (4, 2, 2))
        out = flex(q, k, v, layout, Scores(32**-0.5), layout.binding_window(window), None)
        assert (out - shared_prefix_attention_ref(q, k, v, layout, window=window)).abs().max() < 2e-6
        assert out.transpose(1, 2).is_contiguous()
        # a dimension of one is a kernel of its own to torch: packs of a single block have theirs
        assert graphs["unique_graphs"] - before == (1 if layout.tokens > flex_module.BLOCK else 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 50}, {"softcap": 1.5}, {"window": 70, "softcap": 2.0, "sinks": [0.3, -2.0, 4.0, 1.0]}],
)
def test_output_and_gradients_equal_dense_attention(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlexAttention as torch differentiates it, not compiled: its check that refuses gradients on CPU is put aside."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_module, "compiled", lambda: torch_flex.flex_attention)
    layout = SharedPrefixLayout.from_groups([(61, [40, 13]), (17, [1, 1]), (1, [33])], [[(5, 40)], [], []])
    choice = dict(options)
    sinks = choice.pop("sinks", None)
    ours = [heads_of(layout.tokens, heads, 16, heads).requires_grad_() for heads in (4, 2, 2)]
    true = [x.detach().double().requires_grad_() for x in ours]
    if sinks:
        ours.append(torch.tensor(sinks, requires_grad=True))
        true.append(torch.tensor(sinks, dtype=torch.float64, requires_grad=True))
    scores = Scores(0.21, choice.get("softcap"))
    out = flex(*ours[:3], layout, scores, choice.get("window"), ours[3] if sinks else None)
    ref = shared_prefix_attention_ref(
        *true[:3], layout, scale=0.21, sinks=true[3] if sinks else None, **choice
    )
    grad = torch.randn(ref.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(grad.float())
    ref.backward(grad)
    assert (out.detach().double() - ref.detach()).abs().max() < 1e-5
    for mine, theirs in zip(ours, true):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad.double() - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max().clamp(min=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (32, 8, 128), (4, 4, 80)])
@pytest.mark.parametrize("options", [{}, {"window": 300}, {"softcap": 2.0}, {"sinks": True}])
@pytest.mark.parametrize("groups", [[(626, [130, 145])], [(300, [1, 1, 1]), (17, [40]), (413, [130] * 7)]])
def test_flex_attention_on_a_gpu_equals_dense_attention(
    groups: list, options: dict[str, Any], heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    spans = [[(p // 3, p // 2)] for p, _ in groups]
    layout = SharedPrefixLayout.from_groups(groups, spans)
    choice = dict(options)
    sinks = torch.linspace(-2, 4, heads, device="cuda") if choice.pop("sinks", None) else None
    ours = [heads_of(layout.tokens, h, size, i).to("cuda", dtype).requires_grad_()
            for i, h in enumerate((heads, kv_heads, kv_heads))]  # fmt: skip
    true = [x.detach().double().requires_grad_() for x in ours]
    out = shared_prefix_attention(*ours, layout, backend="flex", sinks=sinks, **choice)
    ref = shared_prefix_attention_ref(
        *true, layout, sinks=None if sinks is None else sinks.double(), **choice
    )
    grad = torch.randn(ref.shape, device="cuda", dtype=torch.float64)
    out.backward(grad.to(dtype))
    ref.backward(grad)
    bar = 1e-2 if dtype == torch.bfloat16 else 5e-3
    assert ((out.detach().double() - ref.detach()).abs() <= bar * ref.detach().abs().clamp(min=1)).all()
    for mine, theirs in zip(ours, true):
        assert (mine.grad.double() - theirs.grad).abs().max() <= 2 * bar * theirs.grad.abs().max()
