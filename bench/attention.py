"""Times attention over a prompt and its completions: shared, as one dense-masked pack, and as ordinary causal sequences.

    python bench/attention.py                                # this machine's best device, every backend that can run
    python bench/attention.py --heads smollm2 --threads 2 --repeats 5 --out bench/results/attention_cpu

Writes OUT.csv and OUT.md. One group a pack; completions of 130 tokens, the length of the paper's answers. Variants run in
turns within one process; a step is a forward and a backward pass. `of dense` and `of unshared` are the time of the step over
the time of those two. `TFLOP/s` counts 14 operations a visible pair, head and head size, whatever a variant really does.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain_kernels import (
    ATTENTION_BACKENDS,
    AttentionCase,
    SharedPrefixLayout,
    shared_prefix_attention,
    shared_prefix_attention_ref,
    why_not_attention,
)

# name: (heads, heads of keys and values, head size)
HEADS = {
    "smollm2": (9, 3, 64),
    "llava-7b": (32, 32, 128),
    "llava-13b": (40, 40, 128),
    "qwen2.5-vl-7b": (28, 4, 128),
}
PROMPTS = (626, 2048)
COMPLETIONS = (1, 2, 4, 8)
ANSWER = 130
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Row:
    """One line of the tables. Times in ms, the error of the output relative to fp64's largest."""

    heads: str
    prompt: int
    completions: int
    variant: str
    tokens: int
    visible_pairs: int
    forward_ms: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    tflops: float
    of_dense: float
    of_unshared: float
    error: float


def variants(
    layout: SharedPrefixLayout, device: torch.device, dtype: torch.dtype, size: int
) -> dict[str, Run]:
    """The ways of attention over one pack; "unshared" takes `sequences` of q, k and v, the others take the pack's."""
    runs: dict[str, Run] = {}
    for name in ATTENTION_BACKENDS:
        # on CUDA the sdpa backend is dense attention
        if why_not_attention(name, AttentionCase(device, dtype, size)) is None and (name, device.type) != (
            "sdpa",
            "cuda",
        ):
            runs[f"shared, {name}"] = lambda q, k, v, name=name: shared_prefix_attention(
                q, k, v, layout, backend=name
            )
    mask = layout.dense_mask(device)
    runs["dense mask"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    runs["unshared"] = lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    return runs


def sequences(x: Tensor, layout: SharedPrefixLayout) -> Tensor:
    """(1, H, T, K) as (completions, H, prompt + completion, K): every completion with a copy of the prompt."""
    return torch.cat(
        [
            torch.cat([x[:, :, start : start + prompt], x[:, :, own : own + length]], 2)
            for start, prompt, own, length in layout.completions()
        ]
    )


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of one call, device work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def draw(
    layout: SharedPrefixLayout, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(layout.tokens)
    h, kv, size = heads
    made = (torch.randn(1, layout.tokens, n, size, generator=generator) for n in (h, kv, kv, h))
    return [x.to(device, dtype).transpose(1, 2) for x in made]


def measure(
    name: str, prompt: int, completions: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> list[Row]:
    """All variants of one shape, in turns."""
    h, _, size = HEADS[name]
    layout = SharedPrefixLayout.from_groups([(prompt, [ANSWER] * completions)])
    q, k, v, grad = draw(layout, HEADS[name], device, dtype)
    truth = shared_prefix_attention_ref(*(x.float().double() for x in (q, k, v)), layout)
    runs = variants(layout, device, dtype, size)
    inputs = {variant: tuple(x.detach().requires_grad_() for x in (q, k, v)) for variant in runs}
    inputs["unshared"] = tuple(sequences(x, layout).detach().requires_grad_() for x in (q, k, v))
    grads = dict.fromkeys(runs, grad) | {"unshared": sequences(grad, layout)}

    def forward(variant: str) -> Tensor:
        with torch.no_grad():
            return runs[variant](*inputs[variant])

    def step(variant: str) -> None:
        runs[variant](*inputs[variant]).backward(grads[variant])
        for x in inputs[variant]:
            x.grad = None

    errors = {}
    for variant in runs:
        want = sequences(truth, layout) if variant == "unshared" else truth
        errors[variant] = float((forward(variant).double() - want).abs().max() / truth.abs().max())
        step(variant)
    forwards: dict[str, list[float]] = {variant: [] for variant in runs}
    steps: dict[str, list[float]] = {variant: [] for variant in runs}
    for _ in range(repeats):
        for variant in runs:
            forwards[variant].append(timed(lambda: forward(variant)))  # noqa: B023
            steps[variant].append(timed(lambda: step(variant)))  # noqa: B023
    middle = {variant: statistics.median(times) for variant, times in steps.items()}
    pairs = int(layout.dense_mask().sum())
    rows = []
    for variant, times in steps.items():
        low, high = np.quantile(times, (0.2, 0.8)).tolist()
        rows.append(
            Row(
                name,
                prompt,
                completions,
                variant,
                layout.tokens,
                pairs,
                statistics.median(forwards[variant]),
                middle[variant],
                low,
                high,
                14 * pairs * h * size / middle[variant] / 1e9,
                middle[variant] / middle["dense mask"],
                middle[variant] / middle["unshared"],
                errors[variant],
            )
        )
    return rows


def environment(device: torch.device, dtype: str) -> str:
    """One paragraph: when, where, with what."""
    packages = ["torch", *(["triton"] if device.type == "cuda" else [])]
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        where = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]
    else:
        cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")), platform.processor())  # fmt: skip
        where = f"{cpu}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{time.strftime('%Y-%m-%d')}, {where}, Python {platform.python_version()}, {versions}, {dtype}."


def report(rows: list[Row], facts: str, command: str) -> str:
    """The Markdown page."""
    lines = ["# Attention over shared prompts", "", f"Made by `{command}`. {facts}", "",
             f"One prompt with its completions of {ANSWER} tokens. Median of a forward and backward pass, 20th and 80th percentile in",
             "brackets; the copies of prompts that the unshared batch needs are made outside its time. Error: largest difference of the",
             "output from fp64's, over fp64's largest value. TFLOP/s counts visible pairs only.", "",
             "| heads | prompt | completions | variant | forward ms | step ms | of dense | of unshared | TFLOP/s | error |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in rows:
        lines.append(
            f"| {r.heads} | {r.prompt} | {r.completions} | {r.variant} | {r.forward_ms:.2f} | {r.step_ms:.2f} "
            f"({r.step_p20_ms:.2f}, {r.step_p80_ms:.2f}) | {r.of_dense:.2f} | {r.of_unshared:.2f} | {r.tflops:.3f} | {r.error:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", choices=HEADS, nargs="+", default=["smollm2"])
    parser.add_argument("--prompts", type=int, nargs="+", default=list(PROMPTS))
    parser.add_argument("--completions", type=int, nargs="+", default=list(COMPLETIONS))
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on CUDA, fp32 on CPU")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, help="write OUT.csv and OUT.md; default: print only")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    rows = [
        row
        for name in options.heads
        for prompt in options.prompts
        for completions in options.completions
        for row in measure(name, prompt, completions, device, DTYPES[dtype], options.repeats)
    ]
    page = report(rows, environment(device, dtype), " ".join(["python", "bench/attention.py", *sys.argv[1:]]))
    print(page)
    if options.out:
        options.out.with_suffix(".md").write_text(page)
        with options.out.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
