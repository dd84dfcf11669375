"""Numbers from collected annotations: distributions, correlations, agreement, biases, pair yield."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from fasttrain_data.records import ATTRIBUTES
from fasttrain_data.stats.agreement import pearson, quadratic_weighted_kappa, spearman, within
from fasttrain_data.stats.collect import AnnotationSums

# Mean and standard deviation of the human labels in HelpSteer: a sanity range, not a target.
HELPSTEER = {
    "helpfulness": (2.79, 0.98),
    "correctness": (2.84, 0.99),
    "coherence": (3.30, 0.77),
    "complexity": (1.44, 0.82),
    "verbosity": (1.53, 0.93),
}
MARGINS = tuple(range(1, 9))
Report = dict[str, Any]


def annotation_report(sums: AnnotationSums) -> Report:
    """Everything about an annotation file as plain JSON values; nan where a number has no meaning."""
    report: Report = {
        "kind": "annotations",
        "prompts": sums.statuses.total(),
        "statuses": dict(sums.statuses.most_common()),
        "flags": dict(sums.flags.most_common()),
        "model_versions": dict(sums.versions.most_common()),
        "usd": sums.usd,
        "answers": len(sums.chars),
    }
    if not len(sums.chars):
        return report
    return report | {
        "attributes": _distributions(sums),
        "correlation": _correlation(sums),
        "length": _length(sums),
        "yield": _yield(sums),
        "position": _position(sums),
        "agreement": _agreement(sums),
    }


def _distributions(sums: AnnotationSums) -> Report:
    result = {}
    for column, name in enumerate(ATTRIBUTES):
        values = sums.scores[:, column]
        counts = np.bincount(values, minlength=5)
        result[name] = {
            "counts": counts.tolist(),
            "mean": float(values.mean()),
            "sd": float(values.std()),
            "ceiling": float(counts[4] / len(values)),
            "helpsteer_mean": HELPSTEER[name][0],
            "helpsteer_sd": HELPSTEER[name][1],
        }
    return result


def _correlation(sums: AnnotationSums) -> list[list[float]]:
    columns = [sums.scores[:, column].astype(float) for column in range(len(ATTRIBUTES))]
    return [[pearson(one, other) for other in columns] for one in columns]


def _length(sums: AnnotationSums) -> Report:
    chars = sums.chars.astype(float)
    totals = sums.scores[:, :3].sum(1)
    by_attribute = {
        name: {
            "pearson": pearson(sums.scores[:, c].astype(float), chars),
            "spearman": spearman(sums.scores[:, c], chars),
        }
        for c, name in enumerate(ATTRIBUTES)
    }
    by_attribute["hcc"] = {
        "pearson": pearson(totals.astype(float), chars),
        "spearman": spearman(totals, chars),
    }
    edges = np.quantile(chars, np.linspace(0, 1, 11))
    bins = np.clip(np.searchsorted(edges, chars, side="right") - 1, 0, 9)
    means = [
        float(totals[bins == index].mean()) if (bins == index).any() else float("nan") for index in range(10)
    ]
    return {
        "mean_chars": float(chars.mean()),
        "correlation": by_attribute,
        "deciles": {"chars": edges.tolist(), "mean_hcc": means},
    }


def _yield(sums: AnnotationSums) -> list[Report]:
    """Prompts of one answer and ties; per margin: prompts that give a pair, and how much longer chosen is than the lowest answer then."""
    totals, chars, starts = sums.scores[:, :3].sum(1), sums.chars.astype(np.int64), sums.starts
    prompts = list(itertools.pairwise(starts.tolist()))
    best = np.array([start + int(totals[start:end].argmax()) for start, end in prompts])
    worst = np.array([start + int(totals[start:end].argmin()) for start, end in prompts])
    spread = totals[best] - totals[worst]
    difference = chars[best] - chars[worst]
    rows = []
    for margin in MARGINS:
        kept = spread >= margin
        mean = float(difference[kept].mean()) if kept.any() else float("nan")
        rows.append(
            {
                "margin": margin,
                "prompts": int(kept.sum()),
                "share": float(kept.mean()),
                "chars_chosen_minus_lowest": mean,
            }
        )
    single = np.diff(starts) == 1
    ties = (spread == 0) & ~single
    return [
        {
            "margin": 0,
            "prompts": int(ties.sum()),
            "share": float(ties.mean()),
            "ties": True,
            "one_answer": int(single.sum()),
        },
        *rows,
    ]


def _position(sums: AnnotationSums) -> list[Report]:
    return [
        {
            "position": place + 1,
            "calls": int(count),
            "mean_minus_call_mean": float(sums.position_sum[place] / count),
            "share_best": float(sums.position_best[place] / count),
        }
        for place, count in enumerate(sums.position_count)
    ]


def _agreement(sums: AnnotationSums) -> Report:
    """Empty when no answer was rated twice."""
    report: Report = {}
    for name, tables in (("votes", sums.vote_tables), ("recheck", sums.recheck_tables)):
        if tables.sum():
            report[name] = {
                attribute: {
                    "ratings": int(table.sum() // 2),
                    "kappa": quadratic_weighted_kappa(table),
                    "exact": within(table, 0),
                    "within_1": within(table, 1),
                }
                for attribute, table in zip(ATTRIBUTES, tables, strict=True)
            }
    if report:
        alphas = [coincidences.alpha() for coincidences in sums.coincidences]
        report["krippendorff_alpha"] = dict(zip(ATTRIBUTES, alphas, strict=True))
        report["pair_flips"] = sums.flips / sums.ordered_pairs if sums.ordered_pairs else float("nan")
    return report
