"""Start-up of `fasttrain dpo` on a pair file of many rows: seconds to the first step, resident memory.

    python bench/start_up.py 1000000                       # text: three rows a prompt, 600 to 1,500 bytes each
    python bench/start_up.py 1000000 --images 300          # over so many image files
    python bench/start_up.py 1000000 --keep /tmp/start     # the pair file stays, for the next time

The run takes one step of four pairs and ends. A first start finds an empty cache, a second one what the first left. Time counts
until the step's line stands in metrics.jsonl: by the clock, and of all its processes' processors. Memory is the most that the
processes held together, pages they share counted once, without the file's own pages; `bytes_a_row` is what that is more than
with a file of a thousand rows, by row. Pages of the pair file that are mapped are the page cache's, and are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PER_PROMPT = 3
_WORDS = ["the", "bar", "chart", "shows", "value", "of", "red", "green", "highest", "lowest", "question", "picture", "describe",
          "between", "percent", "larger", "than", "however", "increases", "visualization"]  # fmt: skip


def write_rows(folder: Path, count: int, images: int = 0) -> Path:
    """`count` rows in TRL's layout, about a kilobyte each, over `images` image files if there are any."""
    draw = random.Random(0)
    chunks = [" ".join(draw.choices(_WORDS, k=12)) for _ in range(5000)]
    folder.mkdir(parents=True, exist_ok=True)
    if images:
        _draw_images(folder / "images", images)
    prompts = -(-count // PER_PROMPT)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = number % prompts
            asked = [
                {
                    "type": "text",
                    "text": f"Question {prompt}: {chunks[prompt % 5000]} {chunks[prompt * 7 % 5000]}?",
                }
            ]
            row: dict[str, Any] = {"id": f"row-{number}"}
            if images:
                row["images"] = [f"images/{prompt % images}.png"]
            row["prompt"] = [{"role": "user", "content": [{"type": "image"}, *asked] if images else asked}]
            for field, end in (("chosen", f" {number}."), ("rejected", ".")):
                text = " ".join(draw.choices(chunks, k=draw.randint(1, 6))) + end
                row[field] = [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
            file.write(json.dumps(row) + "\n")
    return folder / "pairs.jsonl"


def _draw_images(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = random.Random(number).randbytes(64 * 64 * 3)
        Image.frombytes("RGB", (64, 64), pixels).save(folder / f"{number}.png")


def start(model: Path, pairs: Path, folder: Path) -> dict[str, float]:
    """One start with the cache in `folder`: wall_s, cpu_s, peak_mb."""
    raw = {
        "model": {"name": str(model.resolve())},
        "lora": {"rank": 8, "alpha": 16},
        "data": {"train": str(pairs.resolve())},
        "train": {"output": str(folder / "run"), "max_steps": 1, "pairs_per_step": 4},
        "track": [],
    }
    (folder / "recipe.json").write_text(json.dumps(raw))  # JSON is YAML
    shutil.rmtree(folder / "run", ignore_errors=True)
    environment = os.environ | {"FASTTRAIN_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fasttrain", "dpo", "-c", str(folder / "recipe.json")]
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    line, peak, looked, found = folder / "run" / "metrics.jsonl", 0.0, 0.0, {}
    while process.poll() is None:
        time.sleep(0.05)
        tree = _tree(process.pid)
        if time.perf_counter() > looked + 0.3:  # asking costs the processes time
            looked = time.perf_counter()
            peak = max(peak, sum(map(_resident_mb, tree)))
        if not found and line.exists() and line.stat().st_size:
            found = {"wall_s": time.perf_counter() - begin, "cpu_s": sum(map(_cpu_s, tree))}
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return found | {"peak_mb": peak}


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(each for child in children for each in _tree(int(child)))]


def _cpu_s(pid: int) -> float:
    """Of the process and the children it has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _resident_mb(pid: int) -> float:
    """Anonymous memory, shared pages divided among those that share them."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss_Anon:")) / 1024


def measure(model: Path, count: int, images: int = 0, keep: Path | None = None) -> dict[str, Any]:
    """First and second start over `count` rows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = (keep or folder) / f"rows-{count}-{images}"
        pairs = rows / "pairs.jsonl"
        if not pairs.exists():
            write_rows(rows, count, images)
        first, second = (start(model, pairs, folder) for _ in range(2))
    return {f"first_{key}": value for key, value in first.items()} | {
        f"second_{key}": value for key, value in second.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=int)
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--models", type=Path, default=HERE.parent / "models")
    options = parser.parse_args()
    model = options.models / ("smollm2-llava" if options.images else "smollm2")
    few = measure(model, 1000, min(options.images, 300), options.keep)
    many = measure(model, options.rows, options.images, options.keep)
    for count, found in ((1000, few), (options.rows, many)):
        print(f"{count:,} rows: " + ", ".join(f"{key} {value:.1f}" for key, value in found.items()))
    for turn in ("first", "second"):
        more = (many[f"{turn}_peak_mb"] - few[f"{turn}_peak_mb"]) * 2**20 / max(1, options.rows - 1000)
        print(f"{turn} start: {more:.0f} bytes_a_row")


if __name__ == "__main__":
    main()
