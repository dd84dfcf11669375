"""The pairs that training moved most and least: how much more or less likely each answer became, beside image and text."""

from __future__ import annotations

import math
from typing import Any

from fasttrain.errors import UserError
from fasttrain.pages import heading, paragraph
from fasttrain.report.examples import PairReader, pair_html
from fasttrain.report.runs import Run

NOTE = (
    "How likely the model in training finds each answer, against the model it started from, when the pair was last seen "
    "(before that step's update). One nat is a factor of e, 2.7. Training wants the chosen answer to gain on the rejected one; "
    "both may become less likely."
)


def change_parts(run: Run, count: int) -> list[str]:
    """HTML of up to `count` pairs, half of those that moved most, half of those that moved least."""
    if run.unit != "pairs" or not count:
        return []
    title = heading(f"Pairs that {run.name} moved most")
    if run.changes is None:
        return [title, paragraph("This run kept no log-ratios of its pairs.", "note")]
    seen = last_seen(run.changes)
    if not seen:
        return [title, paragraph("No pair was logged yet.", "note")]
    try:
        reader = PairReader(run)
        rows = run.environment.get("data", {}).get("train", {}).get("rows", len(reader))
        if rows != len(reader):  # numbers would name other rows
            raise UserError(
                f"the pair file has changed: the run read {rows:,} rows, now it has {len(reader):,}"
            )
    except (UserError, OSError) as error:
        return [title, paragraph(f"No examples: {error}", "note")]
    most = sorted(seen, key=lambda entry: entry["rejected"] - entry["chosen"])[: (count + 1) // 2]
    shown = {entry["pair"] for entry in most}
    late = [entry for entry in last_seen(run.changes, 0.5) if entry["pair"] not in shown]
    least = sorted(late, key=lambda entry: entry["chosen"] - entry["rejected"])[: count // 2]
    parts = [title, paragraph(NOTE, "note"), *_cards(reader, most)]
    if least:
        note = "Of those seen in the last half epoch: earlier, little has moved yet."
        parts += [heading("Pairs that moved least, or the wrong way"), paragraph(note, "note")]
        parts += _cards(reader, least)
    return parts


def last_seen(changes: list[dict[str, Any]], epochs: float = 1.0) -> list[dict[str, Any]]:
    """Each pair of the last epoch's lines (or the last part of one), as its last line tells it."""
    newest = max((line["epoch"] for line in changes), default=0.0)
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for line in changes:
        if line["epoch"] > newest - epochs * min(1.0, newest) or line["epoch"] == newest:
            for row, place, chosen, rejected in line["pairs"]:
                named = (int(row), int(place))
                found[named] = {"pair": named, "step": line["step"], "chosen": chosen, "rejected": rejected}
    return list(found.values())


def _cards(reader: PairReader, entries: list[dict[str, Any]]) -> list[str]:
    cards = []
    for entry in entries:
        row, place = entry["pair"]
        pair, problem = reader.pair_of_prompt(row, place)
        if pair is None:
            cards.append(paragraph(f"Pair {place + 1} of the prompt in row {row + 1}: {problem}", "note"))
            continue
        margin = entry["chosen"] - entry["rejected"]
        lead = f"step {entry['step']:,}: chosen gained {_nats(margin)} on rejected"
        told = {side: f"{_nats(entry[side])}: {_times(entry[side])}" for side in ("chosen", "rejected")}
        cards.append(pair_html(pair, lead, told))
    return cards


def _nats(value: float) -> str:
    return f"{value:+.2f} nats"


def _times(change: float) -> str:
    """A log-ratio in everyday words."""
    factor = math.exp(min(abs(change), 700))
    shown = f"{factor:,.1f}" if factor < 100 else f"{factor:,.0f}" if factor < 1e5 else f"{factor:.0e}"
    if factor < 1.05:
        return "about as likely as before"
    return f"{shown} times as likely as before" if change > 0 else f"{shown} times less likely than before"
