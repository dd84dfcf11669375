"""Signals that come where Python would lose them."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from fasttrain.signals import interrupt_at_end


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C as Python hears it from the start; a shell that runs the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_workers_are_forked_is_raised_afterwards(heard: None) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_at_end():
        signal.raise_signal(signal.SIGINT)
        done.append("the block")
    assert done == ["the block"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
