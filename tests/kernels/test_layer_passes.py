"""RMS norm, gated activations and rotary positions against their definitions in fp64. In Triton: triton_interpreted.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttrain_kernels import geglu, geglu_ref, rms_norm, rms_norm_ref, rotary, rotary_ref, swiglu, swiglu_ref

# of the largest value; a 16-bit result is rounded twice
BAR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def check(ours: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: list[Tensor], frozen: list[Any],
          dtype: torch.dtype, **options: Any) -> None:  # fmt: skip
    """Values and gradients of a function of some inputs and some frozen ones, where the gradient that comes in is not even."""
    rounded = [x.to(dtype) for x in inputs]
    held = [x.to(dtype) if isinstance(x, Tensor) else x for x in frozen]
    leaves = [x.clone().requires_grad_() for x in rounded]
    true = [x.double().requires_grad_() for x in rounded]
    out = ours(*leaves, *held, **options)
    expected = formula(*true, *(x.double() if isinstance(x, Tensor) else x for x in held))
    assert out.dtype == dtype and out.shape == expected.shape
    grad = draw(*out.shape[::-1]).permute(*reversed(range(out.dim()))).to(dtype)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    wanted = [expected, *torch.autograd.grad(expected, true, grad.double())]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).abs().max() <= BAR[dtype] * theirs.abs().max()


@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("dtype", list(BAR))
@pytest.mark.parametrize("shape", [(1, 11, 22), (3, 576), (2, 3, 5, 64), (0, 8)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, one_plus: bool) -> None:
    x = draw(*shape) * 3
    if x.numel():
        x[0, 0] = 0  # only eps stands between such a row and infinity
        x[-1, -1] *= 100
        frozen = [draw(shape[-1]), 1e-2]
        check(
            functools.partial(rms_norm, one_plus=one_plus),
            functools.partial(rms_norm_ref, one_plus=one_plus),
            [x],
            frozen,
            dtype,
        )
    else:
        assert rms_norm(x.to(dtype), draw(8).to(dtype), 1e-6).shape == shape


@pytest.mark.parametrize(("product", "definition"), [(swiglu, swiglu_ref), (geglu, geglu_ref)])
@pytest.mark.parametrize("dtype", list(BAR))
def test_gated_activation(
    dtype: torch.dtype, product: Callable[..., Tensor], definition: Callable[..., Tensor]
) -> None:
    gate, up = draw(7, 37) * 5, draw(7, 1, 37)[:, 0]
    gate[0, :2] = torch.tensor([60.0, -60.0])  # where a sigmoid is 1 and 0
    check(product, definition, [gate, up], [], dtype)


@pytest.mark.parametrize("dtype", list(BAR))
@pytest.mark.parametrize("heads", [1, 2])
def test_rotary_in_either_layout(heads: int, dtype: torch.dtype) -> None:
    x = draw(2, 5, 3, 8)
    cos, sin = draw(2, 5, 1, 8), draw(2, 5, 1, 8).flip(-1)  # halves that differ, as some families' do
    if heads == 1:
        x, cos, sin = (one.transpose(1, 2) for one in (x, cos, sin))
    check(rotary, rotary_ref, [x], [cos, sin], dtype)


def test_rotary_turns_any_shape_that_cos_and_sin_broadcast_to() -> None:
    check(rotary, rotary_ref, [draw(7, 6)], [draw(6), draw(7, 1)[:1] + draw(6)], torch.float32)


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: rms_norm(x, x[0, :5], 1e-6), r"rms_norm: weight_D: wanted shape \(6,\), got \(5,\)"),
    (lambda x: rms_norm(x.long(), x[0], 1e-6), "rms_norm: x: wanted a floating dtype, got torch.int64"),
    (lambda x: rms_norm(x, x[0].bfloat16(), 1e-6), "weight_D: wanted torch.float32, got torch.bfloat16"),
    (lambda x: rms_norm(x, x[0].clone().requires_grad_(), 1e-6), "weight_D: wanted a tensor that wants no gradient"),
    (lambda x: rms_norm(x, x[0], 1e-6, backend="triton"), "'triton' wants CUDA tensors"),
    (lambda x: rms_norm(x, x[0], 1e-6, backend="cuda"), "backend: wanted 'triton', 'torch' or None, got 'cuda'"),
    (lambda x: rms_norm(x, x[0].to("meta"), 1e-6), "weight_D: wanted device cpu, got meta"),
    (lambda x: swiglu(x, x[:2]), r"swiglu: up: wanted shape \(4, 6\), got \(2, 6\)"),
    (lambda x: swiglu(x, x.double()), "swiglu: up: wanted torch.float32, got torch.float64"),
    (lambda x: geglu(x, x.to("meta")), "geglu: up: wanted device cpu, got meta"),
    (lambda x: rotary(x[:, :5], x[0, :5], x[0, :5]), r"rotary: x: wanted an even last axis, got \(4, 5\)"),
    (lambda x: rotary(x, x[:2], x[:2]), r"rotary: cos: wanted a shape that broadcasts to \(4, 6\), got \(2, 6\)"),
    (lambda x: rotary(x, x[0], x[0, :1]), r"rotary: sin: wanted a shape that broadcasts to \(4, 6\), got \(1,\)"),
    (lambda x: rotary(x, x, x.clone().requires_grad_()), "rotary: sin: wanted a tensor that wants no gradient"),
])  # fmt: skip
def test_wrong_arguments_are_named(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 6))


def test_without_gradients_a_weight_may_want_one() -> None:
    x, weight = draw(3, 6), draw(6)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, torch.nn.Parameter(weight), 1e-6), rms_norm(x, weight, 1e-6))
