"""Every Triton kernel, run by Triton's interpreter on CPU, against whole logits in fp64.

Started by test_triton_interpreter.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported.

The interpreter truncates fp32 to bf16 where a GPU rounds, so bf16 results are allowed one unit in the last place more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain_kernels import (
    COUPLE_PAIRS,
    F_DIVERGENCES,
    KINDS,
    geglu,
    geglu_ref,
    head_gradients,
    head_scores,
    head_tiles,
    label_logprob,
    label_logprob_ref,
    linear_logprob,
    linear_logprob_ref,
    preference_loss,
    rms_norm,
    rms_norm_ref,
    rotary,
    rotary_ref,
    swiglu,
    swiglu_ref,
)
from fasttrain_kernels.preference_kinds import TAKE_F_DIVERGENCE
from fasttrain_kernels.shared_prefix_merge import merge_, merge_ref_
from fasttrain_kernels.shared_prefix_plan import Gather, Slice

pytest.importorskip("triton")

# So that a few rows still make several tiles of the vocabulary.
head_tiles._CPU_TILE_BYTES = 16 << 10

OPTIONS = [
    {},
    {"temperature": 0.7, "logit_scale": 1.3},
    {"softcap": 5.0, "temperature": 0.7, "logit_scale": 2.0},
]


def problem(n: int, d: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n + d + v)
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((n, d), (v, d), (v,)))
    return hidden.to(dtype), (weight * 0.3).to(dtype), torch.randint(0, v, (n,), generator=g), bias.to(dtype)


def worst(ours: Tensor, truth: Tensor) -> float:
    return float(
        (ours.detach().double() - truth.detach().double()).abs().max()
        / truth.detach().abs().max().clamp(min=1)
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "v"), [(5, 1123, 507), (11, 57, 20011)])
def test_linear_logprob_and_its_gradients(
    n: int, d: int, v: int, dtype: torch.dtype, trained: bool, options: dict[str, float]
) -> None:
    hidden, weight, target, bias = problem(n, d, v, dtype)
    target[0], target[-1], target[2] = 0, v - 1, -100
    hidden[2] = float("nan")
    ours = [hidden.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained)]
    true = [x.detach().double().requires_grad_(x.requires_grad) for x in ours]
    flags = {"entropy_grad": True, "log_p2": True, "top1": True, "mean_logit": True}
    out = linear_logprob(ours[0], ours[1], target, ours[2], backend="triton", **flags, **options)
    ref = linear_logprob_ref(true[0], true[1], target, true[2], **options)
    (out.logprob.sum() + 0.5 * out.entropy.sum()).backward()
    (ref.logprob.sum() + 0.5 * ref.entropy.sum()).backward()
    for mine, theirs in zip(out, ref):
        assert worst(mine.float(), theirs.float()) < 1e-5
    for mine, theirs in zip(ours, true):
        if mine.requires_grad:
            assert worst(mine.grad, theirs.grad) < (1e-5 if dtype == torch.float32 else 1.2e-2)
    assert not ours[0].grad[2].any()


def test_bf16_coefficients_are_written_over_the_logits_for_the_second_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On CUDA the products take 16-bit operands and give fp32; here two widened products stand in for cuBLAS.
    class CudaLikeTiles(head_tiles.Tiles):
        def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
            super().__init__(rows, columns, dtype, device)
            self.narrow = True
            self._buffer.fill_(float("nan"))

        def product(self, h: Tensor, w: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
            tile = self._buffer.view(self.rows, self.columns)[: h.shape[0], : w.shape[0]]
            return torch.mm(h.float(), w.float().t(), out=tile)

        def accumulate_(self, out: Tensor, coefficients: Tensor, x: Tensor, first: bool = False) -> None:
            assert coefficients.dtype == x.dtype == torch.bfloat16
            out.addmm_(coefficients.float(), x.float(), beta=0.0 if first else 1.0)

    for module in (head_scores, head_gradients):
        monkeypatch.setattr(module, "Tiles", CudaLikeTiles)
    for trained in (False, True):
        hidden, weight, target, _ = problem(11, 33, 507, torch.bfloat16)
        ours = [hidden.requires_grad_(), weight.requires_grad_(trained)]
        true = [x.detach().double().requires_grad_(x.requires_grad) for x in ours]
        out = linear_logprob(*ours, target, backend="triton", entropy_grad=True)
        ref = linear_logprob_ref(*true, target)
        (out.logprob.sum() + out.entropy.sum()).backward()
        (ref.logprob.sum() + ref.entropy.sum()).backward()
        assert worst(out.logprob, ref.logprob) < 1e-5
        for mine, theirs in zip(ours, true):
            if mine.requires_grad:
                assert worst(mine.grad, theirs.grad) < 1.5e-2


def test_an_fp16_gradient_that_the_loss_scale_lifts_out_of_underflow_is_exact() -> None:
    hidden, weight, target, _ = problem(5, 57, 507, torch.float16)
    true = hidden.double().requires_grad_()
    ref = linear_logprob_ref(true, weight.double(), target, logit_scale=1e-6)
    out = linear_logprob(hidden.requires_grad_(), weight, target, logit_scale=1e-6, backend="triton")
    for logprob in (out.logprob, ref.logprob):
        (logprob.sum() * 65536).backward()
    assert hidden.grad.dtype == torch.float16
    assert (hidden.grad.double() - true.grad).norm() < 1e-3 * true.grad.norm()


@pytest.mark.parametrize("rising", [False, True])
def test_a_maximum_that_only_falls_or_only_rises_along_the_vocabulary_is_kept(rising: bool) -> None:
    v = 20011
    slope = torch.linspace(-80, 80, v)
    weight = (slope if rising else slope.flip(0))[:, None].contiguous()
    hidden, target = torch.ones(3, 1, requires_grad=True), torch.full((3,), v // 3)
    out = linear_logprob(hidden, weight, target, backend="triton")
    out.logprob.sum().backward()
    true = hidden.detach().double().requires_grad_()
    ref = linear_logprob_ref(true, weight.double(), target)
    ref.logprob.sum().backward()
    assert worst(out.logprob, ref.logprob) < 1e-5
    assert worst(hidden.grad, true.grad) < 1e-5


def test_extreme_logits_and_ties() -> None:
    v = 20011
    weight = torch.full((v, 1), -1e4)
    weight[-1] = 80.0
    out = linear_logprob(
        torch.ones(2, 1), weight, torch.tensor([v - 1, 0]), backend="triton", top1=True, entropy=True
    )
    assert out.logprob.tolist() == [0.0, -10080.0]
    assert out.top1.tolist() == [True, False]
    ties = torch.zeros(v, 1)
    out = linear_logprob(torch.ones(2, 1), ties, torch.tensor([0, 9]), backend="triton", top1=True)
    assert out.top1.tolist() == [True, False]
    assert torch.allclose(out.logprob, torch.full((2,), -float(v)).neg().log().neg(), rtol=1e-6)


def test_without_gradients_and_without_rows() -> None:
    hidden, weight, target, _ = problem(4, 16, 301)
    with torch.no_grad():
        out = linear_logprob(hidden.requires_grad_(), weight, target, backend="triton")
    assert worst(out.logprob, linear_logprob_ref(hidden, weight, target).logprob) < 1e-5
    none = linear_logprob(hidden[:0], weight, target[:0], backend="triton")
    none.logprob.sum().backward()
    assert none.logprob.shape == (0,)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "v"), [(7, 507), (3, 12289)])
def test_label_logprob_and_its_gradient(n: int, v: int, dtype: torch.dtype, inplace: bool) -> None:
    logits = (torch.randn(n, v, generator=torch.Generator().manual_seed(v)) * 4).to(dtype)
    target = torch.randint(0, v, (n,))
    target[0], target[1], target[2] = 0, v - 1, -100
    logits[2] = float("nan")
    logits[1, : v // 2] = -1e4
    leaf, true = logits.clone().requires_grad_(), logits.double().requires_grad_()
    out = label_logprob(leaf * 1, target, inplace=inplace, backend="triton")
    ref = label_logprob_ref(true, target)
    out.sum().backward()
    ref.sum().backward()
    assert worst(out, ref) < 1e-5
    assert worst(leaf.grad, true.grad) < (8e-3 if dtype == torch.bfloat16 else 1e-6)
    assert not leaf.grad[2].any()


def test_label_logprob_overwrites_logits_that_something_else_needs_only_to_raise() -> None:
    z = torch.randn(3, 33, requires_grad=True) * 1
    total = (z * z).sum() + label_logprob(z, torch.tensor([0, 1, 2]), inplace=True, backend="triton").sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
        total.backward()


@pytest.mark.parametrize("trained", [False, True])
def test_strided_inputs_and_expanded_gradients_are_read_where_they_lie(trained: bool) -> None:
    hidden, weight, target, bias = problem(9, 34, 301)
    ours = [x.clone().requires_grad_(x is hidden or trained) for x in (hidden, weight, bias)]
    # every other row, every other column, every other id
    out = linear_logprob(ours[0][::2, ::2], ours[1][:, ::2], target[::2] % 151, ours[2], backend="triton")
    true = [x.detach().double().requires_grad_(x.requires_grad) for x in ours]
    ref = linear_logprob_ref(true[0][::2, ::2], true[1][:, ::2], target[::2] % 151, true[2])
    out.logprob.sum().backward()
    ref.logprob.sum().backward()
    assert worst(out.logprob, ref.logprob) < 1e-5
    for mine, theirs in zip(ours, true):
        assert mine.grad is None or worst(mine.grad, theirs.grad) < 1e-5
    columns = torch.full((7, 2), -3.0)
    columns[:, 1] = -4.0
    mine, theirs = (preference_loss(columns[:, 0], columns[:, 1], columns[:, 1], columns[:, 0], backend=b)
                    for b in ("triton", "torch"))  # fmt: skip
    assert torch.allclose(mine.losses, theirs.losses)


def pairs(dtype: torch.dtype, count: int = 300) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(count)
    normal = lambda: torch.randn(count, generator=g, dtype=torch.float64)  # noqa: E731
    x, y = -60 + 20 * normal(), -70 + 20 * normal()
    data = {"chosen_P": (x + 2 * normal()).clamp(max=-1), "rejected_P": (y + 2 * normal()).clamp(max=-1),
            "ref_chosen_P": x, "ref_rejected_P": y, "weight": torch.rand(count, generator=g, dtype=torch.float64)}  # fmt: skip
    lengths = {k: torch.randint(5, 200, (count,), generator=g) for k in ("chosen_length", "rejected_length")}
    return {**{k: v.to(dtype) for k, v in data.items()}, **lengths}


def both(data: dict[str, Tensor], **options) -> list[list[Tensor]]:
    results = []
    for backend in ("torch", "triton"):
        leaves = [data[k].clone().requires_grad_() for k in ("chosen_P", "rejected_P")]
        rest = {**data, "chosen_P": leaves[0], "rejected_P": leaves[1]}
        out = preference_loss(**rest, backend=backend, beta=0.13, label_smoothing=0.2, **options)
        (
            2 * out.loss + (out.losses * torch.linspace(0, 1, len(out.losses), dtype=out.losses.dtype)).sum()
        ).backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        results.append([x.detach() for x in out] + grads)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in COUPLE_PAIRS])
def test_preference_losses_and_gradients_equal_torch(kind: str, dtype: torch.dtype) -> None:
    # tests/kernels/test_preference_loss.py holds the torch backend to formulas of its own.
    for mine, theirs in zip(*both(pairs(dtype), kind=kind)):
        assert worst(mine, theirs) < (1e-7 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("kind", ["cpo", "simpo", "orpo", ["orpo", "sft"], ["simpo", "cpo"]])
def test_rewards_without_a_reference_equal_torch(kind: str | list[str]) -> None:
    data = {k: v for k, v in pairs(torch.float64).items() if not k.startswith("ref_")}
    for mine, theirs in zip(*both({**data, "ref_chosen_P": None, "ref_rejected_P": None}, kind=kind)):
        assert worst(mine, theirs) < 1e-7


@pytest.mark.parametrize("kind", ["ipo", "sigmoid_norm", "simpo", "orpo", "sft"])
def test_an_answer_without_tokens_counts_as_one_token_long(kind: str) -> None:
    data = pairs(torch.float64)
    data["chosen_length"][0] = data["rejected_length"][7] = 0
    for mine, theirs in zip(*both(data, kind=kind)):
        assert theirs.isfinite().all() and worst(mine, theirs) < 1e-7


@pytest.mark.parametrize("divergence", list(F_DIVERGENCES))
def test_f_divergences_and_weighted_sums_of_kinds_equal_torch(divergence: str) -> None:
    kinds = ["sigmoid", "ipo", "sft", "discopop", "hinge"]
    for mine, theirs in zip(
        *both(pairs(torch.float64), kind=kinds, weights=[1, 0.1, 2, 3, 0.5], f_divergence=divergence)
    ):
        assert worst(mine, theirs) < 1e-7


@pytest.mark.parametrize("divergence", list(F_DIVERGENCES))
def test_far_apart_log_probs_give_finite_losses_and_gradients(divergence: str) -> None:
    far, near = torch.tensor([-1e4, -1.0, -1e-9, -60.0, -2.0]), torch.tensor([-1.0, -1e4, -1e-9, -2.0, -60.0])
    length = torch.tensor([3, 900, 4, 3, 3])
    for kind in sorted({*KINDS} - COUPLE_PAIRS if divergence == "reverse_kl" else TAKE_F_DIVERGENCE):
        leaves = [far.clone().requires_grad_(), near.clone().requires_grad_()]
        out = preference_loss(*leaves, near, far, kind=kind, label_smoothing=0.1, chosen_length=length,
                              rejected_length=length, f_divergence=divergence, backend="triton")  # fmt: skip
        out.loss.backward()
        for x in (out.losses, *(leaf.grad for leaf in leaves if leaf.grad is not None)):
            assert x.isfinite().all(), kind


def test_a_batch_without_pairs_has_a_loss_of_0() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    out = preference_loss(nothing, nothing, nothing.detach(), nothing.detach(), backend="triton")
    out.loss.backward()
    assert out.loss.item() == 0 and out.losses.shape == (0,) and nothing.grad is not None


def test_a_number_that_is_not_finite_is_no_log_prob_of_0() -> None:
    hidden, weight = torch.ones(3, 16), torch.ones(40, 16)
    hidden[1, 3], target = torch.nan, torch.tensor([1, 2, 3])
    for logprob in (
        linear_logprob(hidden, weight, target, backend="triton").logprob,
        label_logprob(hidden @ weight.T, target, backend="triton"),
    ):
        assert logprob.isnan().tolist() == [False, True, False]
    nan, one = torch.tensor([torch.nan, -1.0]), torch.tensor([-1.0, -2.0])
    length = torch.tensor([3, 4])
    for kind in (k for k in KINDS if k not in COUPLE_PAIRS):
        for divergence in F_DIVERGENCES if kind in TAKE_F_DIVERGENCE else ("reverse_kl",):
            out = preference_loss(nan, one, one, one, kind=kind, label_smoothing=0.1, chosen_length=length,
                                  rejected_length=length, f_divergence=divergence, backend="triton")  # fmt: skip
            assert out.losses.isnan().tolist() == [True, False], (kind, divergence)


def test_odds_of_answers_that_are_all_but_certain_have_torchs_gradient() -> None:
    """A mean log-prob is kept off 0 where its odds would be infinite, not elsewhere."""
    data = {
        k: torch.tensor([-1e-9, 0.0, -3.0, -1e-3], dtype=torch.float64) for k in ("chosen_P", "ref_chosen_P")
    }
    data |= {
        k: torch.tensor([-2.0, -4.0, -1e-9, 0.0], dtype=torch.float64)
        for k in ("rejected_P", "ref_rejected_P")
    }
    lengths = {k: torch.full((4,), n) for k, n in (("chosen_length", 3), ("rejected_length", 5))}
    torchs, tritons = both({**data, **lengths}, kind="orpo")
    assert torchs[-2][0] != 0
    for mine, theirs in zip(torchs, tritons, strict=True):
        assert worst(mine, theirs) < 1e-7


def test_kinds_that_sort_refuse_triton_by_name() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="backend: wanted 'torch' or None for"):
        preference_loss(x, x, x, x, kind="aot", backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), [(9, 64), (1, 24), (40, 128)])
@pytest.mark.parametrize("rows", [Slice(11, 30), Gather(torch.tensor([3, 1, 22, 23]))])
def test_merging_attention_parts(rows: Slice | Gather, heads: int, size: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    draw = lambda n: torch.randn(1, n, heads, size, generator=g).to(dtype).transpose(1, 2)  # noqa: E731
    count = len(rows.take(torch.zeros(1, 1, 40))[0, 0])
    out, o = draw(40), draw(count)
    # far apart both ways, and equal
    lse = torch.randn(1, 40, heads, generator=g).mul(30).transpose(1, 2)
    l_part = torch.randn(1, count, heads, generator=g).mul(30).transpose(1, 2)
    l_part[..., 0] = rows.take(lse)[..., 0]
    whole, whole_lse = rows.take(out).double(), rows.take(lse).double()
    merge_ref_(whole, whole_lse, o.double(), l_part.double())
    untouched = out.clone(), lse.clone()
    merge_(out, lse, rows, o, l_part)
    bar = 2e-2 if dtype == torch.bfloat16 else 1e-6
    assert (rows.take(out).double() - whole).abs().max() <= bar * whole.abs().max()
    assert (rows.take(lse).double() - whole_lse).abs().max() <= 1e-5
    rows.put(out, rows.take(untouched[0]))
    rows.put(lse, rows.take(untouched[1]))
    assert torch.equal(out, untouched[0]) and torch.equal(lse, untouched[1])


def agrees(
    function: Callable[..., Tensor], definition: Callable[..., Tensor], leaves: list[Tensor], *frozen: Any
) -> None:
    """Values and gradients with the definition's in fp64, for a gradient that comes in with strides of its own."""
    (dtype,) = {x.dtype for x in leaves}
    grad = torch.randn(leaves[0].shape[::-1], generator=torch.Generator().manual_seed(5)).to(dtype)
    true = [x.detach().double().requires_grad_() for x in leaves]
    expected = definition(*true, *(x.double() if isinstance(x, Tensor) else x for x in frozen))
    ours = [x.detach().requires_grad_() for x in leaves]
    out = function(*ours, *frozen, backend="triton")
    back = grad.permute(*reversed(range(grad.dim())))
    found = [out, *torch.autograd.grad(out, ours, back)]
    wanted = [expected, *torch.autograd.grad(expected, true, back.double())]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == dtype and mine.shape == theirs.shape
        bar = 2**-6 if dtype == torch.bfloat16 else 2e-6  # two values cut to 16 bits
        assert (mine.double() - theirs).abs().max() <= bar * theirs.abs().max()


NARROW = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(37, 57), (3, 5, 128), (2, 2049), (1, 1)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, one_plus: bool) -> None:
    g = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(*size, generator=g) * 4 for size in (shape, shape[-1:]))
    x[0, 0] = 0
    ours, definition = (functools.partial(one, one_plus=one_plus) for one in (rms_norm, rms_norm_ref))
    agrees(ours, definition, [x.to(dtype)], weight.to(dtype), 1e-2)
    # rows and columns that do not follow one another
    agrees(ours, definition, [x.repeat_interleave(2, -1).to(dtype)[..., ::2]], weight.to(dtype), 1e-2)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's word for a sigmoid of 0
@pytest.mark.parametrize(("product", "definition"), [(swiglu, swiglu_ref), (geglu, geglu_ref)])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(5, 37), (1, 3, 2051)])
def test_gated_activation(shape: tuple[int, ...], dtype: torch.dtype, product: Any, definition: Any) -> None:
    g = torch.Generator().manual_seed(2)
    gate, up = ((torch.randn(*shape, generator=g) * 4).to(dtype) for _ in range(2))
    gate[0, ..., :2] = torch.tensor([90.0, -90.0])
    agrees(product, definition, [gate, up])
    halves = torch.cat((gate, up), -1)
    agrees(product, definition, list(halves.chunk(2, -1)))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("same", [True, False], ids=["one for all", "one each"])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("heads", "size"), [(9, 64), (1, 20), (40, 128)])
def test_rotary(heads: int, size: int, axis: int, same: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(heads)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    x, cos, sin = draw(2, 7, heads, size), *(draw(1 if same else 2, 7, size) for _ in range(2))
    if axis == 1:  # as transformers hands them over: (B, H, T, K), of another order in memory
        x = x.transpose(1, 2)
    agrees(rotary, rotary_ref, [x], cos.unsqueeze(axis), sin.unsqueeze(axis))


def test_layer_passes_without_rows_and_where_triton_cannot() -> None:
    empty = torch.zeros(0, 6)
    assert rms_norm(empty, torch.ones(6), 1e-6, backend="triton").shape == (0, 6)
    assert swiglu(empty, empty, backend="triton").shape == (0, 6)
    none = torch.zeros(1, 2, 0, 6)
    assert rotary(none, none[:, :1], none[:, :1], backend="triton").shape == none.shape
    for call, wanted in (
        (lambda: rms_norm(torch.ones(1, 40000), torch.ones(40000), 1e-6, backend="triton"), "rows of at most 32768"),
        (lambda: swiglu(torch.ones(2).double(), torch.ones(2).double(), backend="triton"), "fp32, bf16 or fp16"),
        (lambda: rotary(torch.ones(2, 6), torch.ones(6), torch.ones(6), backend="triton"), "four axes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"'triton' wants {wanted}"):
            call()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_nothing_reads_memory_it_did_not_write() -> None:
    # Deterministic mode fills every fresh buffer with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        test_linear_logprob_and_its_gradients(5, 57, 507, torch.float32, False, OPTIONS[2])
        test_linear_logprob_and_its_gradients(5, 57, 507, torch.float32, True, OPTIONS[1])
        test_label_logprob_and_its_gradient(7, 507, torch.float32, False)
        test_norm((37, 57), torch.float32, False)
        test_gated_activation((5, 37), torch.float32, swiglu, swiglu_ref)
        test_rotary(9, 64, 1, True, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
