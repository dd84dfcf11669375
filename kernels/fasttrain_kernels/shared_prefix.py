"""The layout of packed sequences whose completions share a prompt: [prompt | completion 1 | completion 2 | ...] ..."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class SharedPrefixLayout:
    """Where prompts and completions lie in one packed sequence of T tokens; built by `from_groups`.

    A group is a prompt followed by its completions; groups follow each other. Every completion continues the prompt: its
    positions start at the prompt's length, it sees the prompt and its own earlier tokens, nothing else.
    `bidirectional` holds, per group, the spans of its prompt whose tokens see each other both ways.
    Index tensors are made once per device and shared: do not write into them.

    It is no dataclass: FSDP and DDP in mixed precision make those anew, field by field, for every module they are passed to, and
    what was made for one layer would be lost to the next.
    """

    def __init__(
        self,
        groups: tuple[tuple[int, tuple[int, ...]], ...],
        bidirectional: tuple[tuple[tuple[int, int], ...], ...] = (),
    ) -> None:
        self._groups, self._bidirectional = groups, bidirectional
        self._made: dict[Any, Any] = {}

    @property
    def groups(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(prompt length, completion lengths) of every group."""
        return self._groups

    @property
    def bidirectional(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The spans of every group, or () where there are none."""
        return self._bidirectional

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SharedPrefixLayout):
            return NotImplemented
        return (self.groups, self.bidirectional) == (other.groups, other.bidirectional)

    def __hash__(self) -> int:
        return hash((self.groups, self.bidirectional))

    def __repr__(self) -> str:
        return f"SharedPrefixLayout(groups={self.groups}, bidirectional={self.bidirectional})"

    @classmethod
    def from_groups(
        cls,
        groups: Iterable[tuple[int, Sequence[int]]],
        bidirectional: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> SharedPrefixLayout:
        """Layout of [(prompt length, [completion lengths]), ...]; ValueError where a length is no whole positive number.

        bidirectional: for each group, spans (start, stop) of its prompt, in order and apart from each other, whose tokens
        also see the span's later tokens: an image's tokens in Gemma 3, the whole prompt in PaliGemma.
        """
        checked = []
        for i, (prompt, completions) in enumerate(groups):
            if int(prompt) < 1 or int(prompt) != prompt:
                raise ValueError(
                    f"SharedPrefixLayout: groups[{i}]: wanted a prompt of 1 token or more, got {prompt}"
                )
            if not len(completions):
                raise ValueError(f"SharedPrefixLayout: groups[{i}]: wanted a completion or more, got none")
            for j, length in enumerate(completions):
                if int(length) < 1 or int(length) != length:
                    raise ValueError(
                        f"SharedPrefixLayout: groups[{i}]: completion {j}: wanted 1 token or more, got {length}"
                    )
            checked.append((int(prompt), tuple(int(length) for length in completions)))
        if not checked:
            raise ValueError("SharedPrefixLayout: groups: wanted a group or more, got none")
        spans = _checked_spans(bidirectional, [prompt for prompt, _ in checked])
        return cls(tuple(checked), spans if any(spans) else ())

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedPrefixLayout, (self.groups, self.bidirectional)

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned the first time this layout was asked for `key`."""
        if key not in self._made:
            # Tensors made in inference mode could not be trained with later; one that names no device is meant for the CPU,
            # whatever torch.set_default_device says.
            with torch.inference_mode(False), torch.device("cpu"):
                self._made[key] = make()
        return self._made[key]

    @property
    def tokens(self) -> int:
        """T, prompts and completions together."""
        return self.cached("tokens", lambda: sum(p + sum(r) for p, r in self.groups))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every completion, in order; their sum is N."""
        return self.cached("lengths", lambda: tuple(r for _, completions in self.groups for r in completions))

    @property
    def sequences(self) -> int:
        """S, the number of completions."""
        return len(self.lengths)

    def completions(self) -> list[tuple[int, int, int, int]]:
        """Per completion: (row of its prompt's start, prompt length, row of its own start, its length)."""
        out, row = [], 0
        for prompt, lengths in self.groups:
            start, row = row, row + prompt
            for length in lengths:
                out.append((start, prompt, row, length))
                row += length
        return out

    def _index(
        self, name: str, device: torch.device | str | None, make: Callable[[], list[Tensor]]
    ) -> Tensor:
        device = torch.device(device or "cpu")
        on_cpu: Tensor = self.cached((name, "cpu"), lambda: torch.cat(make()))
        return self.cached((name, str(device)), lambda: on_cpu.to(device, non_blocking=True))

    def position_ids(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (T,): positions within [prompt, completion]; every completion restarts at its prompt's end."""

        def make() -> list[Tensor]:
            parts = []
            for prompt, lengths in self.groups:
                parts.append(torch.arange(prompt))
                parts += [torch.arange(prompt, prompt + length) for length in lengths]
            return parts

        return self._index("positions", device, make)

    def predictor_rows(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (N,): row that predicts each completion token: the prompt's last row, then the completion's own."""

        def make() -> list[Tensor]:
            parts = []
            for start, prompt, own, length in self.completions():
                rows = torch.arange(own - 1, own + length - 1)
                rows[0] = start + prompt - 1
                parts.append(rows)
            return parts

        return self._index("predictors", device, make)

    def completion_rows(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (N,): rows of the completion tokens themselves, where the target ids are read."""
        return self._index(
            "completions", device, lambda: [torch.arange(own, own + n) for _, _, own, n in self.completions()]
        )

    def sequence_index(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (N,): which completion, 0 to S-1, each completion token belongs to."""
        return self._index(
            "sequences", device, lambda: [torch.full((n,), i) for i, n in enumerate(self.lengths)]
        )

    def spans(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The bidirectional spans of every group's prompt, positions within the prompt."""
        return self.bidirectional or ((),) * len(self.groups)

    def longest(self) -> int:
        """Tokens of the longest prompt with one of its completions."""
        return self.cached("longest", lambda: max(p + max(r) for p, r in self.groups))

    def binding_window(self, window: int | None) -> int | None:
        """`window`, or None where it reaches over every sequence and so changes nothing."""
        return None if window is None or window >= self.longest() else window

    def dense_mask(self, device: torch.device | str | None = None, window: int | None = None) -> Tensor:
        """bool (T, T), True where the row may see the column: the definition, for references and dense attention.

        With a window a query at position p sees no key before position p - window + 1.
        """

        def make() -> list[Tensor]:
            mask = torch.zeros(self.tokens, self.tokens, dtype=torch.bool)
            for start, prompt, own, length in self.completions():
                mask[start : start + prompt, start : start + prompt] = True
                mask[own : own + length, start : start + prompt] = True
                mask[own : own + length, own : own + length] = True
            mask.tril_()
            for start, spans in zip(self._group_starts(), self.spans(), strict=True):
                for a, b in spans:
                    mask[start + a : start + b, start + a : start + b] = True
            if window is not None:
                position = self.position_ids()
                mask &= position[None, :] > position[:, None] - window
            return [mask]

        return self._index(f"mask {window}", device, make)

    def _group_starts(self) -> list[int]:
        starts, row = [], 0
        for prompt, lengths in self.groups:
            starts.append(row)
            row += prompt + sum(lengths)
        return starts


def _checked_spans(
    bidirectional: Sequence[Sequence[tuple[int, int]]] | None, prompts: list[int]
) -> tuple[tuple[tuple[int, int], ...], ...]:
    if bidirectional is None:
        return ()
    if len(bidirectional) != len(prompts):
        raise ValueError(
            f"SharedPrefixLayout: bidirectional: wanted the spans of {len(prompts)} groups, got {len(bidirectional)}"
        )
    checked = []
    for i, (spans, prompt) in enumerate(zip(bidirectional, prompts, strict=True)):
        edge = 0
        for start, stop in spans:
            if not edge <= int(start) < int(stop) <= prompt:
                raise ValueError(
                    f"SharedPrefixLayout: bidirectional[{i}]: wanted spans in order within a prompt of {prompt} tokens, "
                    f"got {start} to {stop}"
                )
            edge = int(stop)
        checked.append(tuple((int(start), int(stop)) for start, stop in spans))
    return tuple(checked)
