"""`final/`: the trained adapter in PEFT's format, or the whole model, with a model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fasttrain.files import atomic_folder, write_json
from fasttrain.model.no_videos import save_processor
from fasttrain.model.silence import dropout_as_loaded
from fasttrain.ranks import full_shape, ranks
from fasttrain.train.engine import TrainedState
from fasttrain.train.job import Job
from fasttrain.train.model_card import model_card
from fasttrain.train.tensor_file import TensorFile

PART_BYTES = 5 * 10**9  # of a file of weights, and what a rank holds of them at a time


def write_final(job: Job, optimizer: TrainedState, folder: Path) -> Path:
    """Write `final/` whole; adapters in fp32 master precision, a fully tuned model in the model's own dtype.

    Every rank calls, as weights may have to be gathered; the first writes.
    """
    target = folder / "final"
    weights = optimizer.weights().collect() if job.adapted is not None else {}
    parts = whole_parts(job.policy.model) if job.adapted is None else iter(())
    if not ranks().main:
        for _ in parts:  # take part in gathering
            pass
    else:
        with atomic_folder(target, reads=False) as temporary:
            if job.adapted is not None:
                masters = {name.removeprefix("model."): value for name, value in weights.items()}
                state = _adapter_state(job.adapted, masters)
                about = job.adapted.peft_config[
                    "default"
                ]  # a hub model was loaded from a folder of this machine
                about.base_model_name_or_path, about.revision = (
                    job.config.model.name,
                    job.config.model.revision,
                )
                embeddings = getattr(job.adapted, "replaces_embeddings", False)
                job.adapted.save_pretrained(temporary, state_dict=state, save_embedding_layers=embeddings)
            else:
                with dropout_as_loaded(job.policy.model):
                    _save_parts(job.policy.model, parts, temporary)
            save_processor(job.processor, job.model_folder, temporary)
            (temporary / "README.md").write_text(model_card(job, folder), encoding="utf-8")
    ranks().barrier()
    return target


def whole_parts(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """All weights of a model that ZeRO-3 has partitioned, some at a time, whole on the first rank; nothing if it has not."""
    named = dict(model.named_parameters())
    if not any(hasattr(parameter, "ds_shape") for parameter in named.values()):
        return
    import deepspeed

    part: dict[str, torch.Tensor] = {}
    held = 0
    for name, parameter in named.items():
        size = full_shape(parameter).numel() * parameter.element_size()
        if part and held + size > PART_BYTES:
            yield part
            part, held = {}, 0
        with deepspeed.zero.GatheredParameters([parameter]):
            if ranks().main:
                part[name] = parameter.detach().to("cpu", copy=True)
        held += size
    yield part | {
        name: value for name, value in model.state_dict().items() if name not in named and value.numel()
    }


def _save_parts(model: Any, parts: Iterator[dict[str, torch.Tensor]], folder: Path) -> None:
    """`save_pretrained` of a model whose weights come in parts: a file each, and an index over all of them."""
    files: list[Path] = []
    for part in parts:
        model.save_pretrained(folder, state_dict=part, max_shard_size=2 * PART_BYTES)
        files.append((folder / "model.safetensors").rename(folder / f"part-{len(files)}"))
    if not files:
        model.save_pretrained(folder)
    elif len(files) == 1:
        files[0].rename(folder / "model.safetensors")
    else:
        places: dict[str, str] = {}
        total = 0
        for number, file in enumerate(files, start=1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            with TensorFile(file.rename(folder / name)) as tensors:
                places |= dict.fromkeys(tensors, name)
            total += (folder / name).stat().st_size
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


def _adapter_state(adapted: Any, masters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapted model's state with trained parameters replaced by their masters, under peft's names."""
    state: dict[str, torch.Tensor] = adapted.state_dict()
    prefix = "base_model.model."
    for name, value in masters.items():
        if prefix + name not in state:
            raise KeyError(f"{prefix + name} is not in the adapted model's state")
        state[prefix + name] = value
    return state
