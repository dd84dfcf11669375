"""`label_logprob` against log_softmax and gather in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fasttrain_kernels import label_logprob, label_logprob_ref

BAR = {
    torch.float32: (1e-5, 1e-6),
    torch.bfloat16: (1e-5, 1e-2),
    torch.float16: (1e-5, 1e-3),
    torch.float64: (1e-12,) * 2,
}


def problem(n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + v)
    logits = (torch.randn(n, v, generator=g) * 4).to(dtype)
    return logits, torch.randint(0, v, (n,), generator=g), torch.randn(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", list(BAR))
@pytest.mark.parametrize(("n", "v"), [(252, 507), (33, 49153), (1, 32064)])
def test_values_and_gradients_equal_log_softmax_in_fp64(
    n: int, v: int, dtype: torch.dtype, inplace: bool
) -> None:
    logits, target, grad = problem(n, v, dtype)
    target[0], target[-1] = 0, v - 1
    leaf = logits.clone().requires_grad_()
    true = logits.double().requires_grad_()
    # bf16 logits may be exactly representable: the truth is fp64 of the very same numbers.
    out = label_logprob(leaf * 1, target, inplace=inplace)
    ref = label_logprob_ref(true, target)
    out.backward(grad.to(out.dtype))
    ref.backward(grad)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (out.double() - ref).abs().max() < BAR[dtype][0] * ref.detach().abs().max()
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    assert (leaf.grad.double() - true.grad).abs().max() < BAR[dtype][1] * true.grad.abs().max()


def test_in_place_the_gradient_lies_where_the_logits_were() -> None:
    logits, target, _ = problem(9, 301, torch.float32)
    hidden = logits.requires_grad_()
    z = hidden * 1
    pointer, seen = z.data_ptr(), []
    z.register_hook(lambda g: seen.append(g.data_ptr()))
    label_logprob(z, target, inplace=True).sum().backward()
    assert seen == [pointer]


def test_overwritten_logits_that_something_else_needs_raise() -> None:
    logits, target, _ = problem(9, 301, torch.float32)
    z = logits.requires_grad_() * 1
    other = z.exp().sum() + (z * z).sum()
    total = other + label_logprob(z, target, inplace=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
        total.backward()


def test_ignored_rows_are_exactly_zero_even_when_they_hold_nan() -> None:
    logits, target, _ = problem(9, 301, torch.float32)
    logits[[0, 4]], target[[0, 4]] = float("nan"), -100
    logits.requires_grad_()
    out = label_logprob(logits, target)
    out.sum().backward()
    assert logits.grad is not None
    for x in (out, logits.grad):
        assert not x[[0, 4]].any() and x.isfinite().all()


def test_extreme_logits_and_ties_are_exact() -> None:
    z = torch.full((2, 40009), -1e4)
    z[0, -1] = 80.0
    out = label_logprob(z, torch.tensor([0, 7]))
    assert out[0].item() == -10080.0
    assert out[1].item() == pytest.approx(-math.log(40009), rel=1e-6)


def test_rows_of_a_wider_tensor_are_read_where_they_lie() -> None:
    logits, target, _ = problem(12, 64, torch.float32)
    view = logits.view(6, 128)[:, :64]
    assert torch.allclose(label_logprob(view, target[:6]), label_logprob_ref(view, target[:6]), atol=1e-6)


def test_no_rows_give_no_rows() -> None:
    logits = torch.ones(0, 5, requires_grad=True)
    label_logprob(logits, torch.ones(0, dtype=torch.int64)).sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_NV": torch.ones(3, 4, 5)}, r"logits_NV: wanted shape \(N, V\), got \(3, 4, 5\)"),
        ({"logits_NV": torch.ones(3, 4, dtype=torch.int64)}, "logits_NV: wanted a floating dtype"),
        ({"logits_NV": torch.ones(4, 3).t()}, "logits_NV: wanted columns next to each other"),
        ({"target_N": torch.tensor([0, 1])}, r"target_N: wanted shape \(3,\), got \(2,\)"),
        ({"target_N": torch.tensor([0, 1, 4])}, r"target_N: wanted ids in \[0, 4\) or -100, got 4"),
        ({"target_N": torch.ones(3, dtype=torch.int32)}, "target_N: wanted torch.int64"),
        ({"inplace": True, "logits_NV": torch.ones(3, 4, requires_grad=True)}, "inplace: wanted False"),
        ({"inplace": True, "logits_NV": torch.ones(1, 3, 4, requires_grad=True)[0]}, "inplace: wanted False"),
        (
            {"inplace": True, "logits_NV": torch.ones(2, 6, requires_grad=True).view(3, 4)},
            "inplace: wanted False",
        ),
        (
            {"inplace": True, "logits_NV": torch.ones(1, 4).expand(3, 4)},
            r"logits_NV: wanted rows apart from each other for inplace, got strides \(0, 1\)",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_wanted_and_what_came(change: dict, message: str) -> None:
    right = {"logits_NV": torch.ones(3, 4), "target_N": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match=message):
        label_logprob(**{**right, **change})
