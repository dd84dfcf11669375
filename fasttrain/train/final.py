"""`final/`: the trained adapter in PEFT's format, or the whole model, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fasttrain.files import atomic_folder
from fasttrain.model.no_videos import save_processor
from fasttrain.train.job import Job
from fasttrain.train.model_card import model_card
from fasttrain.train.optimizer import MasterOptimizer


def write_final(job: Job, optimizer: MasterOptimizer, folder: Path) -> Path:
    """Write `final/` whole; adapters in fp32 master precision, a fully tuned model in the model's own dtype."""
    target = folder / "final"
    with atomic_folder(target) as temporary:
        if job.adapted is not None:
            masters = {name.removeprefix("model."): value for name, value in optimizer.weights().items()}
            state = _adapter_state(job.adapted, masters)
            about = job.adapted.peft_config["default"]  # a hub model was loaded from a folder of this machine
            about.base_model_name_or_path, about.revision = job.config.model.name, job.config.model.revision
            job.adapted.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)
        else:
            job.policy.model.save_pretrained(temporary)
        save_processor(job.processor, job.model_folder, temporary)
        (temporary / "README.md").write_text(model_card(job, folder), encoding="utf-8")
    return target


def _adapter_state(adapted: Any, masters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapted model's state with trained parameters replaced by their masters, under peft's names."""
    state: dict[str, torch.Tensor] = adapted.state_dict()
    prefix = "base_model.model."
    for name, value in masters.items():
        if prefix + name not in state:
            raise KeyError(f"{prefix + name} is not in the adapted model's state")
        state[prefix + name] = value
    return state
