"""8-bit moments become the fp32 numbers that bitsandbytes reads in them, and 8 bits that say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fasttrain.train.eight_bit import MOMENTS, fresh_state, narrow, read_moment, widen

bitsandbytes = pytest.importorskip("bitsandbytes")


def stepped(size: int) -> tuple[Any, torch.nn.Parameter]:
    """An optimizer after three steps with gradients of many magnitudes, some blocks all zero."""
    torch.manual_seed(size)
    parameter = torch.nn.Parameter(torch.randn(size))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter])
    for _ in range(3):
        parameter.grad = torch.randn(size) * torch.logspace(-9, 2, size)
        parameter.grad[:700] = 0
        optimizer.step()
    return optimizer, parameter


@pytest.mark.parametrize("size", [5003, 4_194_304 + 777])  # more than is widened at a time
def test_moments_go_through_fp32_to_bytes_that_say_the_same(size: int) -> None:
    optimizer, parameter = stepped(size)
    state = optimizer.state[parameter]
    assert state["state1"].dtype == torch.uint8 and state["state1"].count_nonzero() > size / 2
    again = fresh_state(optimizer, parameter, 3)
    for moment, number in zip(MOMENTS, "12", strict=True):
        wide = widen(state, moment)
        theirs = bitsandbytes.functional.dequantize_blockwise(
            state[f"state{number}"], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        )  # fmt: skip
        assert torch.equal(wide, theirs.float())
        narrow(again, moment, wide, state[f"absmax{number}"])
        scale = state[f"absmax{number}"]
        counts = (scale != 0).repeat_interleave(256)[:size]  # where a block is all zero its codes say nothing
        assert torch.equal(again[f"state{number}"][counts], state[f"state{number}"][counts])
        assert torch.equal(again[f"absmax{number}"], scale) and torch.equal(widen(again, moment), wide)
    assert again["step"] == 3 and optimizer.state[parameter] is again


def test_without_their_scales_moments_are_off_by_less_than_the_maps_steps() -> None:
    optimizer, parameter = stepped(5003)
    wide = {moment: widen(optimizer.state[parameter], moment)[13:-300] for moment in MOMENTS}  # other blocks
    other = torch.nn.Parameter(torch.zeros(5003 - 313))
    state = fresh_state(bitsandbytes.optim.AdamW8bit([other]), other, 3)
    for moment, value in wide.items():
        narrow(state, moment, value)
        largest = torch.nn.functional.max_pool1d(value.abs()[None], 511, 1, 255)[0]
        assert ((widen(state, moment) - value).abs() <= 0.01 * largest).all()


def test_small_moments_stay_fp32() -> None:
    optimizer, parameter = stepped(900)
    state = optimizer.state[parameter]
    again = fresh_state(optimizer, parameter, 3)
    for moment in MOMENTS:
        narrow(again, moment, widen(state, moment))
        assert torch.equal(widen(again, moment), widen(state, moment))


def test_both_kinds_of_checkpoints_are_read() -> None:
    optimizer, parameter = stepped(5003)
    state = optimizer.state[parameter]
    raw = {f"x/{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    for moment in MOMENTS:
        wide = widen(state, moment)
        assert torch.equal(read_moment(raw, "x", moment), wide)
        assert torch.equal(read_moment({f"x/{moment}": wide}, "x", moment), wide)
