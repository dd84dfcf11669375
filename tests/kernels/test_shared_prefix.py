"""The layout's indices, and attention over it against a dense mask in fp64."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fasttrain_kernels import SharedPrefixLayout, shared_prefix_attention, shared_prefix_attention_ref
from fasttrain_kernels.shared_prefix_plan import Plan, attention_plan

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
    layout = SharedPrefixLayout.from_groups([(3, [2, 1])], [[(0, 2)]])
    assert layout != SharedPrefixLayout.from_groups([(3, [2, 1])])
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
        ([(4.5, [1])], r"groups\[0\]: wanted a prompt of 1 token or more, got 4.5"),
        ([(4, [1.5])], r"groups\[0\]: completion 0: wanted 1 token or more, got 1.5"),
    ],
)
def test_empty_parts_of_a_layout_are_refused(groups: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedPrefixLayout.from_groups(groups)


@st.composite
def layouts(draw: st.DrawFn) -> SharedPrefixLayout:
    """Small layouts, some with bidirectional spans in their prompts."""
    groups = draw(GROUPS)
    spans = []
    for prompt, _ in groups:
        edges = sorted(draw(st.sets(st.integers(0, prompt), max_size=4)))
        spans.append(list(zip(edges[::2], edges[1::2])))
    return SharedPrefixLayout.from_groups(groups, spans)


def pairs_of(plan: Plan, tokens: int) -> Tensor:
    """How often each (row, column) is computed by the parts of a plan, and each row as a diagonal."""
    row = torch.arange(tokens)[None, None, :, None]
    seen = torch.zeros(tokens, tokens, dtype=torch.int64)
    for part in [*plan.first, *plan.more]:
        for queries, keys in zip(part.queries.take(row), part.keys.take(row), strict=True):
            square = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.int64)
            square = square.tril() if part.how.causal else square
            square = square if part.how.above is None else square.triu(part.how.above)
            assert (square.sum(1) > 0).all(), "a kernel must not get a row without keys"
            seen[queries[0, :, 0, None], keys[0, None, :, 0]] += square
    return seen


@settings(deadline=None, max_examples=150)
@given(layout=layouts(), window=st.none() | st.integers(1, 80), block=st.sampled_from([4, 16, 128]))
def test_a_plan_covers_every_visible_pair_once_and_no_other(
    layout: SharedPrefixLayout, window: int | None, block: int
) -> None:
    plan = attention_plan(layout, window, block)
    assert torch.equal(pairs_of(plan, layout.tokens), layout.dense_mask(window=window).long())
    rows = torch.cat(
        [part.queries.take(torch.arange(layout.tokens)[None, None, :, None]).flatten() for part in plan.first]
    )
    assert sorted(rows.tolist()) == list(range(layout.tokens))


def test_a_window_counts_positions_and_a_span_is_bidirectional_written_out_by_hand() -> None:
    layout = SharedPrefixLayout.from_groups([(4, [2, 1])], bidirectional=[[(1, 3)]])
    # rows:     p i i p a a b; positions 0 1 2 3 4 5 4
    assert layout.dense_mask(window=3).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[(0, 2)], []], "bidirectional: wanted the spans of 1 groups, got 2"),
        ([[(2, 2)]], r"bidirectional\[0\]: wanted spans in order within a prompt of 4 tokens, got 2 to 2"),
        ([[(0, 2), (1, 3)]], "got 1 to 3"),
        ([[(2, 5)]], "got 2 to 5"),
    ],
)
def test_spans_outside_a_prompt_or_out_of_order_are_refused(spans: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedPrefixLayout.from_groups([(4, [1])], spans)


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


OPTIONS = {
    "window": {"window": 100},
    "narrow window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "bidirectional": {"spans": True},
    "all": {"window": 70, "softcap": 2.0, "sinks": True, "spans": True},
}


@pytest.mark.parametrize("dtype", list(BAR))
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("groups", [[(5, [3, 3, 4])], [(300, [40, 41]), (17, [1, 1]), (1, [333])]])
def test_options_and_their_gradients_equal_dense_attention(
    groups: list, name: str, dtype: torch.dtype
) -> None:
    options = dict(OPTIONS[name])
    spans = [[(p // 3, p // 3 + 1), (p // 2, p)] if p > 2 else [] for p, _ in groups]
    layout = SharedPrefixLayout.from_groups(groups, spans if options.pop("spans", False) else None)
    ours = [heads_of(layout.tokens, h, 16, dtype, i) for i, h in enumerate((4, 2, 2))]
    true = [x.detach().double().requires_grad_() for x in ours]
    if options.pop("sinks", False):
        ours.append(torch.tensor([0.3, -2.0, 4.0, 1.0], dtype=dtype, requires_grad=True))
        true.append(ours[3].detach().double().requires_grad_())
    out = shared_prefix_attention(*ours[:3], layout, sinks=ours[3] if ours[3:] else None, **options)
    ref = shared_prefix_attention_ref(*true[:3], layout, sinks=true[3] if true[3:] else None, **options)
    grad = torch.randn(ref.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(grad.to(dtype))
    ref.backward(grad)
    bar, grad_bar = BAR[dtype]
    # a narrow window averages little: values of 4, whose bf16 neighbours are 1/64 apart
    assert ((out.detach().double() - ref.detach()).abs() <= bar * ref.detach().abs().clamp(min=1)).all()
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


LYING = {
    "columns first": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: torch.stack([x, x.flip(-1)], -1).flatten(-2)[..., ::2],
    "one column repeated": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("lying", LYING)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_heads_whose_numbers_do_not_lie_next_to_each_other_are_read_right(name: str, lying: str) -> None:
    layout = SharedPrefixLayout.from_groups([(10, [5, 6])])
    plain = {n: heads_of(layout.tokens, 4, 16, torch.float32, i) for i, n in enumerate("qkv")}
    ours = {n: LYING[lying](x) if n == name else x for n, x in plain.items()}
    assert ours[name].stride(-1) != 1
    out, ref = (
        shared_prefix_attention(**ours, layout=layout),
        shared_prefix_attention_ref(**ours, layout=layout),
    )
    assert torch.allclose(out, ref, atol=1e-5)
    # the gradient that arrives lies columns first
    grad = LYING["columns first"](torch.randn_like(ref))
    leaves = list(plain.values())
    found, expected = (torch.autograd.grad(x, leaves, grad) for x in (out, ref))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_a_layout_first_read_in_inference_mode_can_be_trained_with() -> None:
    layout = SharedPrefixLayout.from_groups([(20, [9, 6])])
    q, k, v = (heads_of(layout.tokens, 2, 8, torch.float32, i) for i in range(3))
    indices = ("position_ids", "predictor_rows", "completion_rows", "sequence_index", "dense_mask")
    with torch.inference_mode():
        made = [getattr(layout, name)() for name in indices]
        shared_prefix_attention(q, k, v, layout, window=5)
    assert not any(x.is_inference() for x in made)
    q.flatten(1).index_select(1, layout.predictor_rows()).sum().backward()
    shared_prefix_attention(q, k, v, layout, window=5).sum().backward()
    assert v.grad is not None


class Layer(nn.Module):
    """Self-attention over a layout that comes with the call, as a model's layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x_TD: Tensor, layout: SharedPrefixLayout) -> Tensor:
        q, k, v = self.project(x_TD).view(1, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return shared_prefix_attention(q, k, v, layout, window=5).transpose(1, 2).flatten(2)[0]


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning"
)  # torch's, of one rank and of old ways
@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_a_layout_goes_through_fsdp_in_mixed_precision_as_the_object_it_is(way: str) -> None:
    """FSDP makes dataclasses among a module's inputs anew."""
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        MixedPrecision,
        MixedPrecisionPolicy,
        fully_shard,
    )
    from torch.distributed.tensor import init_device_mesh

    layout = SharedPrefixLayout.from_groups([(9, [4, 3]), (5, [2])])
    layer, x = Layer(), torch.randn(layout.tokens, 8)
    expected = layer(x, layout)
    seen: list[object] = []
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped: nn.Module
        if way == "fsdp1":
            wrapped = FullyShardedDataParallel(
                layer, device_id=torch.device("cpu"), mixed_precision=MixedPrecision(torch.bfloat16)
            )
        else:
            policy = MixedPrecisionPolicy(torch.bfloat16)
            wrapped = fully_shard(layer, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        out = wrapped(x, layout)
        out.float().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert seen and seen[-1] is layout
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_the_default_device_is_not_a_layouts() -> None:
    layout = SharedPrefixLayout.from_groups([(20, [9, 6])])
    with torch.device("meta"):
        made = [layout.position_ids(), layout.predictor_rows("cpu"), layout.dense_mask("cpu", window=5)]
    assert {x.device.type for x in made} == {"cpu"}
    assert layout.position_ids("meta").device.type == "meta"


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_autocast_rounds_q_k_and_v_to_its_dtype_and_nothing_else(softcap: float | None) -> None:
    # As a stock model leaves them: rotary embeddings have made q and k fp32 again, v is the projection's bf16.
    layout = SharedPrefixLayout.from_groups([(150, [20, 9])])
    q, k, v = (heads_of(layout.tokens, 2, 8, torch.float32, i) for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = shared_prefix_attention(q, k, v.bfloat16(), layout, softcap=softcap)
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    rounded = shared_prefix_attention(*(x.bfloat16() for x in (q, k, v)), layout, softcap=softcap)
    assert out.dtype == torch.bfloat16 and torch.equal(out, rounded)
    expected = torch.autograd.grad(rounded.float().square().sum(), (q, k, v))
    for mine, theirs in zip(grads, expected, strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        double = shared_prefix_attention(q.double(), k.double(), v.double(), layout, softcap=softcap)
    assert double.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(1, 4, 6, 8)}, r"q: wanted shape \(1, H, 7, K\), got \(1, 4, 6, 8\)"),
        ({"k": torch.ones(1, 3, 7, 8)}, r"k: wanted shape \(1, a divisor of 4, 7, 8\), got \(1, 3, 7, 8\)"),
        ({"v": torch.ones(1, 4, 7, 8)}, r"v: wanted shape \(1, 2, 7, 8\) as k"),
        ({"v": torch.ones(1, 2, 7, 8).double()}, "v: wanted dtype torch.float32 as q, got torch.float64"),
        ({"q": torch.ones(1, 4, 7, 8, dtype=torch.int64)}, "q: wanted a floating dtype, got torch.int64"),
        ({"layout": [(3, [2, 2])]}, "layout: wanted a SharedPrefixLayout, got list"),
        ({"window": 2.5}, "window: wanted 1 token or more, got 2.5"),
        ({"softcap": torch.tensor(3.0)}, r"softcap: wanted a positive number, got tensor\(3.\)"),
        ({"scale": torch.tensor(3.0)}, r"scale: wanted a positive number, got tensor\(3.\)"),
        ({"window": 0}, "window: wanted 1 token or more, got 0"),
        ({"softcap": -1.0}, "softcap: wanted a positive number, got -1.0"),
        ({"softcap": float("inf")}, "softcap: wanted a positive number, got inf"),
        ({"scale": 0.0}, "scale: wanted a positive number, got 0.0"),
        ({"scale": -0.1}, "scale: wanted a positive number, got -0.1"),
        ({"sinks": torch.ones(2)}, r"sinks: wanted shape \(4,\) on cpu, got \(2,\) on cpu"),
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
