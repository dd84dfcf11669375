"""What a step computes: the seam between the training loop and a loss, for pairs (DPO) and for answers to learn (SFT)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from fasttrain.data.pairs import Pair


@dataclass(frozen=True)
class PairResult:
    """Losses of P pairs and the sums that the metrics are made of."""

    loss_P: Tensor
    sums: Tensor  # (len(Objective.names),) fp32, detached

    @property
    def total(self) -> Tensor:
        """Sum of the losses; a step's loss is this, over all its packs, divided by its pairs."""
        return self.loss_P.sum()


class Objective(Protocol):
    """A loss on the log-probs of a step's completions.

    `command` is its name on the command line, `unit` what a step counts, `title` what a model card calls it. `read` makes a
    row of a file a pair; an answer to learn, by itself, is a pair of that answer with itself. `wants` are the head's optional
    outputs, `reports` those that only the metrics of a logged step need; `side` takes both from its result as one tensor whose first
    dimension is N. With `couples_pairs` the loss of a
    step is no sum over its pairs; with `single` each pair lies in one completion, so a split group's parts need no values of
    each other.
    """

    command: str
    unit: str
    title: str
    names: tuple[str, ...]
    needs_reference: bool
    couples_pairs: bool
    single: bool
    wants: dict[str, bool]
    reports: dict[str, bool]
    read: Callable[..., Pair]

    def side(self, out: Any) -> Tensor | None: ...

    def __call__(
        self, logp_N: Tensor, reference_N: Tensor | None, lengths_S: Tensor, pairs_P2: Tensor, side_N: Tensor | None,
        mean_chosen_length: float,
    ) -> PairResult:  # fmt: skip
        """Losses and sums of P pairs; `mean_chosen_length` is the whole step's, whatever part of it this is."""
        ...

    def metrics(self, sums: Sequence[float], pairs: int) -> dict[str, float]:
        """What is logged of a step, from the sums by `names`."""
        ...

    def note(self, line: dict[str, Any]) -> str:
        """A logged line in a few words, for the progress bar."""
        ...

    def summary(self, line: dict[str, Any]) -> str:
        """The last logged line in a few words, for the terminal."""
        ...

    def unshared_tokens(self, lengths: np.ndarray, pairs: np.ndarray) -> int:
        """Token passes that an ordinary trainer needs for a group: lengths are the prompt's, then the completions'."""
        ...
