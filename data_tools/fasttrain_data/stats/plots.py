"""Plots of a report as PNG bytes; matplotlib without pyplot, so that nothing global is touched."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from fasttrain_data.records import ATTRIBUTES

Report = dict[str, Any]
_SHORT = ("H", "C", "Co", "Cx", "V")


def plots(report: Report) -> dict[str, bytes]:
    """name -> PNG, for whatever the report holds."""
    if report["kind"] == "pairs":
        drawn = {"length_difference": _length_difference} if "length" in report else {}
    elif "attributes" in report:
        drawn = {
            "scores": _scores,
            "correlation": _correlation,
            "length": _length,
            "position": _position,
            "yield": _yield,
        }
        if report["agreement"]:
            drawn["agreement"] = _agreement
    else:
        drawn = {}
    return {name: _png(draw, report) for name, draw in drawn.items()}


def _png(draw: Any, report: Report) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    draw(figure, report)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _scores(figure: Any, report: Report) -> None:
    axes = figure.subplots(1, len(ATTRIBUTES), sharey=True)
    for axis, name in zip(axes, ATTRIBUTES, strict=True):
        counts = np.array(report["attributes"][name]["counts"])
        axis.bar(range(5), counts / counts.sum(), color="#4477aa")
        axis.set(title=name, xticks=range(5))
    axes[0].set_ylabel("share of answers")


def _correlation(figure: Any, report: Report) -> None:
    axis = figure.subplots()
    matrix = np.array(report["correlation"])
    image = axis.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
    axis.set(xticks=range(5), yticks=range(5), xticklabels=_SHORT, yticklabels=ATTRIBUTES)
    for row, column in np.ndindex(matrix.shape):
        colour = "white" if abs(matrix[row, column]) > 0.7 else "black"
        axis.text(column, row, f"{matrix[row, column]:z.2f}", ha="center", va="center", color=colour)
    figure.colorbar(image)
    axis.set_title("correlation between attributes")


def _length(figure: Any, report: Report) -> None:
    axis = figure.subplots()
    edges = np.array(report["length"]["deciles"]["chars"])
    middles, means = (edges[1:] + edges[:-1]) / 2, np.array(report["length"]["deciles"]["mean_hcc"])
    filled = np.isfinite(means)  # few different lengths leave deciles empty
    axis.plot(middles[filled], means[filled], marker="o", color="#4477aa")
    axis.set(xlabel="characters (deciles)", ylabel="mean H + C + Co", ylim=(0, 12), title="score by length")


def _position(figure: Any, report: Report) -> None:
    axis = figure.subplots()
    places = [row["position"] for row in report["position"]]
    axis.bar(places, [row["mean_minus_call_mean"] for row in report["position"]], color="#4477aa")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(
        xlabel="place in the list",
        ylabel="H + C + Co against the call's mean",
        xticks=places,
        title="position bias",
    )


def _yield(figure: Any, report: Report) -> None:
    axis = figure.subplots()
    rows = [row for row in report["yield"] if not row.get("ties")]
    axis.bar([row["margin"] for row in rows], [row["share"] for row in rows], color="#4477aa")
    axis.set(
        xlabel="margin in H + C + Co",
        ylabel="share of prompts with a pair",
        ylim=(0, 1),
        title="pair yield by margin",
    )


def _agreement(figure: Any, report: Report) -> None:
    axis = figure.subplots()
    kinds = [kind for kind in ("votes", "recheck") if kind in report["agreement"]]
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        kappas = [report["agreement"][kind][name]["kappa"] for name in ATTRIBUTES]
        places = np.arange(len(ATTRIBUTES)) + (number - (len(kinds) - 1) / 2) * width
        axis.bar(places, kappas, width=width, label=kind)
    axis.set(xticks=range(len(ATTRIBUTES)), xticklabels=ATTRIBUTES, ylim=(min(0, axis.get_ylim()[0]), 1))
    axis.set(ylabel="quadratic weighted kappa", title="agreement")
    axis.legend()


def _length_difference(figure: Any, report: Report) -> None:
    axis = figure.subplots()
    histogram = report["length"]["histogram"]
    edges = np.array(histogram["edges"])
    axis.bar(edges[:-1], histogram["counts"], width=np.diff(edges), align="edge", color="#4477aa")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="chosen - rejected, characters", ylabel="pairs", title="length difference")
