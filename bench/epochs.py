"""Times whole runs, start-up to adapter: `fasttrain dpo` with cold caches and TRL's DPOTrainer over the same pairs and epochs.

    python bench/models.py smollm2-llava -o models/smollm2-llava       # once
    python bench/epochs.py --pairs 64 --threads 2                      # writes bench/results/epochs_DATE.md

Every pair has a photograph-sized image of its own, a question of 40 tokens and answers of 60 to 200. Each trainer is a process
of its own and does all of its work in it: imports, loading, tokenizing, decoding, reference log-probs, steps, saving. Both start
from one adapter and take the rows in order, so their losses must agree step by step; the script stops if they do not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from step import HERE, SAME_LOSS, environment
from step_cases import BETA, Case, recipe, write_case, write_model

from fasttrain.command import TUNABLES

PAIRS_PER_STEP, RANK, LEARNING_RATE = 8, 16, 1e-4


def write_fresh_adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter as peft makes it, B zero, so that the reference is the base model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    from fasttrain.model.lora import auto_targets

    torch.manual_seed(3)
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=auto_targets(base), task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    return folder / "adapter"


def fasttrain_command(folder: Path, epochs: int) -> list[str]:
    """What a user runs, on a recipe that leaves to the program what it may choose."""
    raw = recipe(folder / "model", folder / "pairs.jsonl", folder, RANK, PAIRS_PER_STEP)
    raw["lora"] = {"init_from": str(folder / "adapter")}
    for section, name in (
        ("data", "workers"),
        ("train", "tokens_per_pack"),
        ("train", "gradient_checkpointing"),
    ):
        raw[section].pop(name)
    raw["train"] |= {
        "epochs": epochs,
        "learning_rate": LEARNING_RATE,
        "schedule": "constant",
        "warmup_ratio": 0.0,
    }
    (folder / "recipe.json").write_text(json.dumps(raw))  # JSON is YAML
    return [sys.executable, "-m", "fasttrain", "dpo", "-c", str(folder / "recipe.json")]


def trl_command(folder: Path, epochs: int) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--trl", str(folder), "--epochs", str(epochs)]


def run_trl(folder: Path, epochs: int) -> list[float]:
    """DPOTrainer with its best legal settings here: as in step_contenders.Trl."""
    import torch
    from peft import PeftModel
    from step_contenders import _dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig, DPOTrainer

    base = AutoModelForImageTextToText.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    args = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=1, gradient_accumulation_steps=PAIRS_PER_STEP,
        num_train_epochs=epochs, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_length=None, bf16=False,
        gradient_checkpointing=False, use_cpu=True, train_sampling_strategy="sequential", logging_steps=1, beta=BETA,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True), args=args,
        train_dataset=_dataset(folder / "pairs.jsonl"),
        processing_class=AutoProcessor.from_pretrained(folder / "model"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / "trl" / "final"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


COMMANDS = {"fasttrain": fasttrain_command, "trl": trl_command}


def _losses(name: str, folder: Path) -> list[float]:
    if name == "trl":
        found: list[float] = json.loads((folder / "trl.json").read_text())
        return found
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One trainer's whole run in a process: seconds by the clock and of the processor, peak memory, losses."""
    command = COMMANDS[name](folder, options.epochs)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "THP_MEM_ALLOC_ENABLE": "1",
        "GLIBC_TUNABLES": TUNABLES, "TOKENIZERS_PARALLELISM": "false", "FASTTRAIN_CACHE": str(folder / "cache"),
    }  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(f"{name} failed: {os.waitstatus_to_exitcode(status)}")
    print(
        f"{name}: {wall:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of processor, {used.ru_maxrss / 1e3:.0f} MB",
        flush=True,
    )
    return {
        "wall_s": wall,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss * 1024 / 1e6,
        "losses": _losses(name, folder),
    }


def compare(options: argparse.Namespace) -> str:
    """Both runs on one set of pairs, and the page that tells of them."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_model(options.models / "smollm2-llava", folder / "model")
        answers = [[rng.randrange(60, 201), rng.randrange(60, 201)] for _ in range(options.pairs)]
        write_case(Case("epochs", "smollm2-llava", answers), model, folder)
        write_fresh_adapter(model, folder)
        found = {name: measure(name, folder, options) for name in COMMANDS}
    ours, theirs = (found[name]["losses"] for name in COMMANDS)
    if len(ours) != len(theirs):
        raise SystemExit(f"the trainers took different steps: {len(ours)} and {len(theirs)}")
    apart = max(abs(a - b) / max(a, b) for a, b in zip(ours, theirs))
    if apart > options.same:
        print(_page(found, options, apart))  # what took this long to measure is shown even so
        raise SystemExit(f"the trainers compute different losses: {ours} and {theirs}")
    return _page(found, options, apart)


def _page(found: dict[str, dict[str, Any]], options: argparse.Namespace, apart: float) -> str:
    steps = len(found["trl"]["losses"])
    lines = [
        f"# Whole runs, {datetime.date.today()}",
        "",
        *(f"{key}: {value}  " for key, value in environment().items()),
        "",
    ]
    lines += [
        f"`python bench/epochs.py --pairs {options.pairs} --epochs {options.epochs} --threads {options.threads}`: {steps} steps of "
        f"{PAIRS_PER_STEP} pairs, start-up to saved adapter, caches cold; losses differ by at most {apart:.1g} of themselves at any step.",
        "", "| trainer | s | processor s | peak MB | first loss | last loss | times fasttrain |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, one in found.items():
        ratio = one["wall_s"] / found["fasttrain"]["wall_s"]
        lines.append(f"| {name} | {one['wall_s']:.1f} | {one['cpu_s']:.1f} | {one['peak_mb']:.0f} | {one['losses'][0]:.6f} | "
                     f"{one['losses'][-1]:.6f} | {ratio:.2f} |")  # fmt: skip
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--same", type=float, default=2 * SAME_LOSS, help="relative difference of losses allowed"
    )
    parser.add_argument("--models", type=Path, default=HERE.parent / "models")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"epochs_{datetime.date.today()}.md")
    parser.add_argument("--trl", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.append(
        sys.path.pop(0)
    )  # transformers looks for a package called kernels, which is a script here
    if options.trl:
        losses = run_trl(options.trl, options.epochs)
        (options.trl / "trl.json").write_text(json.dumps(losses))
        return
    page = compare(options)
    options.out.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
