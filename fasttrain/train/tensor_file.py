"""safetensors files written and read one tensor at a time: what is saved need not fit in the memory of the rank that writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from hashlib import file_digest, sha256
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import safe_open
from torch import Tensor

_KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor that is to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorStream(NamedTuple):
    """Tensors by name: `entries` known ahead, `values` made one at a time in the same order.

    Making a value may take all ranks; it is None on those that do not keep it.
    """

    entries: list[Entry]
    values: Iterator[Tensor | None]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> TensorStream:
        entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        return cls(entries, iter(tensors.values()))

    def collect(self) -> dict[str, Tensor]:
        """All of them at once, where they are kept."""
        pairs = zip(self.entries, self.values, strict=True)
        return {entry.name: value for entry, value in pairs if value is not None}


def write_tensors(stream: TensorStream, path: Path | None) -> str | None:
    """Write a stream to a safetensors file and return its content's hash; with None only take part in making its values."""
    if path is None:
        for _ in stream.values:
            pass
        return None
    digest = sha256()
    with path.open("wb") as file:
        header = _header(stream.entries)
        digest.update(header)
        file.write(header)
        for entry, value in zip(stream.entries, stream.values, strict=True):
            if value is None or value.dtype != entry.dtype or tuple(value.shape) != entry.shape:
                raise ValueError(f"{entry.name}: wanted {entry.dtype} {entry.shape}, got {value}")
            whole = value.detach().to("cpu").contiguous().reshape(-1)
            content = whole.view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


def content_hash(path: Path) -> str:
    """What `write_tensors` returned if the file is as it was written."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _header(entries: list[Entry]) -> bytes:
    """The format's first bytes: their number, then name, type, shape and place of every tensor, padded to 8."""
    table: dict[str, Any] = {}
    end = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": _KINDS[entry.dtype], "shape": list(entry.shape), "data_offsets": [end, end + entry.bytes],
        }  # fmt: skip
        end += entry.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping; each tensor is read when it is asked for. Use as a context."""

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        self._file: Any = self._stack.enter_context(safe_open(path, framework="pt"))
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
