"""Numbers about a pair file: lengths of chosen and rejected, margins, prompts and images."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain_data.formats import read_pairs
from fasttrain_data.formats.messages import text_of
from fasttrain_data.ids import content_hash
from fasttrain_data.jsonl import finite_number
from fasttrain_data.spill import SeenKeys

Report = dict[str, Any]


def pair_report(path: Path) -> Report:
    """For any preference file that `read_pairs` reads."""
    chosen, rejected, margins = array("I"), array("I"), array("d")
    prompts, with_images, skipped = SeenKeys(), 0, 0

    def skip(where: str, reason: str) -> None:
        nonlocal skipped
        skipped += 1

    distinct = 0
    for row in read_pairs(path, skipped=skip):
        images = [
            image if isinstance(image, str) else content_hash(image["bytes"].hex()) for image in row["images"]
        ]
        distinct += prompts.add(content_hash(images, row["prompt"]))
        with_images += bool(images)
        chosen.append(len(text_of(row["chosen"][0])))
        rejected.append(len(text_of(row["rejected"][0])))
        if (margin := finite_number(row.get("margin"))) is not None:
            margins.append(margin)
    prompts.close()
    report: Report = {
        "kind": "pairs",
        "pairs": len(chosen),
        "prompts": distinct,
        "pairs_with_images": with_images,
        "rows_without_preference": skipped,
    }
    if not chosen:
        return report
    c, r = (np.frombuffer(values, dtype=np.uint32).astype(np.int64) for values in (chosen, rejected))
    report["length"] = {
        "mean_chars_chosen": float(c.mean()),
        "mean_chars_rejected": float(r.mean()),
        "mean_chosen_minus_rejected": float((c - r).mean()),
        "median_chosen_minus_rejected": float(np.median(c - r)),
        "share_chosen_longer": float((c > r).mean()),
        "share_chosen_shorter": float((c < r).mean()),
        "histogram": _histogram(c - r),
    }
    if margins:
        values = np.frombuffer(margins, dtype=np.float64)
        counts = Counter(f"{value:g}" for value in np.sort(values).tolist())
        report["margin"] = {"mean": float(values.mean()), "counts": dict(counts)}
    return report


def _histogram(differences: np.ndarray) -> Report:
    edge = float(np.quantile(np.abs(differences), 0.99)) or 1.0
    counts, edges = np.histogram(np.clip(differences, -edge, edge), bins=41, range=(-edge, edge))
    return {"counts": counts.tolist(), "edges": edges.tolist()}
