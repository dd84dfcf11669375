"""The processes of one run: who this one is, and the few things that all of them decide together.

Started by `torchrun` (or `deepspeed`), each process is a rank with a device of its own. What is said here travels over gloo between
CPUs, so that asking never waits for a device.
"""

from __future__ import annotations

import datetime
import os
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import SharedMistake, UserError
from fasttrain.progress import be_quiet, say
from fasttrain.rank_watch import leave_watch, start_watch

_PATIENCE = datetime.timedelta(hours=2)  # a rank may tokenize, or write a large model, while the others wait
_SPEAK_S = 20.0  # before it is said that ranks are missing


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; `control` is the gloo group, None for a single process."""

    rank: int = 0
    size: int = 1
    control: Any = None

    @property
    def main(self) -> bool:
        """Whether this rank writes the run folder and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.control is not None:
            torch.distributed.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank."""
        return bool(self.sum([float(flag)])[0])

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the ranks, in fp64, the same on all of them."""
        if self.control is None:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on all of them; tensors on the CPU, or what JSON could hold."""
        if self.control is None:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value, group=self.control)
        return found

    def share_mistake(self, mistake: UserError | None) -> None:
        """Raise on all ranks the first mistake that any of them found."""
        if self.control is None:
            if mistake is not None:
                raise mistake
            return
        found = [text for text in self.gather(str(mistake) if mistake else None) if text is not None]
        if found:
            raise SharedMistake(found[0])


_here = Ranks()


def ranks() -> Ranks:
    """The ranks of this process: itself alone until `start_ranks`."""
    return _here


def launched() -> int:
    """How many processes the environment says there are; UserError where it does not say all that they need to meet."""
    size = _from_environment("WORLD_SIZE", 1)
    if size <= 1:
        return 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {size} but {missing[0]} is not set: start with torchrun --nproc_per_node={size}"
        )
    rank = _from_environment("RANK", 0)
    if rank >= size:
        raise UserError(f"RANK: wanted below WORLD_SIZE, which is {size}, got {rank}")
    if (port := _from_environment("MASTER_PORT", 0)) > 65535:
        raise UserError(f"MASTER_PORT: wanted a port, at most 65535, got {port}")
    return size


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}: wanted a number in the environment, got {text!r}")
    return int(text)


def start_ranks() -> Ranks:
    """Join the other processes if a launcher started several; the same answer when called again."""
    global _here
    size = launched()
    if size == 1 or _here.size > 1:
        return _here
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(_own_gpu(torch.cuda.device_count()))
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not torch.distributed.is_initialized():
        _meet("nccl" if cuda else "gloo", size)
    control = (
        torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        if cuda
        else torch.distributed.group.WORLD
    )
    _here = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), control)
    start_watch(_here.rank, _here.size, _here.gather)
    if not _here.main:
        be_quiet()
    return _here


def _own_gpu(devices: int) -> int:
    """Which of the GPUs that are here is this process's; UserError where it is not said, or has none."""
    local = _from_environment("LOCAL_RANK", 0)
    if local >= devices:
        raise UserError(
            f"LOCAL_RANK: wanted below {devices}, as each process has a GPU of its own and {devices} are here, got {local}; let every "
            "process see all GPUs of its machine (CUDA_VISIBLE_DEVICES), and start no more of them than it has"
        )
    if devices > 1 and not os.environ.get("LOCAL_RANK"):
        raise UserError(
            f"LOCAL_RANK: wanted a number in the environment that says which of the {devices} GPUs here is this process's, got none: "
            "start with torchrun, or set it (under srun to SLURM_LOCALID)"
        )
    return local


def _meet(backend: str, size: int) -> None:
    """Wait for the other ranks: in a thread, as torch hears no Ctrl-C and no SIGTERM meanwhile."""
    failed: list[Exception] = []

    def wait() -> None:
        try:
            torch.distributed.init_process_group(backend, timeout=_PATIENCE)
        except Exception as error:  # noqa: BLE001 (raised by who waits)
            failed.append(error)

    thread = threading.Thread(target=wait, name="fasttrain-meet", daemon=True)
    thread.start()
    thread.join(_SPEAK_S)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if thread.is_alive():
        say(f"rank {os.environ['RANK']} waits at {where} until all {size} ranks (WORLD_SIZE) are there")
        thread.join()
    if failed and isinstance(failed[0], torch.distributed.DistNetworkError):
        raise OSError(f"the ranks cannot meet at {where} (MASTER_ADDR, MASTER_PORT): {failed[0]}")
    if failed:
        raise failed[0]


def leave_ranks() -> None:
    """Take down the connections at the end of a command."""
    global _here
    leave_watch()
    if _here.control is not None:
        torch.distributed.destroy_process_group()
    _here = Ranks()


def is_node_writer() -> bool:
    """Whether this rank writes what every machine keeps for itself, such as caches."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or ranks().size == 1


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, also where ZeRO-3 has left only this rank's part of it."""
    return getattr(parameter, "ds_shape", parameter.shape)
