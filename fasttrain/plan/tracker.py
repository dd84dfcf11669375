"""How many bytes of tensors are alive, and were at most, while a block of code runs: counted storage by storage."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_GROUPED_MM = torch.ops.aten._grouped_mm.default


def _grouped_mm(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    """The product of groups; on the meta device, where the operator takes bf16 only, one of the size it has in any type."""
    if not a.is_meta:
        return _GROUPED_MM(a, b, *args)
    result: Tensor = _GROUPED_MM(a.to(torch.bfloat16), b.to(torch.bfloat16), *args)
    return result.to(a.dtype)


class LiveBytes(TorchDispatchMode):
    """Counts tensors on any device, the meta device included, where they have a size and no memory.

    A storage counts from the operation that first returns it until nothing refers to it any more. `now` and `peak` are bytes; what
    was alive before is added with `add`. Storage inside an operation (a library's workspace) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = _grouped_mm(*args) if func is _GROUPED_MM else func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._held[key]
            self.now -= size

        self._held[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def unique_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters, tied ones once."""
    return list(dict.fromkeys(module.parameters()))
