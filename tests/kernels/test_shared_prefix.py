"""The layout's indices, and attention over it against a dense mask in fp64."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fasttrain_kernels import SharedPrefixLayout, shared_prefix_attention, shared_prefix_attention_ref
from fasttrain_kernels.shared_prefix_attention import attention_plan

GROUPS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=5)),
    min_size=1,
    max_size=4,
)


def test_indices_of_a_small_layout_written_out_by_hand() -> None:
    layout = SharedPrefixLayout.from_groups([(3, [2, 1]), (1, [2])])
    # rows:     p p p a a b | p c c
    assert layout.tokens == 9
    assert layout.sequences == 3
    assert layout.lengths == (2, 1, 2)
    assert layout.position_ids().tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert layout.predictor_rows().tolist() == [2, 3, 2, 6, 7]
    assert layout.completion_rows().tolist() == [3, 4, 5, 7, 8]
    assert layout.sequence_index().tolist() == [0, 0, 1, 2, 2]
    assert layout.dense_mask().int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1],
    ]


def test_equal_layouts_are_equal_and_survive_pickling() -> None:
    layout = SharedPrefixLayout.from_groups([(3, [2, 1])])
    layout.position_ids()
    copy = pickle.loads(pickle.dumps(layout))
    assert copy == layout and hash(copy) == hash(layout)
    assert torch.equal(copy.position_ids(), layout.position_ids())
    assert copy.position_ids() is copy.position_ids("cpu")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "groups: wanted a group or more"),
        ([(0, [1])], r"groups\[0\]: wanted a prompt of 1 token or more, got 0"),
        ([(4, [1]), (4, [])], r"groups\[1\]: wanted a completion or more"),
        ([(4, [1, 0])], r"groups\[0\]: completion 1: wanted 1 token or more, got 0"),
    ],
)
def test_empty_parts_of_a_layout_are_refused(groups: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedPrefixLayout.from_groups(groups)


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, block=st.sampled_from([4, 16, 128]))
def test_a_plan_covers_every_visible_pair_once_and_no_other(groups: list, block: int) -> None:
    layout = SharedPrefixLayout.from_groups(groups)
    plan = attention_plan(layout, block)
    seen = torch.zeros(layout.tokens, layout.tokens, dtype=torch.int64)
    for d in plan.diagonals:
        for a in range(d.start, d.start + d.segments * d.length, d.length):
            seen[a : a + d.length, a : a + d.length] += torch.ones(
                d.length, d.length, dtype=torch.int64
            ).tril()
    for r in plan.rectangles:
        seen[r.q0 : r.q1, r.k0 : r.k1] += 1
    assert torch.equal(seen, layout.dense_mask().long())


def heads_of(tokens: int, heads: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(1, heads, tokens, size) laid out as a model's projection leaves it: (1, tokens, heads, size)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, heads, size, generator=g, dtype=torch.float64).to(dtype)
    return x.transpose(1, 2).requires_grad_()


BAR = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 2e-2)}


@pytest.mark.parametrize("dtype", list(BAR))
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 24), (3, 3, 17)])
@pytest.mark.parametrize(
    "groups",
    [[(5, [3, 3, 4])], [(1, [1])], [(300, [40, 40, 41]), (17, [1, 1]), (1, [333])], [(413, [130] * 3 + [7])]],
)
def test_attention_and_its_gradients_equal_dense_attention(
    groups: list, heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    layout = SharedPrefixLayout.from_groups(groups)
    ours = [heads_of(layout.tokens, h, size, dtype, i) for i, h in enumerate((heads, kv_heads, kv_heads))]
    true = [x.detach().double().requires_grad_() for x in ours]
    out = shared_prefix_attention(*ours, layout, scale=0.21)
    ref = shared_prefix_attention_ref(*true, layout, scale=0.21)
    grad = torch.randn(ref.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(grad.to(dtype))
    ref.backward(grad)
    bar, grad_bar = BAR[dtype]
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert (out.detach().double() - ref.detach()).abs().max() < bar
    for mine, theirs in zip(ours, true):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad.double() - theirs.grad).abs().max() <= grad_bar * theirs.grad.abs().max().clamp(
            min=1
        )


def test_a_completion_is_blind_to_the_other_completions_and_groups() -> None:
    layout = SharedPrefixLayout.from_groups([(20, [9, 6]), (4, [5])])
    q, k, v = (heads_of(layout.tokens, 2, 8, torch.float32, i).detach() for i in range(3))
    alone = SharedPrefixLayout.from_groups([(20, [6])])
    rows = torch.cat([torch.arange(20), torch.arange(29, 35)])
    whole = shared_prefix_attention(q, k, v, layout)[:, :, rows]
    part = shared_prefix_attention(*(x[:, :, rows] for x in (q, k, v)), alone)
    assert torch.allclose(whole, part, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(1, 4, 6, 8)}, r"q: wanted shape \(1, H, 7, K\), got \(1, 4, 6, 8\)"),
        ({"k": torch.ones(1, 3, 7, 8)}, r"k: wanted shape \(1, a divisor of 4, 7, 8\), got \(1, 3, 7, 8\)"),
        ({"v": torch.ones(1, 4, 7, 8)}, r"v: wanted shape \(1, 2, 7, 8\) as k"),
        ({"v": torch.ones(1, 2, 7, 8).double()}, "v: wanted dtype torch.float32 as q, got torch.float64"),
        ({"backend": "magic"}, "backend: wanted one of .*, got 'magic'"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_wanted_and_what_came(change: dict, message: str) -> None:
    layout = SharedPrefixLayout.from_groups([(3, [2, 2])])
    right = {
        "q": torch.ones(1, 4, 7, 8),
        "k": torch.ones(1, 2, 7, 8),
        "v": torch.ones(1, 2, 7, 8),
        "layout": layout,
    }
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(**{**right, **change})
