"""From pairs in Python to an aligned adapter and a page about it, on the demo's tiny model, in seconds on a CPU.

    python examples/first_run.py FOLDER

Replace the model by yours, and the pairs by rows of your own: `image` (or `images`, or neither), `prompt`, `chosen`, `rejected`.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from fasttrain import train_dpo
from fasttrain.config import config_from_dict
from fasttrain.demo.charts import examples
from fasttrain.demo.run import MODEL
from fasttrain.report import read_run, write_report


def write_pairs(folder: Path, count: int = 48) -> Path:
    """Charts with a question each: the right answer is chosen, a wrong one rejected."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, example in enumerate(itertools.islice(examples(seed=3, split="train"), count)):
        image = Path("images") / f"{number}.png"
        example.chart.image().save(folder / image)
        asked = example.question
        rows.append(
            {"image": str(image), "prompt": asked.text, "chosen": asked.answer, "rejected": asked.wrong[0]}
        )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main(folder: Path) -> None:
    recipe = {
        "model": {"name": str(MODEL)},
        "data": {"train": str(write_pairs(folder / "data")), "workers": 0},
        "loss": {"beta": 2.0},
        "train": {"output": str(folder / "run"), "pairs_per_step": 16, "epochs": 2, "learning_rate": 3e-4},
        "track": [],
    }
    result = train_dpo(config_from_dict(recipe), overwrite=True)
    first, last = result.metrics[0], result.metrics[-1]
    print(
        f"loss {first['loss']:.3f} -> {last['loss']:.3f} in {last['step']} steps; adapter: {result.adapter}"
    )
    print(f"page: {write_report([read_run(result.folder)], result.folder)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
