"""What `linear_logprob` promises beyond its values: memory, precision against plain torch, compile, poisoned buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fasttrain_kernels import (
    SharedPrefixLayout,
    label_logprob,
    linear_logprob,
    linear_logprob_and_unit,
    linear_logprob_ref,
    shared_prefix_attention,
    shared_prefix_attention_ref,
    with_unit_gradient,
)

MB = 1 << 20


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """(peak bytes above the start, largest single allocation) of CPU tensors while `run` runs."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    deltas = [e.nbytes() for e in profile.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for delta in deltas:
        level += delta
        peak = max(peak, level)
    return peak, max(deltas)


def problem(n: int, d: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + v)
    hidden, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) * d**-0.5 * 3
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, v, (n,), generator=g)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_takes_under_16_mb_and_never_a_tensor_of_n_by_v_or_v_by_d(
    dtype: torch.dtype, threads: int, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    n, d, v = 290, 576, 49153
    hidden, weight, target = problem(n, d, v, dtype)
    hidden.requires_grad_()

    def step() -> None:
        linear_logprob(hidden, weight, target).logprob.sum().backward()

    step()
    hidden.grad = None
    peak, largest = allocations(step)
    unit_gradient = n * d * dtype.itemsize
    assert largest < n * v * dtype.itemsize / 3
    assert largest < v * d * dtype.itemsize / 3
    # The unit gradient is saved; the gradient itself is the caller's.
    assert peak < 16 * MB + 2 * unit_gradient
    assert weight.grad is None


def test_a_trained_head_makes_its_gradient_and_no_logits() -> None:
    n, d, v = 290, 64, 49153
    hidden, weight, target = problem(n, d, v)
    weight.requires_grad_()
    linear_logprob(hidden, weight, target).logprob.sum().backward()
    weight.grad = None
    peak, largest = allocations(lambda: linear_logprob(hidden, weight, target).logprob.sum().backward())
    assert largest == v * d * 4
    assert peak < v * d * 4 + 16 * MB


def test_without_gradients_one_product_is_made() -> None:
    hidden, weight, target = problem(50, 32, 9001)
    with torch.autograd.profiler.profile() as with_grad:
        linear_logprob(hidden.requires_grad_(), weight, target)
    with torch.no_grad(), torch.autograd.profiler.profile() as without:
        linear_logprob(hidden, weight, target)
    products = [sum(e.count for e in p.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_"))
                for p in (with_grad, without)]  # fmt: skip
    assert products[0] == 2 * products[1]


def test_threads_work_in_inference_mode(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    hidden, weight, target = problem(70, 64, 5001)
    with torch.inference_mode():
        out = linear_logprob(hidden, weight, target)
    assert out.logprob.is_inference()
    assert torch.allclose(out.logprob, linear_logprob_ref(hidden, weight, target).logprob, atol=1e-5)
    # the threads themselves are left as they were
    hidden.requires_grad_()
    linear_logprob(hidden, weight, target).logprob.sum().backward()
    assert hidden.grad is not None and not hidden.grad.is_inference()


@pytest.mark.parametrize("apart", [False, True])
def test_an_fp16_gradient_that_the_loss_scale_lifts_out_of_underflow_is_exact(apart: bool) -> None:
    # d logprob / d hidden is about 5e-7 here: fp16 below 6e-5 has steps of 6e-8.
    hidden, weight, target = problem(23, 64, 1001, torch.float16)
    options = {"logit_scale": 1e-6}
    true = hidden.double().requires_grad_()
    (linear_logprob_ref(true, weight.double(), target, **options).logprob.sum() * 65536).backward()
    hidden.requires_grad_()
    if apart:
        made, unit = linear_logprob_and_unit(hidden, weight, target, **options)
        logprob = with_unit_gradient(hidden, made.logprob, unit)
    else:
        logprob = linear_logprob(hidden, weight, target, **options).logprob
    (logprob.sum() * 65536).backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float16 and true.grad is not None
    assert (hidden.grad.double() - true.grad).norm() < 1e-3 * true.grad.norm()


def test_label_logprob_in_place_needs_no_second_matrix_of_logits() -> None:
    n, v = 200, 49153
    leaf, target = torch.randn(n, v, requires_grad=True), torch.zeros(n, dtype=torch.int64)

    def peak(inplace: bool) -> int:
        logits = leaf * 1
        return allocations(
            lambda: torch.autograd.grad(label_logprob(logits, target, inplace=inplace).sum(), logits)
        )[0]

    assert peak(True) < 0.3 * n * v * 4 < n * v * 4 < peak(False)


@pytest.mark.parametrize("v", [32000, 32064, 49153, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_no_larger_than_plain_torchs_in_the_same_dtype(dtype: torch.dtype, v: int) -> None:
    hidden, weight, target = problem(23, 128, v, dtype)
    target[0], target[1] = 0, v - 1
    grad = torch.randn(23, generator=torch.Generator().manual_seed(0))
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    true = hidden.double().requires_grad_()
    ours = linear_logprob(leaves[0], weight, target).logprob
    plain = linear_logprob_ref(leaves[1], weight, target).logprob
    truth = linear_logprob_ref(true, weight.double(), target).logprob
    for out in (ours, plain, truth):
        out.backward(grad.to(out.dtype))
    ulp = torch.finfo(torch.float32).eps * truth.detach().abs().max()
    assert (ours - truth).abs().max() <= (plain - truth).abs().max() + 4 * ulp
    ulp = torch.finfo(dtype).eps * true.grad.abs().max()
    assert (leaves[0].grad - true.grad).abs().max() <= (leaves[1].grad - true.grad).abs().max() + ulp


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every fresh buffer is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def test_nothing_reads_memory_it_did_not_write(poisoned: None) -> None:
    hidden, weight, target = problem(37, 24, 9001)
    assert torch.empty(3).isnan().all()
    for trained in (False, True):
        for options in ({}, {"softcap": 4.0, "temperature": 0.5}):
            ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
            true = [x.detach().double().requires_grad_() for x in ours]
            out = linear_logprob(*ours, target, entropy_grad=True, log_p2=True, top1=True, **options)
            ref = linear_logprob_ref(*true, target, **options)
            (out.logprob.sum() + out.entropy.sum()).backward()
            (ref.logprob.sum() + ref.entropy.sum()).backward()
            for mine, theirs in zip(ours, true):
                assert mine.grad is None or torch.allclose(mine.grad.double(), theirs.grad, atol=1e-4)
    layout = SharedPrefixLayout.from_groups([(150, [20, 20, 9]), (3, [1])])
    q, k, v = (torch.randn(1, 2, layout.tokens, 8).requires_grad_() for _ in range(3))
    attended = shared_prefix_attention(q, k, v, layout)
    truth = shared_prefix_attention_ref(q, k, v, layout)
    for mine, theirs in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (attended, truth))):
        assert torch.allclose(mine, theirs, atol=1e-4)


# Dynamo itself reads .grad of the non-leaf hidden states where its graph ends.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_around_it_gives_the_same_gradients() -> None:
    body, weight = nn.Linear(32, 32), torch.randn(9001, 32)

    def step(hidden: Tensor, target: Tensor) -> Tensor:
        return linear_logprob(torch.tanh(body(hidden)), weight, target).logprob.sum()

    compiled = torch.compile(step, backend="aot_eager")
    for n in (50, 61, 7):
        hidden, target = torch.randn(n, 32), torch.randint(0, 9001, (n,))
        grads = []
        for run in (compiled, step):
            body.zero_grad()
            run(hidden, target).backward()
            grads.append(body.weight.grad.clone())
        assert torch.equal(*grads)


def test_a_bf16_models_sequence_of_1000_tokens_is_within_005_of_fp64() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         vocab_size=4999, max_position_embeddings=1024, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.lm_head.weight.data.mul_(20)
    ids = torch.randint(0, 4999, (1, 1001))
    with torch.no_grad():
        hidden = model.model(ids[:, :-1]).last_hidden_state[0]
        target = ids[0, 1:]
        ours = linear_logprob(hidden, model.lm_head.weight, target).logprob.sum()
        truth = linear_logprob_ref(hidden.double(), model.lm_head.weight.double(), target).logprob.sum()
        plain = linear_logprob_ref(hidden, model.lm_head.weight, target).logprob.sum()
    assert abs(ours.item() - truth.item()) < 0.05
    assert abs(plain.item() - truth.item()) > 0.05
