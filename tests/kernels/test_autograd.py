"""What autograd may do with every operation: differentiate twice, go back under autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fasttrain_kernels import (
    SharedPrefixLayout,
    geglu,
    label_logprob,
    linear_logprob,
    linear_logprob_and_unit,
    rms_norm,
    rotary,
    shared_prefix_attention,
    swiglu,
    with_unit_gradient,
)

ROWS, COLUMNS = 12, 32
LAYOUT = SharedPrefixLayout.from_groups([(3, [4, 2]), (1, [2])])
TARGET = torch.arange(ROWS) % 7
SQUARE = torch.linspace(-1, 1, ROWS * COLUMNS).view(ROWS, COLUMNS).sin()
WEIGHT = SQUARE[:7].cos()


def _attention(x: Tensor, softcap: float | None = None) -> Tensor:
    q, k, v = x.view(1, 3, 1, LAYOUT.tokens, -1).unbind(1)
    return shared_prefix_attention(q, k, v, LAYOUT, softcap=softcap)


def _apart(x: Tensor) -> Tensor:
    out, unit = linear_logprob_and_unit(x, WEIGHT, TARGET)
    return with_unit_gradient(x, out.logprob, unit)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "frozen head": lambda x: linear_logprob(x, WEIGHT, TARGET).logprob,
    "trained head": lambda x: linear_logprob(SQUARE, x[:7], TARGET).logprob,
    "unit gradient": _apart,
    "label_logprob": lambda x: label_logprob(x, TARGET),
    "attention": lambda x: _attention(x.flatten()[:360]),
    "softcap": lambda x: _attention(x.flatten()[:360], softcap=2.0),
    "rms_norm": lambda x: rms_norm(x, WEIGHT[0], 1e-6),
    "rms_norm, 1 + weight": lambda x: rms_norm(x, WEIGHT[0], 1e-6, one_plus=True),
    "swiglu": lambda x: swiglu(x, SQUARE),
    "geglu": lambda x: geglu(SQUARE, x),
    "rotary": lambda x: rotary(x, SQUARE, SQUARE),
}


@pytest.fixture(params=OPERATIONS)
def operation(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return OPERATIONS[request.param]


def test_a_gradient_penalty_raises_instead_of_leaving_its_part_out(
    operation: Callable[[Tensor], Tensor],
) -> None:
    x = (3 * SQUARE).requires_grad_()
    # a sum's own gradient has no history, by which torch tells that a second backward may come
    total = operation(x).sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (total + gradient.square().sum()).backward()


def test_a_backward_under_autocast_has_the_gradient_of_one_outside(
    operation: Callable[[Tensor], Tensor],
) -> None:
    gradients = []
    for inside in (False, True):
        x = (3 * SQUARE).requires_grad_()
        out = operation(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
