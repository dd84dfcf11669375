"""How a step's cost grows: measures one axis at a time, fits a law, plots it.

    python bench/scaling.py pairs prompt vocabulary      # of a step, a head; minutes
    python bench/scaling.py rows --most 1000000          # start-up over 1k to 1M rows: see start_up.py
    python bench/scaling.py ranks                        # one and two processes

Appends to bench/results/scaling_DATE.csv and draws scaling_DATE_AXIS.png beside it. Times are of the processor, least of
`--turns` (a busy machine only adds); the law is y = a + b x^c, or y = b x^c where a is nothing, fitted to the points measured. That of
rows is a line over the files large enough not to be tokenized at the start; smaller ones are, and can take longer.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from step_cases import Case, recipe, write_adapter, write_case, write_model

HERE = Path(__file__).resolve().parent
Point = dict[str, Any]


def _least(run: Callable[[], object], turns: int) -> float:
    """Processor seconds of the quickest of `turns` runs, after one that allocates."""
    run()
    found = []
    for _ in range(turns):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def _step(case: Case, options: argparse.Namespace) -> Point:
    from step_contenders import Fasttrain, Files
    from step_flops import counter

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FASTTRAIN_CACHE"] = str(folder / "cache")
        model = write_model(options.models / case.model, folder / "model")
        files = Files(
            case, model, write_case(case, model, folder), write_adapter(model, folder, 16), 16, folder
        )
        contender = Fasttrain(files)
        seconds = _least(contender.step, options.turns)
        with counter() as flops:
            contender.step()
        contender.job.close()
    return {"seconds": seconds, "gflop": flops.get_total_flops() / 1e9}


def pairs(options: argparse.Namespace) -> Iterator[Point]:
    """Pairs per prompt of 512 tokens, answers of 64: one chosen, x rejected."""
    for count in (1, 2, 4, 8, 16):
        yield {"x": count} | _step(Case("pairs", "smollm2", [[64] * (count + 1)], 512), options)


def prompt(options: argparse.Namespace) -> Iterator[Point]:
    """Prompt tokens of a 1:1 pair, answers of 64."""
    for tokens in (64, 128, 256, 512, 1024, 2048, 4096):
        yield {"x": tokens} | _step(Case("prompt", "smollm2", [[64, 64]], tokens), options)


def vocabulary(options: argparse.Namespace) -> Iterator[Point]:
    """Vocabulary of the head alone, forward and backward, 256 rows of width 576."""
    import torch

    from fasttrain_kernels import linear_logprob

    for size in (32_000, 49_152, 64_000, 96_000, 128_256, 152_064):
        hidden = torch.randn(256, 576, requires_grad=True)
        weight, target = torch.randn(size, 576) / 24, torch.randint(0, size, (256,))
        run = lambda: linear_logprob(hidden, weight, target).logprob.sum().backward()  # noqa: B023, E731
        yield {"x": size, "seconds": _least(run, options.turns), "gflop": 4 * 256 * 576 * size / 1e9}


def rows(options: argparse.Namespace) -> Iterator[Point]:
    """Rows of a pair file: a first start, which reads and checks them, and a second; until the first step has been taken."""
    from start_up import measure

    count, fewest = 1000, 0.0
    while count <= options.most:
        found = measure(options.models / "smollm2", count)
        fewest = fewest or found["first_peak_mb"]
        point = {"x": count, "seconds": found["first_cpu_s"], "first_wall_s": found["first_wall_s"],
                 "second_wall_s": found["second_wall_s"], "second_cpu_s": found["second_cpu_s"],
                 "peak_mb": found["first_peak_mb"]}  # fmt: skip
        if count >= 1_000_000:  # less is lost in what the rest of the program takes, now more, now less
            point["bytes_a_row"] = (found["first_peak_mb"] - fewest) * 2**20 / count
        yield point
        count *= 10


def ranks(options: argparse.Namespace) -> Iterator[Point]:
    """Processes of one core each over the same steps of eight pairs: seconds of a step by the clock."""
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            case = Case("ranks", "smollm2", [[64, 64]] * 8, 256)
            model = write_model(options.models / case.model, folder / "model")
            raw = recipe(model, write_case(case, model, folder), folder, 16, 8)
            raw["train"] |= {"max_steps": 3, "tokens_per_pack": 1024}
            raw |= {"distributed": {"zero_stage": 2}} if count > 1 else {}
            (folder / "recipe.json").write_text(json.dumps(raw))
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "-m", "fasttrain",
                       "dpo", "-c", str(folder / "recipe.json")]  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": "1", "FASTTRAIN_CACHE": str(folder / "cache")}
            subprocess.run(command, env=environment, check=True, capture_output=True)
            lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        yield {"x": count, "seconds": min(json.loads(line)["step_s"] for line in lines)}


AXES = {axis.__name__: axis for axis in (pairs, prompt, vocabulary, rows, ranks)}
NAMES = {"pairs": "pairs per prompt", "prompt": "prompt tokens", "vocabulary": "vocabulary",
         "rows": "rows of the pair file", "ranks": "processes"}  # fmt: skip


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(a, b, c) of y = a + b x^c with a >= 0, by least squares of relative errors over a grid of c."""
    best = (np.inf, 0.0, 0.0, 0.0)
    for c in np.arange(0.0, 2.51, 0.01):
        for with_constant in (True, False):
            basis = np.stack([np.ones_like(x) if with_constant else np.zeros_like(x), x**c], 1) / y[:, None]
            (a, b), *_ = np.linalg.lstsq(basis, np.ones_like(y), rcond=None)
            error = float(np.sum((basis @ np.array([a, b]) - 1) ** 2))
            if a >= 0 and b >= 0 and error < best[0]:
                best = (error, float(a), float(b), float(c))
    return best[1:]


def draw(axis: str, points: list[Point], path: Path) -> str:
    """The plot of an axis; the law as a line of text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    from fasttrain.data.prepare import LAZY_FROM

    x, y = (np.array([float(point[key]) for point in points]) for key in ("x", "seconds"))
    law = ""
    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    axes.loglog(x, y, "o")
    fitted = x >= LAZY_FROM if axis == "rows" else x > 0
    if axis == "rows" and fitted.sum() > 1:
        b, a = np.polyfit(x[fitted], y[fitted], 1)
        c, law = 1.0, f"seconds = {a:.3g} + {b:.3g} x from {LAZY_FROM:,} rows on"
    elif fitted.sum() > 3:
        a, b, c = fit(x, y)
        law = f"seconds = {a:.3g} + {b:.3g} x^{c:.2f}"
    if law:
        dense = np.geomspace(x[fitted].min(), x.max())
        axes.loglog(dense, a + b * dense**c, "-", linewidth=1)
        axes.set_title(law, fontsize=9)
    steps = (1, 2, 5) if y.max() > 10 * y.min() else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%.3g"))
    axes.set_xlabel(NAMES[axis])
    axes.set_ylabel("seconds by the clock" if axis == "ranks" else "seconds of the processor")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return law or "too few points for a law"


def _append(path: Path, axis: str, points: list[Point]) -> None:
    columns = (
        "axis",
        "x",
        "seconds",
        "gflop",
        "first_wall_s",
        "second_wall_s",
        "second_cpu_s",
        "peak_mb",
        "bytes_a_row",
        "date",
    )
    kept = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [
                {k: v for k, v in row.items() if k in columns}
                for row in csv.DictReader(file)
                if row["axis"] != axis
            ]
    today = datetime.date.today().isoformat()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(kept)
        writer.writerows(
            {
                k: round(v, 4) if isinstance(v, float) else v
                for k, v in {"axis": axis, "date": today, **p}.items()
            }
            for p in points
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("axes", nargs="+", choices=[*AXES])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most", type=int, default=10_000, help="rows of the largest pair file")
    parser.add_argument("--models", type=Path, default=HERE.parent / "models")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"scaling_{datetime.date.today()}.csv")
    options = parser.parse_args()
    sys.path.append(
        sys.path.pop(0)
    )  # transformers looks for a package called kernels, which is a script here
    import torch

    torch.set_num_threads(options.threads)
    for axis in options.axes:
        points = []
        for point in AXES[axis](options):
            points.append(point)
            print(axis, point, flush=True)
        _append(options.out, axis, points)
        print(f"{axis}: {draw(axis, points, options.out.with_name(f'{options.out.stem}_{axis}.png'))}")


if __name__ == "__main__":
    main()
