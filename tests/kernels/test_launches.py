"""What the kernels are launched with on a GPU, seen without one: see tests/launches.py."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from fasttrain_kernels import (
    KINDS,
    FusedLinearPreferenceLoss,
    SharedPrefixLayout,
    label_logprob,
    linear_logprob,
    preference_loss,
    rms_norm,
    rotary,
    shared_prefix_attention,
    swiglu,
)
from fasttrain_kernels.preference_kinds import COUPLE_PAIRS, REFERENCE_FREE

pytest.importorskip("triton")
META = torch.device("meta")


@pytest.fixture
def launched(launches: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every launch of the test."""
    found: list[Any] = launches.note_launches(monkeypatch)
    return found


def there(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META, requires_grad=grad)


def check(launched: list[Any], *kernels: str, backward: tuple[str, ...] = ()) -> None:
    """These kernels ran, on tensors of one device; it was made the current one but in the backward, where autograd does that."""
    assert {launch.kernel for launch in launched} == {*kernels, *backward}
    for launch in launched:
        assert launch.devices == {"meta"}, launch
        assert launch.current == META or launch.kernel in backward, launch


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in COUPLE_PAIRS])
@pytest.mark.parametrize("mean", [130.0, torch.tensor(130.0)], ids=["number", "tensor on the CPU"])
def test_the_loss_of_a_step_is_launched_with_tensors_of_one_device(
    kind: str, mean: Any, launched: list[Any]
) -> None:
    policy = [there(5, dtype=torch.float64, grad=True) for _ in range(2)]
    reference = [None if kind in REFERENCE_FREE else there(5, dtype=torch.float64) for _ in range(2)]
    lengths = {name: there(5, dtype=torch.int64) for name in ("chosen_length", "rejected_length")}
    out = preference_loss(
        *policy,
        *reference,
        kind=kind,
        label_smoothing=0.1,
        mean_chosen_length=mean,
        sft_logprob=policy[0],
        **lengths,
    )
    out.loss.backward()
    assert policy[0].grad is not None
    check(launched, "preference_kernel")


@pytest.mark.parametrize("trained", [None, "hidden", "weight"])
def test_the_head_is_launched_with_tensors_of_one_device(trained: str | None, launched: list[Any]) -> None:
    half = {"dtype": torch.bfloat16}
    hidden, weight = (
        there(70, 64, grad=bool(trained), **half),
        there(9000, 64, grad=trained == "weight", **half),
    )  # type: ignore[arg-type]
    out = linear_logprob(hidden, weight, there(70, dtype=torch.int64), there(9000, **half), validate=False,  # type: ignore[arg-type]
                         entropy=True, log_p2=True, top1=True, mean_logit=True)  # fmt: skip
    if trained:
        out.logprob.sum().backward()
    moved = ["shrink_kernel"] if trained == "hidden" else []
    check(
        launched,
        "fold_kernel",
        "finish_kernel",
        *moved,
        backward=("gradient_kernel",) if trained == "weight" else (),
    )


def test_log_probs_of_logits_are_launched_with_tensors_of_one_device(launched: list[Any]) -> None:
    logits = there(7, 300, grad=True)
    label_logprob(logits, there(7, dtype=torch.int64), validate=False).sum().backward()
    check(launched, "label_forward_kernel", backward=("label_backward_kernel",))


def test_parts_of_attention_are_merged_on_their_device(launched: list[Any]) -> None:
    layout = SharedPrefixLayout.from_groups([(33, [5, 7]), (17, [9, 2])])
    q, k, v = (there(1, heads, layout.tokens, 64, dtype=torch.bfloat16, grad=True) for heads in (4, 2, 2))
    shared_prefix_attention(q, k, v, layout).sum().backward()
    assert q.grad is not None
    check(launched, "merge_kernel")


def test_packs_of_all_sizes_run_what_was_compiled_for_one(launched: list[Any]) -> None:
    for prompt, answers, pairs in ((1, [1, 1], 2), (16, [16, 32], 16), (33, [5, 7], 3), (17, [15, 6, 9], 5)):
        layout = SharedPrefixLayout.from_groups([(prompt, answers)])
        q, k, v = (there(1, heads, layout.tokens, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
        x, sizes = there(1, layout.tokens, 64), there(1, layout.tokens, 16)
        shared_prefix_attention(q, k, v, layout)
        swiglu(rms_norm(x, there(64), 1e-6), x)
        rotary(x.view(1, -1, 4, 16).transpose(1, 2), sizes[:, None], sizes[:, None])
        linear_logprob(
            there(sum(answers), 64), there(9000, 64), there(sum(answers), dtype=torch.int64), validate=False
        )
        preference_loss(*(there(pairs) for _ in range(4)))
    columns = {"fold_kernel": 2}  # a tile's, and those of the last
    for kernel in {launch.kernel for launch in launched}:
        variants = {launch.variant for launch in launched if launch.kernel == kernel}
        assert len(variants) == columns.get(kernel, 1), (kernel, variants)


def test_passes_of_a_layer_are_launched_with_tensors_of_one_device(launched: list[Any]) -> None:
    half = torch.bfloat16
    x, up = (there(1, 9, 64, dtype=half, grad=True) for _ in range(2))
    turned = x.view(1, 9, 4, 16).transpose(1, 2)
    sizes = there(1, 9, 16, dtype=half)
    for out in (
        rms_norm(x, there(64, dtype=half), 1e-6),
        swiglu(x, up),
        rotary(turned, sizes[:, None], sizes[:, None]),
    ):
        assert out.dtype == half and out.device == META
        out.sum().backward()
    # queries go on as they lie in memory, (B, T, H, K)
    assert rotary(turned, sizes[:, None], sizes[:, None]).stride() == turned.stride()
    check(
        launched,
        "norm_kernel",
        "gated_kernel",
        "rotary_kernel",
        backward=("norm_backward_kernel", "gated_backward_kernel"),
    )


def test_an_activation_of_one_long_row_is_launched_with_a_grid_that_cuda_takes(launched: list[Any]) -> None:
    gate, up = (there(1 << 27, dtype=torch.bfloat16, grad=True) for _ in range(2))
    swiglu(gate, up).sum().backward()
    check(launched, "gated_kernel", backward=("gated_backward_kernel",))


def test_lengths_may_be_on_the_host(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.import_module("fasttrain_kernels.linear_logprob"),
        "_has_ignored",
        lambda target, vocabulary: False,
    )
    loss = FusedLinearPreferenceLoss(kind="ipo", use_weighting=True)
    hidden, target = there(12, 16, grad=True), there(12, dtype=torch.int64)
    monkeypatch.setattr("fasttrain_kernels.fused_linear_preference.sequence_sums", lambda x, n: there(len(n)))
    out = loss(
        hidden,
        there(50, 16),
        target,
        there(1),
        there(1),
        lengths_S=torch.tensor([7, 5]),
        pairs_P2=torch.tensor([[0, 1]]),
    )
    out.loss.backward()
    check(launched, "fold_kernel", "finish_kernel", "preference_kernel")


def test_options_may_be_numpys_numbers(launched: list[Any]) -> None:
    number, rows = numpy.float32(0.25), there(3, grad=True)
    options = {
        "beta": number,
        "label_smoothing": number,
        "f_alpha": number,
        "simpo_gamma": number,
        "discopop_tau": number,
    }
    preference_loss(rows, rows, rows.detach(), rows.detach(), **options)
    scales = {"temperature": number, "logit_scale": number, "softcap": number}
    linear_logprob(there(3, 16), there(50, 16), there(3, dtype=torch.int64), validate=False, **scales)
    rms_norm(there(3, 16), there(16), number)
    check(launched, "preference_kernel", "fold_kernel", "finish_kernel", "norm_kernel")
