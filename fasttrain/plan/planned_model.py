"""The recipe's model with its adapters on the meta device: names, shapes and types, no weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttrain.config import DPOConfig, ModelConfig
from fasttrain.errors import UserError
from fasttrain.files import user_path
from fasttrain.model.flops import ModelShape, measure_shape
from fasttrain.model.folder import refuse_revision
from fasttrain.model.fused_layers import fuse_layers
from fasttrain.model.fused_lora import fuse_lora
from fasttrain.model.fused_rotary import fuse_rotary
from fasttrain.model.head import install_head
from fasttrain.model.last_layer import trim_last_layer
from fasttrain.model.load import load_model_config, model_mistakes
from fasttrain.model.lora import (
    adapter_mistakes,
    adapter_to_train,
    attach_lora,
    choose_trainable,
    in_projector,
    language_model,
    read_adapter_config,
    refuse_head,
    refuse_in_parts,
)
from fasttrain.model.quantised import is_quantised, patch_embeddings
from fasttrain.model.silence import silence_dropout
from fasttrain.plan.known_models import known_config
from fasttrain.plan.passes import use_planned_attention
from fasttrain.plan.tracker import unique_parameters

# bitsandbytes' nf4 with double quantisation: half a byte, a byte of scale per 64 values, an fp32 per 256 scales
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters, tied ones once, and the bytes of the frozen ones as loaded."""

    frozen: int
    frozen_bytes: int
    adapter: int
    projector: int  # trained
    whole: int  # trained parameters of the base model, in full fine-tuning
    decoder: int  # parameters of the decoder's layers, adapters included
    largest_layer: int  # elements of the largest decoder layer: what ZeRO-3 gathers at a time
    largest_matrix: int  # of those that nf4 holds: the head's is none
    head: int
    embedding: int

    @property
    def trained(self) -> int:
        return self.adapter + self.projector + self.whole

    @property
    def total(self) -> int:
        return self.frozen + self.trained


@dataclass(frozen=True)
class PlannedModel:
    model: Any
    adapted: Any | None
    shape: ModelShape
    weights: Weights
    source: str
    dtype: torch.dtype


def find_config(config: ModelConfig) -> tuple[Any, str]:
    """The model's configuration and where it came from: a folder, the local hub cache, or the published sizes."""
    folder = user_path(config.name)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name: wanted a model folder with config.json, got {folder}")
        refuse_revision(folder, config)
        return load_model_config(folder, config), str(folder / "config.json")
    cached = cached_snapshot(config)
    if cached is not None:
        return load_model_config(cached, config), str(cached / "config.json")
    known = known_config(config.name)
    if known is not None:
        return known, f"published sizes of {config.name}"
    raise UserError(
        f"model.name: wanted a folder with config.json, a model in the local hub cache, or one of the published sizes that plan "
        f"knows, got {config.name}"
    )


def cached_snapshot(config: ModelConfig) -> Path | None:
    """The model's folder in the local hub cache, if its config.json is there; other files may not be."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(config.name, "config.json", revision=config.revision)
    except HFValidationError:
        raise UserError(f"model.name: wanted a model folder or hub id, got {config.name!r}") from None
    return Path(found).parent if isinstance(found, str) else None


def build_planned_model(
    config: DPOConfig, model_config: Any, dtype: torch.dtype, source: str = "", stage: int | None = None
) -> PlannedModel:
    """The model as training would have it, without values: head and adapters in place, layers fused, what trains chosen."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader: Any = (
        AutoModelForImageTextToText if hasattr(model_config, "vision_config") else AutoModelForCausalLM
    )
    doing = f"build {model_config.model_type!r} from its configuration"
    with model_mistakes(doing, config.model.name, config.model), torch.device("meta"):
        model = loader.from_config(
            copy.deepcopy(model_config), dtype=dtype, trust_remote_code=config.model.trust_remote_code
        )
    silence_dropout(model)
    install_head(model)
    trim_last_layer(language_model(model))
    with torch.device("meta"):
        adapted = _attach(model, config)
    _cast_adapter(model, dtype)
    choose_trainable(model, adapted, config.model.train_projector)
    fuse_rotary(language_model(model))
    if (
        adapted is not None and stage != 3 and not config.model.quantize
    ):  # as bitsandbytes' layers stay peft's
        fuse_lora(model)
    if not config.train.compile:
        fuse_layers(language_model(model))
    use_planned_attention(model)
    model.train()
    return PlannedModel(
        model=model, adapted=adapted, shape=measure_shape(model), weights=count_weights(model, config.model.quantize),
        source=source, dtype=dtype,
    )  # fmt: skip


def _attach(model: Any, config: DPOConfig) -> Any | None:
    """The adapter of the recipe; that of `init_from` as its settings say, all that trains with it included, without its weights."""
    import peft

    lora = config.lora
    if lora is None or lora.init_from is None:
        return attach_lora(model, lora, config.model.train_projector) if lora else None
    found = read_adapter_config(user_path(lora.init_from), weights=False)
    found = adapter_to_train(model, found, lora, config.model.train_projector)
    if config.distributed.zero_stage == 3:
        refuse_in_parts(found, user_path(lora.init_from))
    found.base_model_name_or_path = None
    found.init_lora_weights = True  # others want the base's values
    with adapter_mistakes(user_path(lora.init_from)):
        adapted = peft.get_peft_model(model, found, autocast_adapter_dtype=False)
    refuse_head(model, "lora.init_from")
    return adapted


def _cast_adapter(model: Any, dtype: torch.dtype) -> None:
    """Give an adapter the model's type, as peft does where weights are real; on the meta device it leaves it in fp32."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)


def count_weights(model: Any, quantize: str | None) -> Weights:
    """Read the numbers off the parameters."""
    adapter = projector = whole = frozen = 0
    frozen_bytes = 0.0
    quantised = _quantised(model) if quantize else set()
    head = model.get_output_embeddings()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in unique_parameters(model):
        name, size = names[id(parameter)], parameter.numel()
        if not parameter.requires_grad:
            frozen += size
            frozen_bytes += size * (NF4_BYTES if id(parameter) in quantised else parameter.element_size())
        elif "lora_" in name:
            adapter += size
        elif in_projector(name):
            projector += size
        else:
            whole += size
    return Weights(
        frozen=frozen, frozen_bytes=int(frozen_bytes), adapter=adapter, projector=projector, whole=whole,
        decoder=sum(p.numel() for p in language_model(model).parameters()) - model.get_input_embeddings().weight.numel(),
        largest_layer=_largest_layer(model),
        largest_matrix=max((m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head), default=0),
        head=head.weight.numel(), embedding=model.get_input_embeddings().weight.numel(),
    )  # fmt: skip


def _quantised(model: Any) -> set[int]:
    """Parameters that bitsandbytes quantises: every linear's weight but the head's, those that take patches, what trains, and what an
    adapter has a copy of."""
    head, patches = model.get_output_embeddings(), patch_embeddings(model)
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if is_quantised(module)
        and module is not head
        and name not in patches
        and not any(part in name for part in ("lora_", "original_module", "modules_to_save"))
        and not module.weight.requires_grad
    }


def _largest_layer(model: Any) -> int:
    sizes = [
        sum(parameter.numel() for parameter in layer.parameters())
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for layer in module
    ]
    return max(sizes, default=0)
