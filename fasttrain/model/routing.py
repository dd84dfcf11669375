"""How evenly a mixture of experts spreads its tokens: transformers' load-balancing loss, over a step however it is packed.

The loss (Switch Transformers, arXiv 2101.03961, equations 4 to 6, as transformers computes it) is E sum_e f_e P_e over all tokens
and layers: f_e is the share of tokens that go to expert e, P_e the mean probability of e. Both are means, so a pack adds sums,
and every sum over a step's packs and ranks is the same however its tokens are packed. A token counts as often as it stands in
the step's sequences, two a pair: that is the batch an ordinary trainer pads and runs, whose loss TRL reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.model.head import trunk


def router_sums(logits: Sequence[Tensor], uses_T: Tensor, top_k: int) -> Tensor:
    """(2 E + 1,) fp32: tokens that each expert got, sums of its probabilities (differentiable), tokens; over all layers.

    logits: per layer, (T, E) or (1, T, E). uses_T: how often each token counts.
    """
    total: Tensor | float = 0.0
    uses_T = uses_T.float()
    for layer in logits:
        prob_TE = layer.reshape(-1, layer.shape[-1]).float().softmax(-1)
        chosen_TE = torch.zeros_like(prob_TE).scatter_(-1, prob_TE.topk(top_k, -1).indices, 1.0)
        total = total + torch.cat([uses_T @ chosen_TE, uses_T @ prob_TE, uses_T.sum()[None]])
    assert isinstance(total, Tensor)
    return total


def _parts(sums_V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    experts = (len(sums_V) - 1) // 2
    return sums_V[:experts], sums_V[experts : 2 * experts], sums_V[-1]


def balance_loss(sums_V: Tensor) -> Tensor:
    """The loss of all tokens whose sums these are; 1 x top_k when they are spread evenly."""
    count_E, prob_E, rows = _parts(sums_V)
    return len(count_E) * (count_E / rows * (prob_E / rows)).sum()


def balance_share(sums_V: Tensor, total_V: Tensor) -> Tensor:
    """A scalar whose gradient is this pack's part of the gradient of `balance_loss(total_V)`; counts have none."""
    count_E, _, rows = _parts(total_V)
    return (len(count_E) * count_E / rows**2 * _parts(sums_V)[1]).sum()


def declares_routing(config: Any) -> bool:
    """Whether a configuration is that of a mixture whose class returns its router's logits."""
    return hasattr(config.get_text_config(), "output_router_logits")


@torch.no_grad()
def find_top_k(model: Any, device: torch.device) -> int | None:
    """How many experts a token goes to, where the model's class has a load-balancing loss and ours agrees with it."""
    text = model.config.get_text_config()
    top_k = getattr(model, "num_experts_per_tok", None) or getattr(text, "num_experts_per_tok", None)
    if not declares_routing(model.config) or not isinstance(top_k, int):
        return None
    ids = torch.arange(1, 9, device=device)[None] % text.vocab_size
    options = {"input_ids": ids, "use_cache": False, "output_router_logits": True, "return_dict": True}
    try:
        logits = getattr(trunk(model)(**options), "router_logits", None)
    except TypeError:  # LLaVA and InternVL around a mixture: their outputs have no place for them
        return None
    theirs = (
        getattr(model(**options), "aux_loss", None) if logits else None
    )  # some classes fail where no layer routes
    if not isinstance(theirs, Tensor) or not logits:
        return None
    ours = balance_loss(router_sums(logits, torch.ones(ids.shape[1], device=device), top_k))
    tolerance = 1e-4 if logits[0].dtype == torch.float32 else 5e-2
    return top_k if torch.allclose(ours, theirs.float(), rtol=tolerance, atol=tolerance) else None
