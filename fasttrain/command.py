"""The `fasttrain` command as a process of its own: what must stand before anything large is imported."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fasttrain.signals import end_with_parent
from fasttrain_data.standard_files import open_standard_files

if TYPE_CHECKING:
    from fasttrain.config import DPOConfig

# For a training process: glibc keeps slivers between aligned blocks in caches of small ones, where they do not grow together,
# a tenth of a run's memory
TUNABLES = "glibc.malloc.mxfast=0:glibc.malloc.tcache_count=0"
_TRAINING = ("dpo", "sft", "reference")

_alone = False


def main() -> None:
    """Entry point of `fasttrain` and `python -m fasttrain`."""
    global _alone
    open_standard_files()
    # from launchers that set LOCAL_RANK as well
    if re.fullmatch(r"--local[_-]rank=\d+", "".join(sys.argv[1:2])):
        del sys.argv[1]
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # a torchrun that is killed outright leaves its ranks waiting for each other
    if sys.argv[1:2] and sys.argv[1] in _TRAINING:
        _start_with_tunables()
    _alone = True
    try:
        from fasttrain.cli import main as run

        run()
    except KeyboardInterrupt:  # while that is imported, or while it was telling of another end
        sys.stderr.write("fasttrain: interrupted\n")
        sys.exit(130)


def _start_with_tunables() -> None:
    """Put this process's program in its place once more: the C library reads its settings before the program runs."""
    if "GLIBC_TUNABLES" in os.environ or not sys.executable or not _glibc():
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # another system's C library
        return False


@contextlib.contextmanager
def quick_imports(config: DPOConfig) -> Iterator[None]:
    """For the block that imports what trains `config`: what makes that shorter.

    In a program that calls the trainer nothing is done: its modules and forks are its own.
    """
    if not _alone:
        yield
        return
    from fasttrain.hash_ahead import hash_ahead

    hash_ahead(config)
    if config.model.quantize is None and config.train.optimizer != "adamw_8bit" and _plain_weights(config):
        # peft imports it wherever it is installed, with torch's compiler: a second and 45 MB
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    gc.disable()  # a tenth of the time goes to looking for garbage among what is being imported
    try:
        if not config.train.compile and not config.model.trust_remote_code:
            leave_triton_out()
        yield
    finally:
        gc.enable()


def leave_triton_out() -> None:
    """Make Triton impossible to import where nothing can run it: transformers imports it with torch's compiler, 74 MB."""
    import torch

    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0") and not torch.accelerator.is_available():
        sys.modules.setdefault("triton", None)  # type: ignore[arg-type]


def _plain_weights(config: DPOConfig) -> bool:
    """Whether the model is known to come with weights that are not quantised."""
    from fasttrain.files import user_path

    path = user_path(config.model.name) / "config.json"
    try:
        if not path.is_file():
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(config.model.name, "config.json", revision=config.model.revision)
            if not isinstance(found, str):
                return False
            path = Path(found)
        return "quantization_config" not in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):  # told when the model is looked for
        return False
