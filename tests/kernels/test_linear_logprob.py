"""`linear_logprob` (torch backend) against whole logits in fp64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fasttrain_kernels import (
    cpu_workers,
    linear_logprob,
    linear_logprob_and_unit,
    linear_logprob_ref,
    with_unit_gradient,
)

OPTIONS = [
    {},
    {"temperature": 0.7, "logit_scale": 1.3},
    {"softcap": 5.0, "temperature": 0.7, "logit_scale": 2.0},
]
BAR = {torch.float32: (1e-5, 5e-4), torch.bfloat16: (1e-2, 1e-2), torch.float64: (1e-12, 1e-12)}


def problem(
    n: int, d: int, v: int, dtype: torch.dtype = torch.float32, spread: float = 0.3
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n * 7919 + d * 31 + v)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn(v, d, generator=g, dtype=torch.float64) * spread).to(dtype)
    target = torch.randint(0, v, (n,), generator=g)
    bias = torch.randn(v, generator=g, dtype=torch.float64).to(dtype)
    return hidden, weight, target, bias


def worst(ours: Tensor, truth: Tensor) -> float:
    """Largest error, relative to the largest true value or 1."""
    return float(
        (ours.detach().double() - truth.detach()).abs().max() / truth.detach().abs().max().clamp(min=1)
    )


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", list(BAR))
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("n", "d", "v"), [(252, 123, 507), (61, 57, 32064), (1, 64, 20011)])
def test_values_and_gradients_equal_dense_fp64(
    n: int, d: int, v: int, trained: bool, dtype: torch.dtype, options: dict[str, float]
) -> None:
    hidden, weight, target, bias = problem(n, d, v, dtype)
    target[0], target[-1] = 0, v - 1
    ours = [hidden.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained)]
    true = [x.detach().double().requires_grad_(x.requires_grad) for x in ours]
    out = linear_logprob(
        ours[0], ours[1], target, ours[2], entropy=True, log_p2=True, top1=True, mean_logit=True, **options
    )
    ref = linear_logprob_ref(true[0], true[1], target, true[2], **options)
    grad = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.logprob * grad.to(out.logprob.dtype)).sum().backward()
    (ref.logprob * grad).sum().backward()
    value_bar, grad_bar = BAR[dtype]
    assert out.logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for mine, theirs in zip(out, ref):
        assert worst(mine, theirs.double()) < value_bar
    for mine, theirs in zip(ours, true):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            assert mine.grad.dtype == dtype
            assert worst(mine.grad, theirs.grad) < grad_bar


def test_a_trained_head_passes_gradcheck() -> None:
    hidden, weight, target, bias = problem(7, 5, 11, torch.float64)
    target[2] = -100
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def f(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_logprob(h, w, target, b, softcap=3.0, temperature=0.8, logit_scale=1.2).logprob

    assert torch.autograd.gradcheck(f, leaves)


def test_ignored_rows_are_exactly_zero_even_when_they_hold_nan() -> None:
    hidden, weight, target, _ = problem(9, 16, 301)
    hidden[[0, 4]], target[[0, 4]] = float("nan"), -100
    hidden.requires_grad_()
    out = linear_logprob(hidden, weight, target, entropy=True, log_p2=True)
    out.logprob.sum().backward()
    assert hidden.grad is not None
    for x in (out.logprob, out.entropy, out.log_p2, hidden.grad):
        assert torch.equal(x[[0, 4]], torch.zeros_like(x[[0, 4]]))
        assert x.isfinite().all()


@pytest.mark.parametrize("trained", [False, True])
def test_no_rows_give_no_rows(trained: bool) -> None:
    hidden, weight, target, _ = problem(0, 16, 301)
    out = linear_logprob(hidden.requires_grad_(), weight.requires_grad_(trained), target)
    out.logprob.sum().backward()
    assert out.logprob.shape == (0,)
    assert hidden.grad is not None and hidden.grad.shape == (0, 16)
    if trained:
        assert weight.grad is not None and not weight.grad.any()


def test_a_maximum_that_only_falls_or_only_rises_along_the_vocabulary_is_kept() -> None:
    # Hidden states are 1, so the logits are the weight column itself: several tiles, each far from the last.
    v = 30011
    for order in (1, -1):
        slope = torch.linspace(-80, 80, v, dtype=torch.float32)
        weight = (slope.flip(0) if order < 0 else slope)[:, None].contiguous()
        hidden = torch.ones(290, 1, requires_grad=True)
        target = torch.full((290,), v // 3)
        out = linear_logprob(hidden, weight, target)
        out.logprob.sum().backward()
        true = hidden.detach().double().requires_grad_()
        ref = linear_logprob_ref(true, weight.double(), target)
        ref.logprob.sum().backward()
        assert worst(out.logprob, ref.logprob) < 1e-5
        assert worst(hidden.grad, true.grad) < 1e-5


def test_extreme_logits_stay_finite_and_exact() -> None:
    v = 40009
    weight = torch.full((v, 1), -1e4)
    weight[v - 1] = 80.0
    target = torch.tensor([v - 1, 0])
    out = linear_logprob(torch.ones(2, 1), weight, target)
    assert out.logprob.tolist() == [0.0, -10080.0]
    ties = linear_logprob(torch.ones(1, 1), torch.full((v, 1), -1e4), torch.tensor([7]), entropy=True)
    assert ties.logprob.item() == pytest.approx(-math.log(v), rel=1e-6)
    assert ties.entropy is not None and ties.entropy.item() == pytest.approx(math.log(v), rel=1e-6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_threads_share_the_work_and_leave_torchs_number_of_threads_alone(
    threads: Callable[[int], None], count: int, trained: bool
) -> None:
    hidden, weight, target, bias = problem(140, 57, 20011)
    weight[:, 0] += torch.linspace(-15, 15, 20011)  # slices whose maxima lie far apart
    threads(count)
    ours = [hidden.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained)]
    true = [x.detach().double().requires_grad_(x.requires_grad) for x in ours]
    flags = {"entropy_grad": True, "log_p2": True, "top1": True, "mean_logit": True}
    results = []
    for _ in range(2):
        out = linear_logprob(ours[0], ours[1], target, ours[2], **flags)
        for leaf in ours:
            leaf.grad = None
        (out.logprob.sum() + out.entropy.sum()).backward()
        results.append([*out, *(leaf.grad for leaf in ours if leaf.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    ref = linear_logprob_ref(true[0], true[1], target, true[2])
    (ref.logprob.sum() + ref.entropy.sum()).backward()
    for mine, theirs in zip(results[0], [*ref, *(leaf.grad for leaf in true if leaf.grad is not None)]):
        assert worst(mine, theirs.double()) < 1e-5
    assert torch.get_num_threads() == count


def test_threads_of_our_own_stay_on_one_core(threads: Callable[[int], None]) -> None:
    """A worker that brought a team along would be one thread more than there are cores, and slow every barrier."""
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("no /proc to count threads in")
    threads(3)
    large = torch.ones(1 << 20)
    large.exp()
    cpu_workers.run_on_workers([lambda: None] * 3)
    before = len(list(tasks.iterdir()))
    numbers = cpu_workers.run_on_workers([lambda: (large.exp(), torch.get_num_threads())[1]] * 6)
    assert numbers == [1] * 6
    assert torch.get_num_threads() == 3
    assert len(list(tasks.iterdir())) == before


def test_a_forked_child_gets_threads_of_its_own(threads: Callable[[int], None]) -> None:
    hidden, weight, target, _ = problem(140, 57, 20011)
    threads(2)
    expected = linear_logprob(hidden, weight, target).logprob
    pid = os.fork()
    if pid == 0:
        # OpenMP itself does not survive a fork: only our own threads run in the child.
        same = False
        try:
            same = cpu_workers.run_on_workers([lambda: 1, lambda: 2]) == [1, 2]
        finally:
            os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert torch.equal(linear_logprob(hidden, weight, target).logprob, expected)


def test_no_backward_of_a_frozen_head_reads_its_weight() -> None:
    hidden, weight, target, _ = problem(33, 16, 501)
    true = hidden.clone().double().requires_grad_()
    linear_logprob_ref(true, weight.double(), target).logprob.sum().backward()
    out = linear_logprob(hidden.requires_grad_(), weight, target)
    weight.fill_(float("nan"))
    out.logprob.sum().backward()
    assert worst(hidden.grad, true.grad) < 1e-5


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", list(BAR))
def test_unit_gradients_made_apart_give_the_same_gradient(dtype: torch.dtype, options: dict) -> None:
    hidden, weight, target, bias = problem(61, 57, 507, dtype)
    scale = torch.linspace(-1, 2, 61)
    true = hidden.double().requires_grad_()
    truth = linear_logprob_ref(true, weight.double(), target, bias.double(), **options)
    (truth.logprob * scale).sum().backward()
    hidden.requires_grad_()
    out, unit = linear_logprob_and_unit(hidden, weight, target, bias, log_p2=True, **options)
    assert not out.logprob.requires_grad and not unit.requires_grad and unit.dtype == dtype
    weight.fill_(float("nan"))
    joined = with_unit_gradient(hidden, out.logprob, unit)
    (joined * scale).sum().backward()
    forward, backward = BAR[dtype]
    assert worst(joined, truth.logprob) < forward and worst(hidden.grad, true.grad) < backward
    assert worst(out.log_p2, truth.log_p2) < forward
    target[3] = -100
    with pytest.raises(ValueError, match=r"target_N: wanted ids in \[0, 507\), got -100"):
        linear_logprob_and_unit(hidden, torch.ones_like(weight), target)


def test_unit_gradients_of_other_rows_are_refused() -> None:
    hidden, weight, target, _ = problem(5, 16, 301)
    out, unit = linear_logprob_and_unit(hidden, weight, target)
    for logprob, other, message in (
        (out.logprob[:1], unit, r"logprob_N: wanted shape \(5,\), got \(1,\)"),
        (out.logprob, unit[:1], r"unit_ND: wanted shape \(5, 16\), got \(1, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            with_unit_gradient(hidden, logprob, other)


@pytest.mark.parametrize("trained", [False, True])
def test_the_entropy_has_a_gradient_when_it_is_asked_for(trained: bool) -> None:
    hidden, weight, target, bias = problem(23, 40, 20011)
    for options in OPTIONS:
        ours = [x.clone().requires_grad_(x is hidden or trained) for x in (hidden, weight, bias)]
        true = [x.detach().double().requires_grad_(x.requires_grad) for x in ours]
        out = linear_logprob(ours[0], ours[1], target, ours[2], entropy_grad=True, **options)
        ref = linear_logprob_ref(true[0], true[1], target, true[2], **options)
        assert out.entropy is not None and ref.entropy is not None
        (out.logprob.sum() + 3 * out.entropy.sum()).backward()
        (ref.logprob.sum() + 3 * ref.entropy.sum()).backward()
        for mine, theirs in zip(ours, true):
            assert mine.grad is None or worst(mine.grad, theirs.grad) < 1e-5
    assert not linear_logprob(ours[0], ours[1], target, entropy=True).entropy.requires_grad


def test_top1_is_the_first_of_equal_logits() -> None:
    weight = torch.zeros(20011, 1)
    weight[[5, 9000, 20010]] = 2.0
    out = linear_logprob(torch.ones(4, 1), weight, torch.tensor([5, 9000, 20010, 0]), top1=True)
    assert out.top1 is not None and out.top1.tolist() == [True, False, False, False]


def test_two_runs_agree_to_the_last_bit() -> None:
    hidden, weight, target, _ = problem(123, 64, 20011)
    results = []
    for _ in range(2):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprob(h, w, target)
        out.logprob.sum().backward()
        results.append((out.logprob, h.grad, w.grad))
    for first, second in zip(*results):
        assert torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    hidden, weight, target, _ = problem(20, 16, 301)
    plain, checked = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    linear_logprob(plain, weight, target).logprob.sum().backward()
    f = lambda h: linear_logprob(h * 1.0, weight, target).logprob  # noqa: E731
    checkpoint(f, checked, use_reentrant=reentrant).sum().backward()
    assert torch.equal(plain.grad, checked.grad)


def test_autocast_means_operands_of_its_dtype_and_fp32_log_probs() -> None:
    hidden, weight, target, _ = problem(20, 16, 301)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(hidden, weight, target)
    rounded = linear_logprob(hidden.detach().bfloat16(), weight.bfloat16(), target)
    assert torch.equal(out.logprob, rounded.logprob)
    out.logprob.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.ones(3, 4, 5)}, r"hidden_ND: wanted shape \(N, D\), got \(3, 4, 5\)"),
        (
            {"hidden_ND": torch.ones(3, 4, dtype=torch.int64)},
            "hidden_ND: wanted a floating dtype, got torch.int64",
        ),
        ({"weight_VD": torch.ones(7, 5)}, r"weight_VD: wanted shape \(V, 4\), got \(7, 5\)"),
        ({"weight_VD": torch.ones(7, 4, dtype=torch.bfloat16)}, "weight_VD: wanted dtype torch.float32"),
        ({"target_N": torch.tensor([0, 1])}, r"target_N: wanted shape \(3,\), got \(2,\)"),
        ({"target_N": torch.tensor([0, 1, 7])}, r"target_N: wanted ids in \[0, 7\) or -100, got 7"),
        ({"target_N": torch.tensor([0, 1, -1])}, r"target_N: wanted ids in \[0, 7\) or -100, got -1"),
        ({"target_N": torch.ones(3, dtype=torch.int32)}, "target_N: wanted torch.int64, got torch.int32"),
        ({"bias": torch.ones(6)}, r"bias: wanted shape \(7,\), got \(6,\)"),
        ({"weight_VD": torch.ones(7, 4, device="meta")}, "weight_VD: wanted device cpu, got meta"),
        (
            {"weight_VD": torch.ones(7, 4, dtype=torch.int8)},
            "weight_VD: wanted a floating dtype, got torch.int8",
        ),
        (
            {"bias": torch.ones(7, dtype=torch.complex64)},
            "bias: wanted a floating dtype, got torch.complex64",
        ),
        ({"temperature": 0.0}, "temperature: wanted a positive finite number, got 0.0"),
        ({"temperature": None}, "temperature: wanted a positive finite number, got None"),
        ({"softcap": torch.tensor(2.0)}, r"softcap: wanted a positive finite number, got tensor\(2.\)"),
        ({"logit_scale": torch.tensor(2.0)}, r"logit_scale: wanted a finite number, got tensor\(2.\)"),
        ({"softcap": -1.0}, "softcap: wanted a positive finite number, got -1.0"),
        ({"backend": "cuda"}, "backend: wanted 'triton', 'torch' or None, got 'cuda'"),
        ({"backend": "triton"}, "backend: 'triton' wants CUDA tensors"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_wanted_and_what_came(change: dict, message: str) -> None:
    right = {
        "hidden_ND": torch.ones(3, 4),
        "weight_VD": torch.ones(7, 4),
        "target_N": torch.tensor([0, 6, 2]),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**right, **change})


def test_autocast_makes_no_logits_of_a_quantised_weights_integers() -> None:
    hidden, _, target, _ = problem(5, 16, 301)
    quantised = torch.randint(-127, 128, (301, 16), dtype=torch.int8)
    with torch.autocast("cpu", torch.bfloat16):
        for operation in (linear_logprob, linear_logprob_and_unit):
            with pytest.raises(ValueError, match=r"weight_VD: wanted a floating dtype, got torch\.int8"):
                operation(hidden, quantised, target)


def test_a_sharded_weight_is_refused_with_where_it_is_whole() -> None:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        hidden, weight, target, _ = problem(5, 16, 301)
        sharded = DTensor.from_local(weight, init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(
            ValueError, match=r"weight_VD: wanted a whole tensor, .* its FSDP module, got a DTensor"
        ):
            linear_logprob(hidden, sharded, target)
    finally:
        torch.distributed.destroy_process_group()
