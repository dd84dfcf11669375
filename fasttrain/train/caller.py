"""What a run and the program that called it keep from each other: torch's modes and random state, memory, a second run."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Iterator

import torch

from fasttrain.devices import pick_device
from fasttrain.errors import UserError, is_out_of_memory

_going_on: dict[int, object] = {}  # by process: a forked one has no run of its parent's


@contextlib.contextmanager
def memory_let_go() -> Iterator[None]:
    """The caller's next run finds this one's memory free, also after an end that he may answer with one: a notebook keeps the
    last traceback, and with it all that its frames hold."""
    handled = sys.exception()  # the caller's own, in which the run began
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt | UserError) or is_out_of_memory(error):
            kept: BaseException | None = error
            while kept is not None and kept is not handled:
                traceback.clear_frames(kept.__traceback__)
                kept = kept.__context__
            gc.collect()
        raise
    gc.collect()  # layers that run functions of ours hold themselves, and the model's memory, until Python looks for such rings


@contextlib.contextmanager
def only_run_here() -> Iterator[None]:
    """UserError while another thread's run goes on: torch has one random state, and one default dtype, for all of them."""
    process, this = os.getpid(), object()
    try:
        if _going_on.setdefault(process, this) is not this:
            raise UserError(
                "wanted one run at a time in a process, as torch draws for all of its threads from one random state, got a second; "
                "start it after the one that is going on, or in a process of its own"
            )
        yield
    finally:
        if _going_on.get(process) is this:
            del _going_on[process]


@contextlib.contextmanager
def modes_of_a_run() -> Iterator[None]:
    """What torch is told in every run: reference log-probs computed in a caller's autocast would be cached for all runs."""
    dtype, elsewhere = torch.get_default_dtype(), torch.get_default_device().type != "cpu"
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []),
            torch.device("cpu") if elsewhere else contextlib.nullcontext(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(pick_device().type, enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
