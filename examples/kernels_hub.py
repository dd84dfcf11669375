"""The package as Hugging Face `kernels` load it: staged as a Hub kernel, loaded under a name of its own.

    python examples/kernels_hub.py [FOLDER]        # default build/hub

Needs no network. What is written is what a Hub repository of a pure Triton kernel holds for one backend.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

SOURCE = Path(__file__).resolve().parent.parent / "kernels" / "fasttrain_kernels"


def stage(folder: Path, backend: str = "cpu") -> Path:
    """Write build/torch-BACKEND with the package and its metadata; returns the repository's folder."""
    variant = folder / "build" / f"torch-{backend}"
    shutil.rmtree(variant, ignore_errors=True)
    shutil.copytree(SOURCE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    digests = {
        str(file.relative_to(variant)): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in sorted(variant.rglob("*"))
        if file.is_file()
    }
    identity = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]
    metadata = {
        "name": "fasttrain-kernels", "id": f"_fasttrain_kernels_{backend}_{identity}", "version": 0,
        "license": "Apache-2.0", "python-depends": [], "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2))
    return folder


def load(folder: Path, backend: str = "cpu") -> ModuleType:
    """The staged package, loaded by `kernels.get_local_kernel`."""
    from kernels import get_local_kernel

    return get_local_kernel(folder, backend=backend)


def main() -> None:
    import torch

    package = load(stage(Path(sys.argv[1] if len(sys.argv) > 1 else "build/hub")))
    hidden, weight = torch.randn(3, 16), torch.randn(100, 16)
    print(package.__name__, package.linear_logprob(hidden, weight, torch.tensor([1, 2, 99])).logprob)


if __name__ == "__main__":
    main()
