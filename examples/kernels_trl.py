"""TRL's DPOTrainer on our head: its losses and metrics, two matrix products instead of three.

    python examples/kernels_trl.py MODEL PAIRS.jsonl

TRL computes every DPO loss from per-token values that one autograd function returns; this puts `linear_logprob` there.
"""

from __future__ import annotations

import sys
from typing import Any

import trl.trainer.utils

from fasttrain_kernels import linear_logprob


class FasttrainHead:
    """Stands where TRL 1.16 has its chunked log-prob function."""

    @staticmethod
    def apply(hidden: Any, weight: Any, bias: Any, target: Any, temperature: float, chunk: int,
              softcap: float | None = None, logit_scale: float = 1.0, outputs: tuple[str, ...] = ()) -> tuple[Any, ...]:  # fmt: skip
        out = linear_logprob(
            hidden, weight, target, bias, temperature, logit_scale, softcap, entropy="entropy" in outputs,
            log_p2="log_sum_sq_probs" in outputs, mean_logit="mean_logits" in outputs, top1="is_top1" in outputs,
        )  # fmt: skip
        return out.logprob, out.entropy, out.log_p2, out.mean_logit, out.top1


def install() -> None:
    """Make every TRL trainer created from now on use our head."""
    trl.trainer.utils._ChunkedLogProbFunction = FasttrainHead


def main() -> None:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    model, pairs = sys.argv[1:3]
    install()
    trainer = DPOTrainer(model, args=DPOConfig(output_dir="trl-dpo", report_to=[]),
                         train_dataset=load_dataset("json", data_files=pairs, split="train"))  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main()
