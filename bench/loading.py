"""Memory of each rank while a model is loaded: whole on every rank, or in parts under ZeRO-3.

    torchrun --nproc_per_node=2 bench/loading.py -c recipe.yaml -s distributed.zero_stage=3

Anonymous memory is what a process has for itself; pages of the model's files that are mapped can be dropped and are shared.
"""

from __future__ import annotations

import threading
from pathlib import Path

import click

from fasttrain.config import load_config
from fasttrain.devices import pick_device, pick_dtype
from fasttrain.model.folder import find_folder
from fasttrain.model.load import load_model, load_model_config
from fasttrain.ranks import leave_ranks, ranks
from fasttrain.train.engine import join_ranks, partitioned_loading


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


class Sampled:
    """The most anonymous bytes while the block ran, and those at its end, above what there was before."""

    def __enter__(self) -> Sampled:
        self.before = self.most = anonymous_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.peak, self.kept = self.most - self.before, anonymous_bytes() - self.before


@click.command()
@click.option("-c", "recipe", required=True)
@click.option("-s", "overrides", multiple=True)
def main(recipe: str, overrides: tuple[str, ...]) -> None:
    config = load_config(recipe, list(overrides))
    join_ranks(config)
    folder, device = find_folder(config.model), pick_device()
    model_config = load_model_config(folder, config.model)
    zero3 = config.distributed.zero_stage == 3
    partition = partitioned_loading(config, pick_dtype(config.model.dtype, device)) if zero3 else None
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with Sampled() as memory:
        model = load_model(folder, config.model, model_config, device, zero3=zero3)
    del partition
    held = sum(parameter.numel() for parameter in model.parameters())
    for rank, (peak, kept, whole) in enumerate(ranks().gather([memory.peak, memory.kept, held])):
        if ranks().main:
            click.echo(
                f"rank {rank}: files {files / 1e6:,.0f} MB; anonymous memory at most {peak / 1e6:,.0f} MB, "
                f"{kept / 1e6:,.0f} MB at the end; {whole:,} elements whole"
            )
    leave_ranks()


if __name__ == "__main__":
    main()
