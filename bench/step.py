"""Times whole training steps: fasttrain, TRL's DPOTrainer and a plain Hugging Face loop in turns, on the same pairs and model.

    python bench/models.py smollm2-llava -o models/smollm2-llava       # once; and smollm2 -o models/smollm2
    python bench/step.py --case vlm-130 --threads 2                    # appends to bench/results/step_DATE.csv
    python bench/step.py --case ladder --threads 2                     # the ablation ladder
    python bench/readme_table.py                                       # the README's table from the newest results

Every contender has a process of its own; they take steps in turns, so that a busy machine hurts all alike. Medians of the
turns are written, with the losses checked to be equal, operations counted, the matrix rate measured between the turns, and
the peak memory of each process. A case that the results file already holds is left out, unless --again is given. All contenders
of a case are in memory together; where they are more than four, each gives its free memory back after its step, and
pays for it again in the next. Where that is too much still, name some at a time with --contender.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from step_cases import CASES, Case, write_adapter, write_case, write_model
from step_contenders import LADDER

from fasttrain.command import TUNABLES

HERE = Path(__file__).resolve().parent
RIVALS = ("fasttrain", "plain", "trl")
# TRL's memory and time for several pairs depend on whether they are one batch
CONTENDERS = {"ladder": LADDER, "vlm-4x3": (*RIVALS, "trl-batched")}
SAME_LOSS = 5e-5  # relative; TRL adds up hundreds of log-probs in fp32
MANY = 4  # contenders whose memory, kept between turns, may be too much together


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contender's medians. Memory in MB; flops counted in one step; `of_rate` is them over time over the matrix rate."""

    case: str
    contender: str
    pairs: int
    turns: int
    threads: int
    wall_s: float
    cpu_s: float
    pairs_per_s: float
    tokens_per_s: float  # of prompts and answers, each counted once: what there is to learn from
    gflop: float
    of_rate: float
    of_rate_cpu: float
    rss_mb: float
    rss_above_model_mb: float
    tensor_peak_mb: float
    loss: float
    wall_min_s: float
    date: str


class Worker:
    """A contender's process."""

    def __init__(self, name: str, described: Path, threads: int) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            # as the fasttrain command sets them; here for all
            "THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": TUNABLES,
            "FASTTRAIN_CACHE": str(described.parent / "cache"),
        }  # fmt: skip
        command = [sys.executable, str(HERE / "step_worker.py"), name, str(described), str(threads)]
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.loaded_rss = self._answer()["loaded_rss"]

    def ask(self, order: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": order}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(case: Case, names: tuple[str, ...], options: argparse.Namespace) -> list[Row]:
    """One row per contender, from `options.turns` steps each, taken in turns."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_model(options.models / case.model, folder / "model")
        pairs = write_case(case, model, folder)
        adapter = write_adapter(model, folder, options.rank)
        workers = []
        try:
            for name in names:
                own = folder / name.replace(" ", "-")
                own.mkdir()
                described = own / "files.json"
                paths = {"model": model, "pairs": pairs, "adapter": adapter, "folder": own}
                described.write_text(
                    json.dumps(
                        {"case": case.name, "rank": options.rank} | {k: str(v) for k, v in paths.items()}
                    )
                )
                workers.append(Worker(name, described, options.threads))
            steps, rates = _turns(workers, options.turns)
            counted = _count(workers)
        finally:
            for worker in workers:
                worker.close()
    tokens = sum(case.groups)
    rate = statistics.median(entry["rate"] for entry in rates)
    rate_cpu = statistics.median(entry["rate_cpu"] for entry in rates)
    print(
        f"{case.name}: matrix rate {rate / 1e9:.0f} GFLOP/s, {rate_cpu / 1e9:.0f} per second of processor time"
    )
    return [
        _row(case, worker, steps[worker.name], counted[worker.name], tokens, rate, rate_cpu, options.threads)
        for worker in workers
    ]


def _turns(
    workers: list[Worker], turns: int
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, float]]]:
    steps: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    rates = []
    for worker in workers if turns > 1 else ():  # the first step allocates
        _step(worker, len(workers))
    for turn in range(turns):
        rates.append(workers[0].ask("rate"))
        for worker in workers:
            answer = _step(worker, len(workers))
            steps[worker.name].append(answer)
            print(f"  turn {turn + 1}  {worker.name:17s} {answer['wall_s']:8.2f} s  {answer['cpu_s']:8.2f} s of processor  "
                  f"loss {answer['loss']:.7f}", flush=True)  # fmt: skip
        losses = [steps[worker.name][-1]["loss"] for worker in workers]
        if max(losses) - min(losses) > SAME_LOSS * max(losses):
            raise SystemExit(f"the contenders compute different losses: {losses}")
    return steps, rates


def _count(workers: list[Worker]) -> dict[str, dict[str, int]]:
    """Each counts its operations in one step more and ends: beside others that keep their memory that needs too much."""
    counted = {}
    for worker in workers:
        counted[worker.name] = worker.ask("count")
        worker.close()
    return counted


def _step(worker: Worker, workers: int) -> dict[str, Any]:
    answer = worker.ask("step")
    if workers > MANY:
        worker.ask("rest")
    return answer


def _row(
    case: Case, worker: Worker, steps: list[dict[str, Any]], counted: dict[str, int], tokens: int, rate: float,
    rate_cpu: float, threads: int,
) -> Row:  # fmt: skip
    wall = statistics.median(step["wall_s"] for step in steps)
    cpu = statistics.median(step["cpu_s"] for step in steps)
    rss = max(step["peak_rss"] for step in steps)
    return Row(
        case=case.name, contender=worker.name, pairs=case.pairs, turns=len(steps), threads=threads, wall_s=round(wall, 3),
        cpu_s=round(cpu, 3), pairs_per_s=round(case.pairs / wall, 4), tokens_per_s=round(tokens / wall, 1),
        gflop=round(counted["flops"] / 1e9, 1), of_rate=round(counted["flops"] / wall / rate, 3),
        of_rate_cpu=round(counted["flops"] / cpu / rate_cpu, 3), rss_mb=round(rss / 1e6),
        rss_above_model_mb=round((rss - worker.loaded_rss) / 1e6), tensor_peak_mb=round(counted["tensor_peak"] / 1e6),
        loss=round(steps[-1]["loss"], 6), wall_min_s=round(min(step["wall_s"] for step in steps), 3),
        date=datetime.date.today().isoformat(),
    )  # fmt: skip


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[Row]) -> None:
    """Put the rows in the file, in place of those of the same case, contender and threads."""
    keys = {(row.case, row.contender, str(row.threads)) for row in rows}
    kept = [row for row in read_rows(path) if (row["case"], row["contender"], row["threads"]) not in keys]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Row.__annotations__))
        writer.writeheader()
        writer.writerows([*kept, *(asdict(row) for row in rows)])


def environment() -> dict[str, str]:
    """What the figures depend on."""
    import importlib.metadata

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "unknown",
    )  # fmt: skip
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    return {"processor": f"{cpu}, {os.cpu_count()} cores", "commit": commit.stdout.strip(), **versions,
            "load": " ".join(f"{value:.1f}" for value in os.getloadavg())}  # fmt: skip


def write_markdown(path: Path) -> None:
    """OUT.md beside OUT.csv: the same figures for readers, with ratios to fasttrain."""
    rows = read_rows(path)
    lines = [f"# Steps, {path.stem.removeprefix('step_')}", ""]
    lines += [f"{key}: {value}  " for key, value in environment().items()]
    lines += [
        "",
        "Made by `python bench/step.py`; what the columns mean is said there and in docs/performance.md.",
        "",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        lines += [f"## {case}: {CASES[case].about}", "", *_table(mine), ""]
    path.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


def _table(rows: list[dict[str, str]]) -> Iterator[str]:
    yield "| contender | threads | s a step | processor s | pairs/s | tokens/s | GFLOP | of matrix rate | peak MB | tensors MB | times fasttrain |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    base = {row["threads"]: row for row in rows if row["contender"] == "fasttrain"}
    for row in rows:
        ours = base.get(row["threads"])
        ratio = f"{float(row['wall_s']) / float(ours['wall_s']):.2f}" if ours else ""
        yield (f"| {row['contender']} | {row['threads']} | {row['wall_s']} | {row['cpu_s']} | {row['pairs_per_s']} | "
               f"{row['tokens_per_s']} | {row['gflop']} | {row['of_rate']} | {row['rss_mb']} | {row['tensor_peak_mb']} | {ratio} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", nargs="+", choices=[*CASES], default=[name for name in CASES if name != "tiny"]
    )
    parser.add_argument("--contender", nargs="+", help="only these (default: all of the case)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapter")
    parser.add_argument("--models", type=Path, default=HERE.parent / "models")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"step_{datetime.date.today()}.csv")
    parser.add_argument("--again", action="store_true", help="also cases that the results already hold")
    options = parser.parse_args()
    sys.path.append(
        sys.path.pop(0)
    )  # transformers looks for a package called kernels, which is a script here
    for name in options.case:
        names = options.contender or CONTENDERS.get(name, RIVALS)
        held = {(row["contender"], row["threads"]) for row in read_rows(options.out) if row["case"] == name}
        if not options.again and all((one, str(options.threads)) in held for one in names):
            print(f"{name}: in {options.out} already")
            continue
        write_rows(options.out, measure(CASES[name], tuple(names), options))
        write_markdown(options.out)


if __name__ == "__main__":
    main()
