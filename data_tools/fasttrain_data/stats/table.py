"""A report as lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from fasttrain_data.records import ATTRIBUTES

Report = dict[str, Any]
_SHORT = ("H", "C", "Co", "Cx", "V")
_MOST_MARGINS = 30  # more fill the screen


def table_lines(report: Report) -> Iterator[str]:
    yield from _annotation_lines(report) if report["kind"] == "annotations" else _pair_lines(report)


def _shown(value: float, form: str) -> str:
    """A number; a dash of its width where it has no meaning: a constant has no correlation."""
    text = format(value, form)
    return "-".rjust(len(text)) if math.isnan(value) else text


def _annotation_lines(report: Report) -> Iterator[str]:
    cost = "" if report["usd"] is None else f", {report['usd']:,.2f} USD"
    yield f"{report['prompts']:,} prompts, {report['answers']:,} scored answers{cost}"
    yield "  " + ", ".join(f"{count:,} {status}" for status, count in report["statuses"].items())
    if report.get("repeated_rows"):
        yield f"  {report['repeated_rows']:,} rows repeat a prompt with the same answers and are left out"
    for flag, count in report["flags"].items():
        yield f"  flagged {count:,}: {flag}"
    if "attributes" not in report:
        return
    yield ""
    yield "attribute        0      1      2      3      4    mean    sd   HelpSteer      with length"
    for name, row in report["attributes"].items():
        shares = " ".join(f"{count / report['answers']:6.1%}" for count in row["counts"])
        human = f"{row['helpsteer_mean']:.2f} ({row['helpsteer_sd']:.2f})"
        length = report["length"]["correlation"][name]["spearman"]
        yield f"{name:<13}{shares}  {row['mean']:5.2f} {row['sd']:5.2f}   {human}  {_shown(length, '+12.2f')}"
    yield ""
    yield "correlation  " + " ".join(f"{name:>6}" for name in _SHORT)
    for name, row in zip(_SHORT, report["correlation"], strict=True):
        yield f"  {name:<11}" + " ".join(_shown(value, "6.2f") for value in row)
    hcc = report["length"]["correlation"]["hcc"]
    yield f"H + C + Co with length: Pearson {_shown(hcc['pearson'], '+5.2f')}, Spearman {_shown(hcc['spearman'], '+5.2f')}"
    yield ""
    yield from _agreement_lines(report["agreement"])
    yield "place in list   score against the call's mean   share of best"
    for row in report["position"]:
        yield f"  {row['position']:<13}{row['mean_minus_call_mean']:+z12.3f} {row['share_best']:24.1%}"
    yield ""
    yield "margin   prompts with a pair      chosen - lowest, characters"
    for row in report["yield"]:
        if row.get("ties"):
            yield f"  tie    {row['prompts']:>10,} {row['share']:7.1%}"
            if row["one_answer"]:
                yield f"  none   {row['one_answer']:>10,}          one answer only"
        else:
            yield f"  {row['margin']:<5}  {row['prompts']:>10,} {row['share']:7.1%} {row['chars_chosen_minus_lowest']:+z14.0f}"


def _agreement_lines(agreement: Report) -> Iterator[str]:
    if not agreement:
        yield "agreement: no answer was rated twice (annotate with --votes or --recheck)"
        yield ""
        return
    for kind, title in (("votes", "between votes"), ("recheck", "after reordering")):
        if kind in agreement:
            yield f"agreement {title}: ratings   kappa   exact   within 1"
            for name in ATTRIBUTES:
                row = agreement[kind][name]
                yield f"  {name:<18}{row['ratings']:>10,} {_shown(row['kappa'], '9.3f')} {row['exact']:7.1%} {row['within_1']:8.1%}"
    alphas = ", ".join(
        f"{short} {_shown(agreement['krippendorff_alpha'][name], '5.3f')}"
        for short, name in zip(_SHORT, ATTRIBUTES)
    )
    yield f"Krippendorff's alpha (ordinal): {alphas}"
    yield f"answer pairs that change order: {agreement['pair_flips']:.1%}"
    yield ""


def _pair_lines(report: Report) -> Iterator[str]:
    yield (
        f"{report['pairs']:,} pairs of {report['prompts']:,} prompts, {report['pairs_with_images']:,} with images"
        + (
            f"; {report['rows_without_preference']:,} rows without preference"
            if report["rows_without_preference"]
            else ""
        )
    )
    if "length" not in report:
        return
    length = report["length"]
    yield (
        f"mean length: chosen {length['mean_chars_chosen']:.0f}, rejected {length['mean_chars_rejected']:.0f} characters; "
        f"chosen - rejected {length['mean_chosen_minus_rejected']:+z.0f} (median {length['median_chosen_minus_rejected']:+z.0f})"
    )
    yield f"chosen is longer in {length['share_chosen_longer']:.1%}, shorter in {length['share_chosen_shorter']:.1%}"
    if "margin" in report:
        counts = report["margin"]["counts"]
        shown = ", ".join(f"{margin}: {count:,}" for margin, count in counts.items())
        if len(counts) > _MOST_MARGINS:
            shown = f"{len(counts):,} different ones from {next(iter(counts))} to {next(reversed(counts))}"
        yield f"mean margin {report['margin']['mean']:.2f} ({shown})"
