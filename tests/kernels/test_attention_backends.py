"""Which backend of attention runs: the first that can, and why the others cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttrain_kernels import (
    AttentionCase,
    SharedPrefixLayout,
    attention_backend_for,
    choose_attention,
    shared_prefix_attention,
)
from fasttrain_kernels import shared_prefix_flash as flash_module
from fasttrain_kernels.shared_prefix_flash import Flash2, Flash4, flash_versions, load_flash

CUDA = torch.device("cuda", 0)
FLASH2, FLASH4 = (kind(lambda: None, lambda: None) for kind in (Flash2, Flash4))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has an H100 and flash-attn 2."""
    load_flash.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(flash_module, "load_flash", lambda version: FLASH2 if version == 2 else "not there")
    monkeypatch.setattr("fasttrain_kernels.shared_prefix_backends.load_flash", flash_module.load_flash)


@pytest.mark.parametrize(
    ("case", "picked", "reason"),
    [
        (AttentionCase(CUDA, torch.bfloat16, 128), "flash", "flash-attn 2 can be imported"),
        (AttentionCase(CUDA, torch.float16, 80), "flash", "flash-attn 2"),
        (AttentionCase(CUDA, torch.float32, 128), "flex", "wants bfloat16 or float16, got float32"),
        (AttentionCase(CUDA, torch.bfloat16, 36), "flex", "a head size that 8 divides, at most 256, got 36"),
        (AttentionCase(CUDA, torch.bfloat16, 512), "flex", "at most 256, got 512"),
        (
            AttentionCase(CUDA, torch.bfloat16, 64, bidirectional=True),
            "flex",
            "spans of a prompt bidirectional",
        ),
        (
            AttentionCase(CUDA, torch.float64, 64),
            "sdpa",
            "FlexAttention wants float16, bfloat16 or float32, got float64",
        ),
        (
            AttentionCase(CUDA, torch.bfloat16, 8, bidirectional=True),
            "sdpa",
            "a head size of 16 or more, got 8",
        ),
        (AttentionCase(torch.device("cpu"), torch.float32, 64), "sdpa", "CPU flash kernels"),
    ],
)
def test_auto_picks_the_first_backend_that_can_run_and_says_why(
    case: AttentionCase, picked: str, reason: str, hopper: None
) -> None:
    pytest.importorskip("triton")
    backend, why = choose_attention(case)
    assert backend == picked and reason in why


def test_a_kernel_without_a_backward_for_softcaps_runs_them_without_gradients_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    monkeypatch.setattr(
        "fasttrain_kernels.shared_prefix_backends.load_flash",
        lambda version: FLASH4 if version == 4 else "not there",
    )
    bent = AttentionCase(CUDA, torch.bfloat16, 128, softcap=True)
    backend, why = choose_attention(bent)
    assert backend == "flex" and "flash-attn 4 has no backward with a softcap" in why
    assert choose_attention(bent._replace(gradients=False))[0] == "flash"
    assert choose_attention(bent._replace(softcap=False))[0] == "flash"


def test_a_gpu_without_bfloat16_is_not_given_to_a_compiler_that_passes_it_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    backend, why = choose_attention(AttentionCase(CUDA, torch.bfloat16, 128))
    assert (
        backend == "sdpa"
        and "FlexAttention wants compute capability 8.0 or more for bfloat16, got 7.5" in why
    )
    assert [
        choose_attention(AttentionCase(CUDA, dtype, 128))[0] for dtype in (torch.float32, torch.float16)
    ] == ["flex"] * 2


def test_the_backend_named_for_a_tensor_is_that_of_the_dtype_autocast_rounds_it_to(hopper: None) -> None:
    pytest.importorskip("triton")
    with FakeTensorMode():
        q = torch.empty(1, 2, 8, 64, device="cuda")
    assert attention_backend_for(q) == "flex"
    torch.set_autocast_enabled("cuda", True)
    try:
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        assert attention_backend_for(q) == "flash"
        assert attention_backend_for(q.double()) == "sdpa"
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)


def test_a_forced_backend_that_cannot_run_is_an_error_that_says_why() -> None:
    layout = SharedPrefixLayout.from_groups([(3, [2, 2])])
    x = torch.ones(1, 2, 7, 8, requires_grad=True)
    for backend, reason in (("flash", "flash-attn wants a CUDA device, got cpu"),
                            ("flex", "FlexAttention wants a CUDA device, got cpu")):  # fmt: skip
        for queries in (x, x.detach()):
            with pytest.raises(
                ValueError, match=f"backend: wanted one that can run, got '{backend}': {reason}"
            ):
                shared_prefix_attention(queries, queries, queries, layout, backend=backend)


def test_an_installation_that_cannot_be_imported_is_a_reason_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    load_flash.cache_clear()
    assert load_flash(3) == "flash-attn 3 cannot be imported (undefined symbol: _ZN3c10)"
    load_flash.cache_clear()


def test_flash_attn_versions_are_tried_in_the_order_of_the_chip() -> None:
    assert flash_versions((8, 0)) == (2,) and flash_versions((9, 0))[0] == 3
    assert flash_versions((10, 0))[0] == 4 and flash_versions((7, 5)) == ()
