"""`fasttrain plan`: from a recipe to the printed page, without weights, GPU or network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import torch

from fasttrain.config import DPOConfig
from fasttrain.errors import UserError
from fasttrain.model.attention import check_attention
from fasttrain.model.flops import counts_tower
from fasttrain.model.load import as_stored
from fasttrain.model.lora import note_experts
from fasttrain.plan.advice import advise
from fasttrain.plan.gpus import Achieved, find_gpu
from fasttrain.plan.histogram import find_histogram
from fasttrain.plan.memory import Activations, PackMix
from fasttrain.plan.page import as_json, print_page
from fasttrain.plan.planned_model import build_planned_model, find_config
from fasttrain.plan.predict import CUDA, Machine, predict
from fasttrain.train.job_checks import check_blank, check_recipe, why_separate
from fasttrain.train.losses import PairLoss

GPUS_PER_NODE = 8


def make_plan(
    config: DPOConfig, *, gpu: str, gpus: int, lengths: Sequence[str], achieved: Achieved, node_link_gbytes: float,
    machine_readable: bool,
) -> str:  # fmt: skip
    """The page, or JSON; UserError for a mistake in the recipe or the options."""
    if gpus < 1:
        raise UserError(f"--gpus: wanted at least 1, got {gpus}")
    card = find_gpu(gpu)
    link = (
        min(card.link_bytes_per_s, node_link_gbytes * 1e9) if gpus > GPUS_PER_NODE else card.link_bytes_per_s
    )
    machine = Machine(gpu=card, gpus=gpus, achieved=achieved, link_bytes_per_s=link)
    PairLoss(config.loss)  # what sft takes of it, it takes too
    model_config, source = find_config(config.model)
    dtype = torch.float32 if config.model.dtype == "float32" else torch.bfloat16
    check_attention(config.model.attention, model_config, CUDA, dtype, elsewhere=True)
    check_recipe(config, model_config, dtype, gpus)
    config = as_stored(config, model_config)
    planned = build_planned_model(config, model_config, dtype, source)
    note_experts(planned.model, config.lora)
    histogram = find_histogram(config, lengths, planned.model)
    longest = max(data.longest_sequence for data in (histogram, histogram.evaluated) if data is not None)
    separate = why_separate(config, planned.model, longest)
    shared = config.train.share_prefix and separate is None
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, share_prefix=shared))
    if gpus > 1 and config.distributed.zero_stage is not None:
        check_blank(planned.model, histogram.images)
    tower = counts_tower(model_config)
    mix = PackMix.of(histogram, tower, shared)
    predictions = []
    held = {False: Activations(planned, mix, CUDA, sharded=gpus > 1)}
    for stage in _stages(config, gpus):
        apart = stage == 3  # whose modules gather one by one, so that none can be fused
        if apart not in held:
            unfused = build_planned_model(config, model_config, dtype, source, stage)
            held[apart] = Activations(unfused, mix, CUDA, sharded=True)
        predictions.append(predict(config, held[apart], histogram, machine, stage))
    notes = []
    if separate:
        name = type(planned.model).__name__
        notes.append(f"{name} cannot share prefixes: {separate}; every completion is its own sequence")
    if hasattr(model_config, "vision_config") and not tower:
        notes.append(
            f"of the vision tower and projector of {model_config.model_type} only the weights are counted, not the work of their passes "
            "nor its memory"
        )
    if any(prediction.exceeded for prediction in predictions):
        notes.append(
            f"the longest prompt with one answer has {histogram.longest_sequence:,} tokens and is not divided: where tokens per "
            "pack are fewer, memory is that of a pack with it alone"
        )
    if gpus > GPUS_PER_NODE:
        notes.append(
            f"{gpus} GPUs are taken as several nodes of {GPUS_PER_NODE}, with {node_link_gbytes:g} GB/s per GPU between them"
        )
    advice = advise(config, machine, predictions)
    parts = (config.model.name, planned, histogram, machine, predictions, advice, notes)
    return json.dumps(as_json(*parts), indent=2) if machine_readable else print_page(*parts)


def _stages(config: DPOConfig, gpus: int) -> list[int]:
    if gpus == 1:
        return [0]
    return [0, 2] if config.model.quantize else [0, 2, 3]
