"""Token ids of groups on their way into a memory-mapped file."""

from __future__ import annotations

import contextlib
import tempfile
from array import array

import numpy as np

from fasttrain.data.group_tokens import GroupTokens
from fasttrain.files import cache_root, naming


class TokenSpool:
    """Token ids on their way into a temporary file; an entry, called a slot, for every group."""

    ARRAYS = ("tokens", "lengths", "pairs", "token_starts", "length_starts", "pair_starts")

    def __init__(self) -> None:
        self._folder = cache_root() / "spool"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed by seal or discard)
        self._lengths, self._pairs = array("i"), array("i")
        self._token_starts, self._length_starts, self._pair_starts = (array("q", [0]) for _ in range(3))

    def append(self, tokens: GroupTokens) -> int:
        """The slot of the group."""
        for ids in (tokens.prompt, *tokens.completions):
            with naming(self._folder):
                self._file.write(ids.astype(np.int32).tobytes())
            self._lengths.append(len(ids))
        self._token_starts.append(self._token_starts[-1] + tokens.tokens)
        self._length_starts.append(len(self._lengths))
        self._pairs.extend(tokens.pairs.ravel().tolist())
        self._pair_starts.append(len(self._pairs) // 2)
        return len(self._token_starts) - 2

    def seal(self) -> dict[str, np.ndarray]:
        """The arrays, tokens mapped from the file, which has no name any more."""
        with naming(self._folder):
            self._file.flush()
        tokens = np.memmap(self._file, np.int32, "r") if self._lengths else np.zeros(0, np.int32)
        self._file.close()  # the mapping keeps it
        rest = {name: np.asarray(getattr(self, f"_{name}")) for name in self.ARRAYS[1:]}
        return {"tokens": tokens, **rest}

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take is tried once more
            self._file.close()
