"""What attention over shared prompts costs: visible pairs counted, memory counted, and its exactness at models' shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fasttrain_kernels import (
    SharedPrefixLayout,
    shared_prefix_attention,
    shared_prefix_attention_ref,
    shared_prefix_cpu,
)
from fasttrain_kernels.shared_prefix_cpu import CpuFlash
from fasttrain_kernels.shared_prefix_plan import BLOCK


def heads_of(tokens: int, heads: int, size: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, heads, size, generator=g).transpose(1, 2).requires_grad_()


def pairs_by_formula(groups: list[tuple[int, list[int]]]) -> int:
    """prompt x prompt / 2 + sum(R x P + R^2 / 2), with the diagonals whole."""
    return sum(p * (p + 1) // 2 + sum(r * p + r * (r + 1) // 2 for r in lengths) for p, lengths in groups)


@pytest.mark.parametrize("groups", [[(626, [130, 145])], [(2048, [98] * 8), (626, [1, 301])], [(40, [700])]])
def test_the_cpu_kernels_do_the_visible_pairs_and_at_most_half_a_block_more_a_row(
    groups: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: dict[str, list[int]] = {"forward": [], "backward": []}
    for name in done:
        real = getattr(CpuFlash, name)

        def spy(self: CpuFlash, *args: object, _real: object = real, _name: str = name) -> object:
            # (grad, q, k, ...) or (q, k, ...): batch and rows of q, rows of k
            q, k = (args[1], args[2]) if _name == "backward" else (args[0], args[1])
            done[_name].append(q.shape[0] * q.shape[2] * k.shape[2])  # type: ignore[attr-defined]
            return _real(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(CpuFlash, name, spy)
    layout = SharedPrefixLayout.from_groups(groups)
    q, k, v = (heads_of(layout.tokens, h, 8, h) for h in (2, 1, 1))
    shared_prefix_attention(q, k, v, layout).sum().backward()
    visible = pairs_by_formula(groups)
    assert visible == int(layout.dense_mask().sum())
    # a square on the diagonal is done whole: at most 1.5 blocks wide, half of it hidden
    bound = visible + layout.tokens * 3 * BLOCK // 4
    assert visible <= sum(done["forward"]) <= bound < 0.8 * layout.tokens**2
    assert done["forward"] == done["backward"]


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [128, 131])
def test_the_backward_of_a_rectangle_gives_every_thread_the_same_number_of_batches(
    length: int, four_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    real = shared_prefix_cpu._flash_backward

    def spy(grad: Tensor, q: Tensor, k: Tensor, *rest: object) -> object:
        batches.append((q.shape[0] * k.shape[1], q.shape[2]))
        return real(grad, q, k, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shared_prefix_cpu, "_flash_backward", spy)
    layout = SharedPrefixLayout.from_groups([(64, [1, length])])
    ours = [heads_of(layout.tokens, h, 16, h) for h in (9, 3, 3)]
    true = [x.detach().double().requires_grad_() for x in ours]
    grad = torch.randn(1, 9, layout.tokens, 16, generator=torch.Generator().manual_seed(5))
    shared_prefix_attention(*ours, layout).backward(grad)
    shared_prefix_attention_ref(*true, layout).backward(grad.double())
    assert (3 * 4, length // 4) in batches  # 3 heads of keys, rows in 4 pieces
    assert ((3, length % 4) in batches) == bool(length % 4)
    for mine, theirs in zip(ours, true):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad.double() - theirs.grad).abs().max() <= 3e-6 * theirs.grad.abs().max().clamp(min=1)


def peak_bytes(groups: list, **options: float) -> tuple[int, int]:
    """(bytes at the peak of a forward and backward pass, above the inputs; tokens)."""
    layout = SharedPrefixLayout.from_groups(groups)
    q, k, v = (heads_of(layout.tokens, h, 16, h) for h in (2, 1, 1))
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        shared_prefix_attention(q, k, v, layout, **options).sum().backward()
    level = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak, layout.tokens


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("one long prompt", {}),
        ("one long prompt", {"window": 1500}),
        ("packs of many groups", {}),
        ("packs of many groups", {"window": 700, "softcap": 20.0}),
    ],
    ids=str,
)
def test_memory_grows_linearly_with_tokens(shape: str, options: dict) -> None:
    def groups(rows: int) -> list:
        if shape == "one long prompt":
            return [(rows - 400, [130, 145, 125])]
        return [(626, [130, 145, 123])] * (rows // 1024)

    peaks = {rows: peak_bytes(groups(rows), **options) for rows in (8192, 16384)}
    (small, t), (large, twice) = peaks[8192], peaks[16384]
    assert twice == 2 * t == 16384
    assert small < large < 2.1 * small
    # nothing of the size of a mask of one byte a pair
    assert large < twice**2 / 4


GROUPS = {
    "odd lengths": [(125, [33, 57]), (61, [7, 29, 13])],
    "one-token completions": [(77, [1, 1, 1]), (5, [1])],
    "one completion": [(131, [67])],
    "64 completions": [(67, [1 + i % 7 for i in range(64)])],
}


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (32, 8)])
@pytest.mark.parametrize("size", [64, 80, 96, 128])
@pytest.mark.parametrize("groups", GROUPS)
def test_attention_at_the_head_shapes_of_models_equals_dense_attention_in_fp64(
    groups: str, size: int, heads: int, kv_heads: int
) -> None:
    layout = SharedPrefixLayout.from_groups(GROUPS[groups])
    ours = [heads_of(layout.tokens, h, size, i) for i, h in enumerate((heads, kv_heads, kv_heads))]
    true = [x.detach().double().requires_grad_() for x in ours]
    out = shared_prefix_attention(*ours, layout)
    ref = shared_prefix_attention_ref(*true, layout)
    grad = torch.randn(ref.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(grad.float())
    ref.backward(grad)
    assert (out.detach().double() - ref.detach()).abs().max() < 3e-6
    for mine, theirs in zip(ours, true):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad.double() - theirs.grad).abs().max() <= 3e-6 * theirs.grad.abs().max().clamp(min=1)


# Dynamo itself reads .grad of the non-leaf result where its graph ends.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_model_around_it_makes_no_graph_for_a_pack(dynamic: bool | None) -> None:
    graphs = []

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module)
        return module

    def layer(x: Tensor, layout: SharedPrefixLayout) -> Tensor:
        return shared_prefix_attention(x * 2, x, x, layout) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=count, dynamic=dynamic)
    for i in range(5):
        groups = [(3 + i, [4, 2 * i + 1]), (5, [1 + i])] if i % 2 else [(4 + i, [2 + i])]
        layout = SharedPrefixLayout.from_groups(groups)
        x = heads_of(layout.tokens, 2, 8, i)
        torch.testing.assert_close(compiled(x, layout), shared_prefix_attention_ref(x * 2, x, x, layout) + 1)
    # what comes before and what comes after, of one length and of any length
    assert len(graphs) <= 4
