"""What every operation says where an argument is no tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fasttrain_kernels import (
    FusedLinearPreferenceLoss,
    SharedPrefixLayout,
    label_logprob,
    linear_logprob,
    pair_sums,
    preference_logps,
    preference_loss,
    rms_norm,
    rotary,
    sequence_sums,
    shared_prefix_attention,
    swiglu,
    wpo_weights,
)

LAYOUT = SharedPrefixLayout.from_groups([(2, [1, 1])])
X = torch.ones(4, 8)
IDS = torch.arange(4)
PAIRS = torch.tensor([[0, 1]])
HEADS = X.view(1, 2, 4, 4)

CALLS: dict[str, Callable[[Any], Any]] = {
    "linear_logprob: weight_VD": lambda x: linear_logprob(X, x, IDS),
    "linear_logprob: bias": lambda x: linear_logprob(X, X, IDS, x),
    "label_logprob: target_N": lambda x: label_logprob(X, x),
    "sequence_sums: lengths_S": lambda x: preference_logps(X, X, IDS, x),
    "sequence_sums: value_N": lambda x: sequence_sums(x, IDS),
    "pair_sums: pairs_P2": lambda x: pair_sums(X[0], IDS, x),
    "wpo_weights: log_p2_N": lambda x: wpo_weights(X[0], x, IDS, PAIRS),
    "preference_loss: ref_chosen_P": lambda x: preference_loss(X[0], X[0], x, X[0]),
    "FusedLinearPreferenceLoss: lengths_S": lambda x: FusedLinearPreferenceLoss()(
        X, X, IDS, X[0, :1], X[0, :1], lengths_S=x, pairs_P2=PAIRS
    ),
    "shared_prefix_attention: k": lambda x: shared_prefix_attention(HEADS, x, HEADS, LAYOUT),
    "shared_prefix_attention: sinks": lambda x: shared_prefix_attention(HEADS, HEADS, HEADS, LAYOUT, sinks=x),
    "rms_norm: weight_D": lambda x: rms_norm(X, x, 1e-6),
    "swiglu: gate": lambda x: swiglu(x, X),
    "rotary: cos": lambda x: rotary(X, x, X),
}


@pytest.mark.parametrize("argument", CALLS)
def test_an_argument_that_is_no_tensor_is_named(argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: wanted a tensor, got tuple"):
        CALLS[argument]((1, 3))
