"""What one GPU can do, from its maker's data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from fasttrain.errors import UserError, did_you_mean

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Data-sheet values. `matrix_flops` is dense bf16 with fp32 accumulation, `link_bytes_per_s` one direction to its neighbours."""

    name: str
    matrix_flops: float
    memory_bytes: int
    memory_bytes_per_s: float
    link: str
    link_bytes_per_s: float
    source: str


_A100 = "NVIDIA A100 Tensor Core GPU data sheet (SXM): BF16 312 TFLOPS dense, NVLink 600 GB/s both directions together"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet (SXM): BF16 1,979 TFLOPS with sparsity, half of it dense, NVLink 900 GB/s"
_GIB = 2**30  # data sheets call a GiB of GPU memory a GB

GPUS = {
    "a100-40g": Gpu(
        name="A100 40GB SXM", matrix_flops=312e12, memory_bytes=40 * _GIB, memory_bytes_per_s=1555e9, link="NVLink",
        link_bytes_per_s=300e9, source=f"{_A100}; 40 GB, 1,555 GB/s",
    ),
    "a100-80g": Gpu(
        name="A100 80GB SXM", matrix_flops=312e12, memory_bytes=80 * _GIB, memory_bytes_per_s=2039e9, link="NVLink",
        link_bytes_per_s=300e9, source=f"{_A100}; 80 GB, 2,039 GB/s",
    ),
    "h100": Gpu(
        name="H100 80GB SXM", matrix_flops=989.5e12, memory_bytes=80 * _GIB, memory_bytes_per_s=3350e9, link="NVLink",
        link_bytes_per_s=450e9, source=f"{_H100}; 80 GB, 3.35 TB/s",
    ),
    "h200": Gpu(
        name="H200 141GB SXM", matrix_flops=989.5e12, memory_bytes=141 * _GIB, memory_bytes_per_s=4800e9, link="NVLink",
        link_bytes_per_s=450e9,
        source="NVIDIA H200 Tensor Core GPU data sheet (SXM): BF16 1,979 TFLOPS with sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s",
    ),
    "b200": Gpu(
        name="B200 180GB SXM", matrix_flops=2250e12, memory_bytes=180 * _GIB, memory_bytes_per_s=7700e9, link="NVLink",
        link_bytes_per_s=900e9,
        source="NVIDIA Blackwell (HGX B200) data sheet: BF16 4.5 PFLOPS with sparsity per GPU, 180 GB, 7.7 TB/s, NVLink 1.8 TB/s",
    ),
    "l40s": Gpu(
        name="L40S 48GB", matrix_flops=362.05e12, memory_bytes=45 * _GIB, memory_bytes_per_s=864e9, link="PCIe 4.0 x16",
        link_bytes_per_s=32e9,
        source="NVIDIA L40S data sheet: BF16 362.05 TFLOPS dense, 48 GB with ECC (45 GiB left), 864 GB/s, PCIe 64 GB/s both ways",
    ),
    "rtx4090": Gpu(
        name="RTX 4090 24GB", matrix_flops=165.2e12, memory_bytes=24 * _GIB, memory_bytes_per_s=1008e9, link="PCIe 4.0 x16",
        link_bytes_per_s=32e9,
        source="NVIDIA Ada GPU Architecture white paper: BF16 165.2 TFLOPS dense with FP32 accumulate, 24 GB, 1,008 GB/s, PCIe 4.0 x16",
    ),
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """The GPU of that name; UserError lists the names there are."""
    key = name.lower().replace("_", "-").replace(" ", "-")
    key = {
        "a100": "a100-80g",
        "a100-80gb": "a100-80g",
        "a100-40gb": "a100-40g",
        "4090": "rtx4090",
        "rtx-4090": "rtx4090",
    }.get(key, key)
    if key not in GPUS:
        raise UserError(
            f"--gpu: wanted one of {', '.join(GPUS)}, got {name!r}" + did_you_mean(key, list(GPUS))
        )
    return GPUS[key]


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """Shares of the data-sheet rates that a run is assumed to reach, and of the memory that tensors may take."""

    matrix: float = 0.5
    memory_rate: float = 0.7
    link: float = 0.7
    memory: float = 0.92  # the rest: CUDA context, NCCL buffers, the allocator's gaps
