"""`final/`: the trained adapter in PEFT's format, or the whole model, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fasttrain.files import atomic_folder
from fasttrain.model.no_videos import save_processor
from fasttrain.ranks import ranks
from fasttrain.train.engine import TrainedState
from fasttrain.train.job import Job
from fasttrain.train.model_card import model_card


def write_final(job: Job, optimizer: TrainedState, folder: Path) -> Path:
    """Write `final/` whole; adapters in fp32 master precision, a fully tuned model in the model's own dtype.

    Every rank calls, as weights may have to be gathered; the first writes.
    """
    target = folder / "final"
    weights = optimizer.weights() if job.adapted is not None else whole_weights(job.policy.model)
    if ranks().main:
        with atomic_folder(target) as temporary:
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
                job.adapted.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)
            else:
                job.policy.model.save_pretrained(temporary, state_dict=weights or None)
            save_processor(job.processor, job.model_folder, temporary)
            (temporary / "README.md").write_text(model_card(job, folder), encoding="utf-8")
    ranks().barrier()
    return target


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """All weights of a model that ZeRO-3 has partitioned, in the first rank's main memory; empty if it has not."""
    named = dict(model.named_parameters())
    if not any(hasattr(parameter, "ds_shape") for parameter in named.values()):
        return {}
    import deepspeed

    state: dict[str, torch.Tensor] = dict(model.state_dict()) if ranks().main else {}
    for name, parameter in named.items():
        with deepspeed.zero.GatheredParameters([parameter]):
            if ranks().main:
                state[name] = parameter.detach().to("cpu", copy=True)
    return {
        name: value for name, value in state.items() if value.numel()
    }  # a tied weight's second name stays empty


def _adapter_state(adapted: Any, masters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapted model's state with trained parameters replaced by their masters, under peft's names."""
    state: dict[str, torch.Tensor] = adapted.state_dict()
    prefix = "base_model.model."
    for name, value in masters.items():
        if prefix + name not in state:
            raise KeyError(f"{prefix + name} is not in the adapted model's state")
        state[prefix + name] = value
    return state
