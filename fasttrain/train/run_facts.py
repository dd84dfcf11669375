"""What environment.json says of a run besides versions and devices."""

from __future__ import annotations

from typing import Any

from fasttrain.model.attention import attention_facts
from fasttrain.train.job import Job


def run_facts(job: Job, total_steps: int, peak_flops: float, peak_source: str) -> dict[str, Any]:
    """Counts of the data, settings that `auto` stood for, backends, the reference model's identity, and what mfu is against."""
    unit = job.loss.unit
    facts: dict[str, Any] = {"reference_cache": str(job.cache.path)} if job.loss.needs_reference else {}
    return facts | {
        "method": job.loss.command,
        "began": job.chat.today.isoformat(),
        unit: job.train.account.pairs,
        "groups": job.train.account.groups,
        "tokens_per_pack": job.tokens_per_pack,
        "packs_filled_to": job.packs_filled_to,
        "gradient_checkpointing": job.checkpointing,
        "share_prefix": job.policy.shared,
        **attention_facts(job.policy),
        "workers": job.workers,
        "steps": total_steps,
        "data": {
            name: {
                "rows": data.account.rows,
                "pairs": data.account.pairs,
                "groups": data.account.groups,
                "images": data.account.images,
                "truncated": data.account.truncated,
            }
            for name, data in (("train", job.train), ("eval", job.eval))
            if data is not None
        },
        "reference_model": job.identity,
        "mfu_is_against_flops": peak_flops,
        "mfu_peak_source": peak_source,
    }
