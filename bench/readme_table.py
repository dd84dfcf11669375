"""Writes the README's performance table from the newest results of step.py: `python bench/readme_table.py`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- steps: made by bench/readme_table.py -->", "<!-- end of steps -->"

ABOUT = {
    "vlm-60": "image, 1:1, answers of 60 tokens",
    "vlm-130": "image, 1:1, answers of 130 tokens",
    "vlm-300": "image, 1:1, answers of 300 tokens",
    "vlm-4x3": "image, four answers, three pairs",
    "vlm-4q": "image, four questions, 1:1, 130 tokens",
    "text-512": "text, prompt 512, answers of 128",
}


def newest_results(folder: Path) -> Path | None:
    """The results file with the latest date in its name; None before the first run."""
    return max(folder.glob("step_*.csv"), default=None)


def table(path: Path) -> str:
    """Markdown: per case the seconds of a step by the clock, and how many times more the others take."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    threads = max(int(row["threads"]) for row in rows)
    rows = [row for row in rows if int(row["threads"]) == threads]
    return "\n".join(_lines(rows, path, threads))


def _lines(rows: list[dict[str, str]], path: Path, threads: int) -> Iterator[str]:
    count = min(int(row["turns"]) for row in rows)
    turns = f"medians of {count} turns" if count > 1 else "one turn"
    yield (
        f"SmolLM2-135M, fp32 on CPU, {threads} thread{'s' if threads > 1 else ''}, LoRA rank 16, {turns} on the same pairs "
        f"with equal losses ([{path.stem}](bench/results/{path.stem}.md); how: [docs/performance.md](docs/performance.md)):"
    )
    yield ""
    yield "| case | fasttrain, s a step | of the matrix rate | plain loop | TRL 1.16 | operations: plain, TRL | peak memory, of TRL's |"
    yield "|---|---|---|---|---|---|---|"
    for case, about in ABOUT.items():
        mine = {row["contender"]: row for row in rows if row["case"] == case}
        if not {"fasttrain", "plain", "trl"} <= mine.keys():
            continue
        ours, plain = mine["fasttrain"], mine["plain"]
        # a pair at a time or all in one batch, whichever is quicker
        trl = min((mine[name] for name in ("trl", "trl-batched") if name in mine), key=_seconds)
        yield (
            f"| {about} | {float(ours['wall_s']):.2f} | {float(ours['of_rate']):.0%} | {_times(plain, ours, 'wall_s')} | "
            f"{_times(trl, ours, 'wall_s')} | "
            f"{_times(plain, ours, 'gflop')}, {_times(trl, ours, 'gflop')} | {float(ours['rss_mb']) / float(trl['rss_mb']):.2f} |"
        )


def _seconds(row: dict[str, str]) -> float:
    return float(row["wall_s"])


def _times(row: dict[str, str], ours: dict[str, str], column: str) -> str:
    return f"{float(row[column]) / float(ours[column]):.1f} x"


def with_table(readme: str, made: str) -> str:
    """The README with the table between its two marks, before the section on use if there are none yet."""
    if BEGIN not in readme:
        readme = readme.replace("## Use it", f"{BEGIN}\n{END}\n\n## Use it", 1)
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    path = newest_results(ROOT / "bench" / "results")
    if path is None:
        raise SystemExit("no bench/results/step_*.csv: run bench/step.py first")
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), table(path)), encoding="utf-8")


if __name__ == "__main__":
    main()
