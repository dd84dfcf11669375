"""Signals that come where Python would lose them."""

from __future__ import annotations

import signal

import pytest

from fasttrain.signals import interrupt_at_end


def test_an_interrupt_while_workers_are_forked_is_raised_afterwards() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_at_end():
        signal.raise_signal(signal.SIGINT)
        done.append("the block")
    assert done == ["the block"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
