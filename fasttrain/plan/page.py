"""The printed plan: one column per ZeRO stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fasttrain.plan.histogram import Histogram
from fasttrain.plan.planned_model import PlannedModel
from fasttrain.plan.predict import Machine, Prediction

Row = tuple[str, Callable[[Prediction], str]]


def _gib(value: float) -> str:
    return f"{value / 2**30:,.2f}"


MEMORY: list[Row] = [
    ("frozen weights", lambda p: _gib(p.memory.weights)),
    ("gathered layers", lambda p: _gib(p.memory.gathered)),
    ("trained weights", lambda p: _gib(p.memory.adapters)),
    ("gradients", lambda p: _gib(p.memory.gradients)),
    ("fp32 masters", lambda p: _gib(p.memory.masters)),
    ("optimizer moments", lambda p: _gib(p.memory.moments)),
    ("reduce buckets", lambda p: _gib(p.memory.buckets)),
    ("activations", lambda p: _gib(p.memory.activations)),
    ("working memory", lambda p: _gib(p.memory.working)),
    ("  of which head tile", lambda p: _gib(p.memory.head_tile)),
    ("  images, before it", lambda p: _gib(p.memory.images)),
    ("peak", lambda p: _gib(p.memory.peak)),
    ("usable", lambda p: _gib(p.usable_bytes)),
]
PACKS: list[Row] = [
    ("fits", lambda p: "yes" if p.fits else "NO"),
    ("gradient checkpointing", lambda p: "on" if p.checkpointing else "off"),
    ("tokens per pack", lambda p: f"{p.tokens_per_pack:,}"),
    ("largest that fits, checkpointing off", lambda p: _largest(p.largest)),
    ("largest that fits, checkpointing on", lambda p: _largest(p.largest_checkpointed)),
    ("packs per GPU and step", lambda p: f"{p.work.packs:.1f}"),
    ("busiest GPU / mean, tokens", lambda p: f"{p.work.balance:.3f}"),
]
WORK: list[Row] = [
    ("tokens per step, all GPUs", lambda p: f"{p.work.tokens:,.0f}"),
    ("  without shared prompts and cache", lambda p: f"{p.work.tokens_unshared:,.0f}"),
    ("TFLOP per step, all GPUs", lambda p: f"{p.work.flops / 1e12:,.0f}"),
    ("GB received per GPU and step", lambda p: f"{p.communication.total / 1e9:,.1f}"),
    ("  weights gathered", lambda p: f"{p.communication.gathers / 1e9:,.1f}"),
    (
        "  gradients and updates",
        lambda p: f"{(p.communication.gradients + p.communication.updates) / 1e9:,.1f}",
    ),
]
TIME: list[Row] = [
    ("matrix products, s", lambda p: f"{p.timing.matrix_s:.2f}"),
    ("memory traffic, s", lambda p: f"{p.timing.memory_s:.2f}"),
    ("interconnect, s", lambda p: f"{p.timing.link_s:.2f}"),
    ("step, s (the largest of them)", lambda p: f"{p.timing.step_s:.2f}"),
    ("bound by", lambda p: p.timing.binds),
    ("pairs per s", lambda p: f"{p.work.pairs / p.timing.step_s:.1f}"),
    ("training, hours", lambda p: f"{p.work.steps * p.timing.step_s / 3600:.2f}"),
    ("filling the reference cache once, hours", lambda p: f"{p.reference_s / 3600:.3f}"),
]


def _largest(tokens: int) -> str:
    return f"{tokens:,}" if tokens else "none"


def print_page(
    name: str, planned: PlannedModel, histogram: Histogram, machine: Machine, predictions: list[Prediction], advice: list[str],
    notes: list[str],
) -> str:  # fmt: skip
    """The whole page as text."""
    weights, first = planned.weights, predictions[0]
    lines = [
        f"model       {name} ({planned.source}), {str(planned.dtype).removeprefix('torch.')}",
        f"parameters  {weights.total:,}: {weights.trained:,} trained (adapter {weights.adapter:,}, projector {weights.projector:,}, "
        f"base {weights.whole:,})",
        f"data        {histogram.pair_total:,} pairs in {len(histogram):,} groups, {histogram.tokens / len(histogram):,.0f} tokens a "
        f"group; {histogram.source}",
        f"run         {first.work.steps:,} steps of {first.work.pairs:.0f} pairs on {machine.gpus} x {machine.gpu.name}",
        "",
    ]
    heads = [_head(p, machine) for p in predictions]
    for title, rows in (
        ("memory per GPU, GiB", MEMORY), ("packs", PACKS), ("work of a step", WORK), ("time of a step", TIME),
    ):  # fmt: skip
        lines += _table(title, heads, [(label, [show(p) for p in predictions]) for label, show in rows])
    achieved = machine.achieved
    lines += [
        f"Assumed: {achieved.matrix:.0%} of {machine.gpu.matrix_flops / 1e12:,.0f} TFLOP/s, {achieved.memory_rate:.0%} of "
        f"{machine.gpu.memory_bytes_per_s / 1e9:,.0f} GB/s memory, {achieved.link:.0%} of {machine.link_bytes_per_s / 1e9:,.0f} GB/s "
        f"{machine.gpu.link} each way, {achieved.memory:.0%} of the memory for tensors; all overlap.",
        f"Source: {machine.gpu.source}.",
    ]
    lines += [f"Note: {note}." for note in notes]
    lines += [f"Advice: {line}." for line in advice]
    return "\n".join(lines)


def _head(prediction: Prediction, machine: Machine) -> str:
    if prediction.stage:
        return f"ZeRO-{prediction.stage}"
    return "whole copy" if machine.gpus > 1 else "one GPU"


def _table(title: str, heads: list[str], rows: list[tuple[str, list[str]]]) -> list[str]:
    first = max(41, *(len(label) for label, _ in rows))
    widths = [max(13, 2 + len(head), *(len(cells[i]) for _, cells in rows)) for i, head in enumerate(heads)]

    def line(label: str, cells: list[str]) -> str:
        return f"{label:<{first}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))

    return [line(title, heads), *(line(f"  {label}", cells) for label, cells in rows), ""]


def as_json(
    name: str, planned: PlannedModel, histogram: Histogram, machine: Machine, predictions: list[Prediction], advice: list[str],
    notes: list[str],
) -> dict[str, Any]:  # fmt: skip
    """The same as plain values, in bytes, tokens, operations and seconds."""
    return {
        "model": {"name": name, "source": planned.source, "parameters": planned.weights.total}
        | dataclasses.asdict(planned.weights) | {"trained": planned.weights.trained},
        "data": {
            "source": histogram.source, "pairs": histogram.pair_total, "prompts": len(histogram), "tokens": histogram.tokens,
            "longest_sequence": histogram.longest_sequence, "images": histogram.images,
        },
        "machine": dataclasses.asdict(machine) | {"usable_bytes": machine.usable_bytes},
        "stages": [
            dataclasses.asdict(p)
            | {"step_s": p.timing.step_s, "binds": p.timing.binds, "peak_bytes": p.memory.peak,
               "communication_bytes": p.communication.total}
            for p in predictions
        ],
        "notes": notes,
        "advice": advice,
    }  # fmt: skip
