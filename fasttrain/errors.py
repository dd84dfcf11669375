"""The one exception that stands for a user's mistake."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate",
    "CUDA error: out of memory",
    "[CUDA]: out of memory",
    "_STATUS_ALLOC_FAILED",
)


class UserError(Exception):
    """A mistake in command, recipe, data or files: shown as one line, exit code 2."""


class SharedMistake(UserError):
    """A mistake that every rank of a run raises; the first one tells it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: of a device, or of the machine. Torch's allocator on the CPU, the driver, Triton where it loads a
    kernel, and cuBLAS and cuDNN where they begin tell that as a plain RuntimeError."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return told or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def did_you_mean(word: str, known: list[str]) -> str:
    """A `; did you mean 'x'?` for the closest known word, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextlib.contextmanager
def mistakes_of_data_tools() -> Iterator[None]:
    """Raises fasttrain_data's UserError, where the block calls its code, as the one of this package."""
    import fasttrain_data.errors

    try:
        yield
    except fasttrain_data.errors.UserError as error:
        raise UserError(str(error)) from None
