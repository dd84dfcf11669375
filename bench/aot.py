"""Compile every Triton kernel for sm_80, sm_90 and sm_100 without a GPU, and read what the compiler made of it.

    python bench/aot.py                     # compile, check, print the tables
    python bench/aot.py --out bench/results/kernels_aot.md
    python bench/aot.py --arch 90 --only fold

Exit code 1 if a kernel spills, needs more shared memory than the chip has, or lacks the wide loads or matrix
instructions it should have.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Triton 3.9 warns when this is left open; 1 is what it does by default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from aot_cases import HIDDEN, PAIRS, ROWS, TOKENS, VOCABULARY, Case, cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
# Per multiprocessor: shared memory a block may take, shared memory, registers, warps, blocks (CUDA programming guide).
CHIPS = {80: (163 << 10, 164 << 10, 65536, 64, 32), 90: (227 << 10, 228 << 10, 65536, 64, 32),
         100: (227 << 10, 228 << 10, 65536, 64, 32)}  # fmt: skip
# Data sheets: HBM bytes/s and dense bf16 FLOP/s.
SHEETS = {"A100 80 GB SXM": (2.039e12, 312e12), "H100 80 GB SXM": (3.35e12, 989e12)}


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of one case for one architecture."""

    case: Case
    arch: int
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    matrix: int
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int

    @property
    def occupancy(self) -> float:
        """Resident warps over the most a multiprocessor can hold, limited by registers, shared memory and blocks."""
        _, shared, registers, warps, blocks = CHIPS[self.arch]
        per_warp = -(-self.registers * 32 // 256) * 256
        fit = [blocks, warps // self.case.warps, registers // (per_warp * self.case.warps)]
        if self.shared_bytes:
            fit.append(shared // (self.shared_bytes + 1024))
        return min(fit) * self.case.warps / warps

    def faults(self) -> list[str]:
        """What must not be: one line each."""
        out = []
        if self.spills or self.stack_bytes:
            out.append(f"spills: {self.spills} instructions, {self.stack_bytes} bytes of stack")
        if self.shared_bytes > CHIPS[self.arch][0]:
            out.append(f"{self.shared_bytes} bytes of shared memory, a block may take {CHIPS[self.arch][0]}")
        if self.case.matrix and not self.matrix:
            out.append("no matrix instruction where one is due")
        if self.case.wide_loads and not self.wide_loads:
            out.append("no 16-byte load")
        return [f"{self.case.name} sm_{self.arch}: {fault}" for fault in out]


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _dump(cubin: Path, option: str) -> str:
    return subprocess.run(
        [_tool("cuobjdump"), option, cubin], check=True, capture_output=True, text=True
    ).stdout


def build(case: Case, arch: int) -> Compiled:
    """Compile one case for one architecture and count its instructions."""
    source = ASTSource(case.kernel, case.signature, constexprs=case.constants, attrs=case.attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": case.warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage, sass = _dump(cubin, "-res-usage"), _dump(cubin, "-sass")
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    return Compiled(
        case, arch, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], count(r"\b(?:LDL|STL)\b"),
        made.metadata.shared, count(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b"), count(r"\bLDG\.E[\w.]*\.128\b"),
        count(r"\bLDG\.E"), count(r"\bSTG\.E[\w.]*\.128\b"), count(r"\bSTG\.E"),
    )  # fmt: skip


def compile_table(results: list[Compiled]) -> str:
    head = ["kernel", "arch", "warps", "registers", "spilled bytes", "shared bytes", "occupancy", "matrix instr.",
            "16-byte loads / loads", "16-byte stores / stores"]  # fmt: skip
    rows = [[r.case.name, f"sm_{r.arch}", r.case.warps, r.registers, r.stack_bytes, r.shared_bytes,
             f"{r.occupancy:.0%}", r.matrix, f"{r.wide_loads} / {r.loads}", f"{r.wide_stores} / {r.stores}"]
            for r in results]  # fmt: skip
    return _markdown(head, rows)


def traffic_table(selected: list[Case]) -> str:
    """Bytes each kernel moves in a step and the least time that takes; the products beside them."""
    head = ["part", "MB read", "MB written", "GFLOP", *(f"{name}, us at least" for name in SHEETS)]
    flop = 2 * ROWS * HIDDEN * VOCABULARY
    product = (ROWS * HIDDEN + VOCABULARY * HIDDEN) * 2
    parts = [("first product (cuBLAS)", product, ROWS * VOCABULARY * 4, flop),
             ("second product (cuBLAS)", (ROWS + HIDDEN) * VOCABULARY * 2, ROWS * HIDDEN * 4, flop)]  # fmt: skip
    parts += [(case.name, case.read_bytes, case.written_bytes, 0) for case in selected]
    rows = []
    for name, read, written, work in parts:
        least = [max((read + written) / bandwidth, work / rate) * 1e6 for bandwidth, rate in SHEETS.values()]
        rows.append(
            [
                name,
                f"{read / 1e6:.2f}",
                f"{written / 1e6:.2f}",
                f"{work / 1e9:.0f}",
                *(f"{t:.1f}" for t in least),
            ]
        )
    return _markdown(head, rows)


def _markdown(head: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def report(results: list[Compiled]) -> str:
    seen = {r.case.name: r.case for r in results}
    return f"""# Kernels compiled ahead of time

Made by `python bench/aot.py --out bench/results/kernels_aot.md`, Triton {triton.__version__}, its own ptxas, no GPU. bf16 inputs, LLaVA-1.5-13B:
{ROWS} rows, hidden size {HIDDEN}, vocabulary {VOCABULARY}, {PAIRS} pairs; norm, SwiGLU and rotary positions of {TOKENS} tokens in one layer. Occupancy is computed from registers, shared memory and warps.
Matrix products are cuBLAS calls, so none of these kernels is due a matrix instruction.

{compile_table(results)}

## What they move in one step, those of a layer in one call

Bytes if nothing stayed in a cache (a 32 MiB tile of logits does stay in the L2 of these chips), against the data sheets'
bandwidth and dense bf16 rate: computed, not measured.

{traffic_table(list(seen.values()))}
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="compile the kernels whose name contains this")
    parser.add_argument("--out", type=Path, help="write the report to this Markdown file")
    options = parser.parse_args()
    results = [build(c, arch) for c in cases() if options.only in c.name for arch in options.arch]
    text = report(results)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print(text)
    faults = [fault for result in results for fault in result.faults()]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
