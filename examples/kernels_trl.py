"""TRL's DPOTrainer on our head: its losses and metrics, two matrix products instead of three.

    python examples/kernels_trl.py MODEL PAIRS.jsonl

TRL computes every DPO loss from per-token values that one autograd function returns; this puts `linear_logprob` there.
Its other trainers take theirs from the same function. Where the entropy is part of the loss, as in GRPO with an
`entropy_coef`, call `install(entropy_grad=True)`: its gradient costs a product that DPO does not need.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import trl.trainer.utils

from fasttrain_kernels import linear_logprob


class FasttrainHead:
    """Stands where TRL 1.16 has its chunked log-prob function."""

    entropy_grad = False

    @staticmethod
    def apply(hidden: Any, weight: Any, bias: Any, target: Any, temperature: float, chunk: int,
              softcap: float | None = None, logit_scale: float = 1.0, outputs: tuple[str, ...] = ()) -> tuple[Any, ...]:  # fmt: skip
        out = linear_logprob(
            hidden, weight, target, bias, temperature, logit_scale, softcap, entropy="entropy" in outputs,
            entropy_grad="entropy" in outputs and FasttrainHead.entropy_grad,
            log_p2="log_sum_sq_probs" in outputs, mean_logit="mean_logits" in outputs, top1="is_top1" in outputs,
        )  # fmt: skip
        entropy = without_gradient(out.entropy, out.logprob)
        return out.logprob, entropy, out.log_p2, out.mean_logit, out.top1


def without_gradient(entropy: torch.Tensor | None, logprob: torch.Tensor) -> torch.Tensor | None:
    """The entropy; if its gradient was not made, a backward that reaches it raises instead of leaving it out."""
    return entropy if entropy is None or entropy.requires_grad else _NoGradient.apply(entropy, logprob)


class _NoGradient(torch.autograd.Function):
    """The entropy as if its gradient had been made; whether one is wanted at all, the log-probs beside it say."""

    @staticmethod
    def forward(ctx: Any, entropy: torch.Tensor, logprob: torch.Tensor) -> torch.Tensor:
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        raise RuntimeError("the loss contains the entropy: pass kernels_trl.install(entropy_grad=True)")


def install(entropy_grad: bool = False) -> None:
    """Make every TRL trainer created from now on use our head.

    entropy_grad: make the entropy's gradient too, for losses that contain it; without it such a loss raises in its backward.
    """
    FasttrainHead.entropy_grad = entropy_grad
    trl.trainer.utils._ChunkedLogProbFunction = FasttrainHead


def main() -> None:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a causal model's folder or hub id")
    parser.add_argument("pairs", help="JSON lines in TRL's preference format")
    given = parser.parse_args()
    install()
    # TRL trains in bf16 unless told otherwise, which transformers refuses without a GPU
    config = DPOConfig(output_dir="trl-dpo", report_to=[], bf16=torch.cuda.is_available())
    pairs = load_dataset("json", data_files=given.pairs, split="train")
    DPOTrainer(given.model, args=config, train_dataset=pairs).train()


if __name__ == "__main__":
    main()
