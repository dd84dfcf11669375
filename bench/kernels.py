"""Times the language-model head of a DPO step, ours beside the others, with peak memory and error against fp64.

    python bench/kernels.py                                  # the model shapes below, this machine's best device
    python bench/kernels.py --shapes smollm2 --threads 2 --out bench/results/kernels_cpu

Writes OUT.csv and OUT.md. Variants run in turns within one process and medians are compared; `rate` counts the two
products that a frozen head needs (4 N D V) whatever a variant really does.
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

import torch
from kernel_rivals import BETA, Rival, rivals
from torch import Tensor

# name: (hidden size, vocabulary) of the head
SHAPES = {"smollm2": (576, 49153), "llava-7b": (4096, 32064), "llava-13b": (5120, 32064),
          "qwen2.5-vl-3b": (2048, 151936), "qwen2.5-vl-7b": (3584, 152064)}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Row:
    """One line of the table. Times in ms, memory in MB above what existed before, errors relative to fp64's largest."""

    shape: str
    rows: int
    variant: str
    forward_ms: float
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    times_bare: float
    peak_mb: float
    tflops: float
    of_matrix_rate: float
    loss_error: float
    gradient_error: float


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call, device work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors above the start while `run` runs."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    level = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def truth(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient of the hidden states in fp64, the vocabulary in pieces."""
    h, rows = hidden.detach().double().flatten(0, 1), target.flatten()
    pieces = range(0, weight.shape[0], 16384)
    z = torch.cat([h @ weight[a : a + 16384].double().t() for a in pieces], 1)
    logp_NV = z.log_softmax(1)
    chosen, rejected = logp_NV.gather(1, rows[:, None]).view(target.shape).sum(1).chunk(2)
    margin = BETA * (chosen - rejected)
    loss = -torch.nn.functional.logsigmoid(margin).mean()
    side = BETA * torch.sigmoid(-margin) / len(margin)
    grad_rows = torch.cat([-side, side])[:, None].expand(target.shape).flatten()
    p = logp_NV.exp_()
    expected = sum(p[:, a : a + 16384] @ weight[a : a + 16384].double() for a in pieces)
    return loss.item(), (grad_rows[:, None] * (weight[rows].double() - expected)).view(hidden.shape)


def bare_products(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """The two products that a frozen head cannot do without, into memory that exists already."""
    h = hidden.detach().flatten(0, 1)
    logits, out = h.new_empty(h.shape[0], weight.shape[0]), torch.empty_like(h)

    def run() -> None:
        torch.mm(h, weight.t(), out=logits)
        torch.mm(logits, weight, out=out)

    return run


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one large square product, best of five."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(timed(lambda: a @ b) for _ in range(5))


def copy_rate(device: torch.device) -> float:
    """Bytes/s read and written by one large copy, best of five."""
    a = torch.empty(1 << (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * a.numel() / min(timed(lambda: b.copy_(a)) for _ in range(5))


def measure(
    shape: str,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    variants: dict[str, Rival],
    rate: float,
) -> list[Row]:
    """All variants on one head, in turns."""
    d, v = SHAPES[shape]
    pairs = max(1, rows // 260)
    length = rows // (2 * pairs)
    torch.manual_seed(0)
    hidden = torch.randn(2 * pairs, length, d, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(v, d, device=device, dtype=torch.float32) * (3 / d**0.5)).to(dtype)
    target = torch.randint(0, v, (2 * pairs, length), device=device)
    rows = target.numel()
    true_loss, true_grad = truth(hidden, weight, target)

    def step(run: Rival) -> None:
        hidden.grad = None
        run(hidden, weight, target).backward()

    def forward(run: Rival) -> None:
        with torch.no_grad():
            run(hidden, weight, target)

    bare, bare_s = bare_products(hidden, weight), []
    forward_s: dict[str, list[float]] = {name: [] for name in variants}
    step_s: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        bare_s.append(timed(bare))
        for name, run in variants.items():
            forward_s[name].append(timed(lambda: forward(run)))  # noqa: B023
            step_s[name].append(timed(lambda: step(run)))  # noqa: B023
        if turn == 0:  # warm-up and compilation
            bare_s.clear()
            for times in (*forward_s.values(), *step_s.values()):
                times.clear()
    work, bare_ms = 4 * rows * d * v, statistics.median(bare_s) * 1e3
    out = [Row(shape, rows, "two bare products", 0.0, bare_ms, *_spread(bare_s), 1.0, 0.0, work / bare_ms / 1e9,
               work / bare_ms * 1e3 / rate, 0.0, 0.0)]  # fmt: skip
    del bare
    for name, run in variants.items():
        ms = statistics.median(step_s[name]) * 1e3
        hidden.grad = None
        peak = peak_bytes(lambda: step(run))  # noqa: B023
        loss_error = abs(run(hidden, weight, target).item() - true_loss) / abs(true_loss)
        assert hidden.grad is not None
        gradient_error = float((hidden.grad.double() - true_grad).abs().max() / true_grad.abs().max())
        out.append(Row(shape, rows, name, statistics.median(forward_s[name]) * 1e3, ms, *_spread(step_s[name]),
                       ms / bare_ms, peak / 1e6, work / ms / 1e9, work / ms * 1e3 / rate, loss_error, gradient_error))  # fmt: skip
    return out


def _spread(seconds: list[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0] * 1e3, seconds[0] * 1e3
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return fifths[0] * 1e3, fifths[3] * 1e3


def environment(device: torch.device, dtype: str, rate: float, bandwidth: float) -> str:
    versions = [f"torch {torch.__version__}"]
    for package in ("triton", "trl", "liger-kernel", "cut-cross-entropy"):
        loaded = package.replace("-", "_") in sys.modules
        versions.append(f"{package} {version(package) if loaded else 'not loaded'}")
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
        where = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    else:
        where = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return (
        f"{time.strftime('%Y-%m-%d')}, {where}, Python {platform.python_version()}, {', '.join(versions)}, {dtype}; "
        f"measured here: matrix products {rate / 1e12:.3f} TFLOP/s, copy {bandwidth / 1e9:.1f} GB/s"
    )


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(rows: list[Row], missing: dict[str, str], where: str, command: str) -> str:
    head = ["head", "rows", "variant", "forward ms", "forward + backward ms (p20..p80)", "x bare products", "peak MB",
            "TFLOP/s", "of matrix rate", "loss error", "gradient error"]  # fmt: skip
    lines = ["# Language-model head of a DPO step", "", f"`{command}`", "", where, ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r.shape, r.rows, r.variant, f"{r.forward_ms:.1f}" if r.forward_ms else "",
                 f"{r.step_ms:.1f} ({r.step_p20_ms:.1f}..{r.step_p80_ms:.1f})", f"{r.times_bare:.2f}",
                 f"{r.peak_mb:.1f}" if r.peak_mb else "", f"{r.tflops:.3f}", f"{r.of_matrix_rate:.0%}",
                 f"{r.loss_error:.1e}" if r.peak_mb else "", f"{r.gradient_error:.1e}" if r.peak_mb else ""]  # fmt: skip
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    lines += ["", *(f"Not run: {name} ({why})." for name, why in missing.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rows", type=int, help="predicting rows; default 2080 on CUDA, 290 on CPU")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bf16 on CUDA, fp32 on CPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out the variants that need torch.compile"
    )
    parser.add_argument("--out", type=Path, default=Path("kernels"), help="results go to OUT.csv and OUT.md")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    rate, bandwidth = matrix_rate(DTYPES[dtype], device), copy_rate(device)
    variants, missing = rivals(not options.no_compile)
    rows: list[Row] = []
    for shape in options.shapes:
        count = options.rows or (2080 if device.type == "cuda" else 290)
        rows += measure(shape, count, DTYPES[dtype], device, options.repeats, variants, rate)
    text = markdown(
        rows,
        missing,
        environment(device, dtype, rate, bandwidth),
        " ".join(["python", "bench/kernels.py", *sys.argv[1:]]),
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".md").write_text(text)
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    print(text)


if __name__ == "__main__":
    main()
