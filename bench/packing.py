"""How evenly a step is dealt out to many ranks, and what planning it costs, on a million groups without a model.

    python bench/packing.py --ranks 64 --groups 1000000 --out bench/results/packing.md

Lengths are drawn as LLaVA-1.5 data has them: a prompt of 576 image tokens and a log-normal question (median 45), 2 to 4 answers of
log-normal length (median 110, at most 1,024), pairs best against each other; a tenth of the prompts have no image.
"""

from __future__ import annotations

import datetime
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from fasttrain.data.packs import Order, Pack, Step, plan_step
from fasttrain.data.prepared import Account, PreparedData


def prepared(prompts: np.ndarray, answers: list[np.ndarray], images: np.ndarray) -> PreparedData:
    """Data with lengths and pairs (best against each other answer), and no files: all that planning asks for."""
    groups, counts = len(prompts), np.array([len(lengths) for lengths in answers])
    length_starts = np.r_[0, np.cumsum(counts + 1)]
    flat = np.insert(np.concatenate(answers), length_starts[:-1] - np.arange(groups), prompts)
    loser = np.arange(len(flat)) - np.repeat(length_starts[:-1], counts + 1) - 1
    losers = loser[loser > 0]
    arrays = {
        "tokens": np.broadcast_to(np.int32(0), flat.sum()),
        "lengths": flat.astype(np.int32),
        "pairs": np.stack([np.zeros_like(losers), losers], 1).astype(np.int32).ravel(),
        "token_starts": np.r_[0, np.cumsum(np.add.reduceat(flat, length_starts[:-1]))],
        "length_starts": length_starts,
        "pair_starts": np.r_[0, np.cumsum(counts - 1)],
        "rows": np.arange(groups, dtype=np.uint32),
        "images": images.astype(np.uint32),
        "counts": (counts - 1).astype(np.uint32),
        "slots": np.arange(groups),
        "bounds": np.zeros((groups, 2), np.uint32),
        "member_starts": np.zeros(groups + 1, np.int64),
        "members": np.zeros(0, np.uint32),
    }
    files, tokenizing = cast("Any", None), cast("Any", lambda rows: None)
    return PreparedData(files, Account(rows=groups, groups=groups), arrays, tokenizing)


def draw(groups: int, seed: int) -> PreparedData:
    """So many groups of made-up LLaVA-1.5 lengths."""
    rng = np.random.default_rng(seed)
    images = (rng.random(groups) < 0.9).astype(int)
    prompts = 576 * images + 40 + np.exp(rng.normal(np.log(45), 0.6, groups)).astype(int)
    counts = rng.integers(2, 5, groups)
    flat = np.clip(np.exp(rng.normal(np.log(110), 0.7, counts.sum())), 4, 1024).astype(int)
    return prepared(prompts, np.split(flat, np.cumsum(counts)[:-1]), images)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One setting over the steps looked at; `wait` is the time that ranks stand still if they meet after every pack."""

    pairs_per_step: int
    steps: int
    groups_per_rank: float
    rounds: float
    fill: float
    mean_balance: float
    worst_balance: float
    wait: float
    plan_ms: float


def tokens(data: PreparedData, pack: Pack) -> int:
    return sum(
        int(data.lengths(piece.group)[[0, *(1 + c for c in piece.completions)]].sum())
        for piece in pack.pieces
    )


def measure(data: PreparedData, ranks: int, pairs_per_step: int, budget: int, most: int) -> Measured:
    order = Order(data, pairs_per_step, shuffle=True, seed=0)
    steps = order.steps_in(0)[:-1]  # the last holds what is left
    looked = (
        steps if len(steps) <= most else [steps[i] for i in np.linspace(0, len(steps) - 1, most, dtype=int)]
    )
    seconds, balances, waits, rounds, fills = 0.0, [], [], [], []
    for groups in looked:
        start = time.process_time()
        step: Step = plan_step(data, 1, 0.0, groups, budget, True, ranks)
        seconds += time.process_time() - start
        held = np.array([tokens(data, pack) for pack in step.packs], float).reshape(-1, ranks)
        per_rank = held.sum(0)
        balances.append(per_rank.max() / per_rank.mean())
        waits.append(held.max(1).sum() / per_rank.mean())
        rounds.append(len(held))
        fills.append(np.mean([pack.fill for pack in step.packs]))
    return Measured(
        pairs_per_step=pairs_per_step, steps=len(looked),
        groups_per_rank=float(np.mean([len(groups) for groups in looked])) / ranks,
        rounds=float(np.mean(rounds)), fill=float(np.mean(fills)), mean_balance=float(np.mean(balances)),
        worst_balance=float(np.max(balances)), wait=float(np.mean(waits)), plan_ms=1e3 * seconds / len(looked),
    )  # fmt: skip


def resident_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@click.command()
@click.option("--ranks", default=64, show_default=True)
@click.option("--groups", default=1_000_000, show_default=True)
@click.option("--tokens-per-pack", "budget", default=8192, show_default=True)
@click.option(
    "--pairs-per-step", "sizes", multiple=True, type=int, default=(128, 256, 512, 1024, 2048, 4096, 8192)
)
@click.option(
    "--most-steps", default=200, show_default=True, help="Steps looked at per setting, spread over the epoch."
)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    ranks: int, groups: int, budget: int, sizes: tuple[int, ...], most_steps: int, out: Path | None
) -> None:
    before = resident_mib()
    data = draw(groups, 0)
    held = resident_mib() - before
    start = time.process_time()
    epoch_steps = len(Order(data, sizes[-1], shuffle=True, seed=0).steps_in(0))
    epoch_s = time.process_time() - start
    rows = [measure(data, ranks, size, budget, most_steps) for size in sizes]
    whole = resident_mib()
    arguments = f"--ranks {ranks} --groups {groups} --tokens-per-pack {budget} --most-steps {most_steps}"
    lines = [
        f"# Packing for {ranks} ranks",
        "",
        f"Made by `python bench/packing.py {arguments}` on {datetime.date.today()}, {platform.machine()},",
        f"one process, Python {platform.python_version()}, numpy {np.__version__}. {groups:,} groups of 2 to 4 answers drawn at random",
        f"(see the script); {budget:,} tokens per pack.",
        "",
        "`max/mean` is the rank with most tokens of a step against the mean rank, tokens of filling packs included: the time lost when",
        "ranks meet once per step (ZeRO-2). `meeting every pack` is the same when they meet in every pack (ZeRO-3): the largest pack of",
        "each round summed, against the mean rank.",
        "",
        "| pairs a step | groups a rank | packs a rank | filling packs | max/mean, mean | max/mean, worst step | meeting every pack | planning a step, processor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.pairs_per_step:,} | {row.groups_per_rank:.1f} | {row.rounds:.2f} | {row.fill:.1%} | {row.mean_balance:.4f} "
            f"| {row.worst_balance:.4f} | {row.wait:.4f} | {row.plan_ms:.1f} ms |"
        )
    lines += [
        "",
        f"Cutting the epoch into its {epoch_steps:,} steps took {epoch_s:.2f} s of processor time. Lengths, pairs and index of the {groups:,} groups take "
        f"{held:.0f} MiB beside the",
        f"{before:.0f} MiB of an empty process; the highest resident memory of the whole run was {whole:.0f} MiB.",
        "",
    ]
    text = "\n".join(lines)
    click.echo(text)
    if out:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
