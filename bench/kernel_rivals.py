"""The ways kernels.py times from hidden states to a DPO loss: ours, plain torch, torch.compile, TRL, Liger, CCE.

Each is a function (hidden (2P, T, D), weight (V, D), target (2P, T)) -> loss (), chosen answers in the first half. The
reference log-probs are cached numbers, here 0 for everyone: Liger takes none, and computing a reference would be timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain_kernels import FusedLinearPreferenceLoss

BETA = 0.01

Rival = Callable[[Tensor, Tensor, Tensor], Tensor]


def _loss(logp: Tensor) -> Tensor:
    chosen, rejected = logp.sum(1).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What most trainers did: whole logits, fp32 log_softmax, gather."""
    logits = F.linear(hidden, weight).float()
    return _loss(logits.log_softmax(-1).gather(-1, target[..., None])[..., 0])


def _ours(backend: str | None) -> Rival:
    loss = FusedLinearPreferenceLoss(beta=BETA, backend=backend)

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        zero = hidden.new_zeros(hidden.shape[0] // 2, dtype=torch.float32)
        return loss(hidden, weight, target, zero, zero).loss

    return run


def _trl() -> Rival:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # As its DPOTrainer calls it, without the metrics that it asks for besides.
        rows = ChunkedLogProbFunction.apply(
            hidden.flatten(0, 1), weight, None, target.flatten(), 1.0, 32768, None, 1.0, ()
        )
        return _loss(rows[0].view(target.shape))

    return run


def _liger(compiled: bool) -> Rival:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=compiled)
    return lambda hidden, weight, target: loss(weight, hidden, target)[0]


def _cce() -> Rival:
    if not torch.cuda.is_available():
        raise RuntimeError("needs CUDA")
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return _loss(-linear_cross_entropy(hidden, weight, target, reduction="none"))

    return run


def rivals(with_compile: bool = True) -> tuple[dict[str, Rival], dict[str, str]]:
    """(name -> function of what runs here, name -> why not of what does not)."""
    makers: dict[str, Callable[[], Rival]] = {
        "fasttrain": lambda: _ours(None), "plain torch": lambda: plain,
        "TRL chunked": _trl, "Liger DPO": lambda: _liger(compiled=False), "cut-cross-entropy": _cce,
    }  # fmt: skip
    if torch.cuda.is_available():
        makers["fasttrain, torch passes"] = lambda: _ours("torch")
    if with_compile:
        makers["torch.compile"] = lambda: torch.compile(plain)
        makers["Liger DPO, compiled"] = lambda: _liger(compiled=True)
    found, missing = {}, {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except (ImportError, RuntimeError) as error:
            missing[name] = str(error).splitlines()[0]
    return found, missing
