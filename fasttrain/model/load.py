"""A Hugging Face model and its processor from a hub id or a folder, with one clear line for each way this can fail."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fasttrain.config import DPOConfig, ModelConfig
from fasttrain.devices import pick_dtype
from fasttrain.errors import UserError, is_out_of_memory
from fasttrain.model.file_layout import whole_shapes
from fasttrain.model.folder import in_one_line
from fasttrain.model.no_videos import PIXTRAL, pixtral_processor, processor_name, without_videos
from fasttrain.model.quantised import check_quantised, nf4_settings

WEIGHTS = ("*.safetensors",)
_LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "depth",
)  # as configurations call their number
_DEEP = 300  # layers: fewer are built in seconds
_WIDENED = ("fp8", "mxfp4")  # what a model's files may hold and transformers can load in full


def load_model_config(folder: Path, config: ModelConfig, *, trains: bool = True) -> Any:
    """The model's configuration; UserError unless it is a causal language model, with images or without.

    trains: gradients will pass through it, so that its weights must not be quantised in a way that gives none.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = read_model_config(folder, config)
    encodes = any(getattr(part, "is_encoder_decoder", False) for part in (found, found.get_text_config()))
    known = found.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.trust_remote_code
    if encodes or not (known or takes_images(found)):
        raise UserError(
            "model.name: wanted a causal language model or a vision-language model around one, got model type "
            f"{found.model_type!r}"
        )
    _check_layers(found, folder)
    _widen_stored(found, folder, trains)
    return found


def _check_layers(model_config: Any, folder: Path) -> None:
    """UserError for more layers than the folder has weights for, which would take minutes to build, and for images taken from a
    layer that is not there."""
    vision = getattr(model_config, "vision_config", None)
    towers = [part for part in (model_config.get_text_config(), vision) if part is not None]
    for layers in (getattr(part, name, None) for part in towers for name in _LAYERS):
        if isinstance(layers, int) and layers > _DEEP and 0 < (held := _count_tensors(folder)) < layers:
            raise UserError(
                f"model.name: wanted weights for the {layers:,} layers of {folder / 'config.json'}, got {held:,} tensors in all"
            )
    there, taken = (
        getattr(vision, "num_hidden_layers", None),
        getattr(model_config, "vision_feature_layer", None),
    )
    for layer in taken if isinstance(taken, list | tuple) else [taken]:
        if isinstance(there, int) and isinstance(layer, int) and not -there - 1 <= layer <= there:
            raise UserError(
                f"model.name: {folder / 'config.json'}: vision_feature_layer: wanted one of {there} layers, got {layer}"
            )


def _count_tensors(folder: Path) -> int:
    """How many the folder's weights hold; those of files that cannot be read, which is told when they are loaded, are left out."""
    held = 0
    for path in folder.glob(WEIGHTS[0]):
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            held += len(list(file.keys()))
    return held


def _widen_stored(model_config: Any, folder: Path, trains: bool) -> None:
    """Have weights that the model's files hold in 8 or 4 bits loaded in full where transformers can do that: its kernels for them
    give no gradient. bitsandbytes' 4 bits stay, as peft trains over them; UserError for all others, if the model trains."""
    stored = _stored(model_config)
    if not stored or stored.get("load_in_4bit"):
        return
    method = "int8" if stored.get("load_in_8bit") else stored.get("quant_method")
    if method not in _WIDENED and not trains:
        return
    if method not in _WIDENED:
        raise UserError(
            f"model.name: wanted weights in full in {folder}, or in {', '.join(_WIDENED)} or bitsandbytes' 4 bits, got {method}"
        )
    model_config.quantization_config = stored | {"dequantize": True}


def _stored(model_config: Any) -> dict[str, Any]:
    """How the model's files hold quantised weights; empty where they hold none."""
    stored = getattr(model_config, "quantization_config", None) or {}
    return dict(stored) if isinstance(stored, dict) else dict(stored.to_dict())


def read_model_config(folder: Path, config: ModelConfig) -> Any:
    """What the folder's config.json says, whatever model that is; UserError if transformers cannot take it."""
    from transformers import AutoConfig

    with model_mistakes(f"read {folder / 'config.json'}", folder, config):
        found = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        _let_read(found)
        _drop_implementations(found)
    return found


def as_stored(config: DPOConfig, model_config: Any) -> DPOConfig:
    """The recipe with `model.quantize` as the model's files have it, where their weights are quantised already; UserError if it
    would train such weights."""
    if config.model.quantize or not _stored(model_config).get("load_in_4bit"):
        return config
    if config.lora is None:
        raise UserError(
            f"lora: wanted a LoRA section with {config.model.name}, whose files hold quantised weights, got null (full fine-tuning)"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, quantize="nf4"))


@contextlib.contextmanager
def model_mistakes(doing: str, folder: Path | str, config: ModelConfig) -> Iterator[None]:
    """UserError, in one line, for what a model's files make transformers raise in the block.

    That may be anything: huggingface_hub has exceptions of its own, tokenizers raises plain ones, and a value of a wrong
    type fails where it is first used.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        refuse_own_code(error, folder, config)
        raise UserError(f"model.name: cannot {doing}: {in_one_line(error)}") from None


def refuse_own_code(error: Exception, folder: Path | str, config: ModelConfig) -> None:
    """UserError where transformers failed because it may not run the Python code in the model's folder."""
    if not config.trust_remote_code and "trust_remote_code" in str(error):
        raise UserError(
            f"model.name: wanted a model without Python code of its own, or model.trust_remote_code, got {folder}"
        ) from None


def _let_read(config: Any) -> None:
    """Let values be read that differ between layers (Gemma 4): we take those of most layers, and the others by their names."""
    heterogeneous = False
    for part in (config, config.get_text_config()):
        if getattr(part, "is_heterogeneous", False):
            part.allow_global_per_layer_attribute_access = heterogeneous = True
    if heterogeneous:
        name = "transformers.integrations.heterogeneity.configuration_utils"  # it would warn of what is asked for here
        logging.getLogger(name).setLevel(logging.ERROR)


def _drop_implementations(config: Any) -> None:
    """Forget which attention and experts config.json asks for: ours are chosen here, and a name there may be code on the hub."""
    for name in ("_attn_implementation", "_experts_implementation"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)  # of its parts too


def takes_images(model_config: Any) -> bool:
    """Whether the model is a vision-language model that transformers itself knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    return model_config.model_type in KNOWN and hasattr(model_config, "vision_config")


def load_processor(folder: Path, config: ModelConfig, has_images: bool) -> Any:
    """The processor of a vision model (PIL image processing), or the tokenizer of a text model."""
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer
    from transformers.utils import is_torchvision_available

    loader: Any = AutoTokenizer
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    kind = "processor" if has_images else "tokenizer"
    with model_mistakes(f"load a {kind} from {folder}", folder, config), _quiet():
        if has_images:
            model_type = AutoConfig.from_pretrained(folder, **options).model_type
            name = processor_name(folder)
            loader, options["backend"] = without_videos(model_type, name) or AutoProcessor, "pil"
            if name == PIXTRAL and not is_torchvision_available():
                loader = pixtral_processor()
        return loader.from_pretrained(folder, **options)


def load_model(
    folder: Path,
    config: ModelConfig,
    model_config: Any,
    device: torch.device,
    dtype: torch.dtype | None = None,
    zero3: bool = False,
    replaced: Sequence[str] = (),
) -> Any:
    """The model on its device, in evaluation mode, every weight found in its files; UserError if one is missing.

    `dtype` is what the recipe says when it is None. With `zero3` every rank keeps its part of the weights. `replaced` are the modules
    that an adapter has copies of (PEFT's `modules_to_save`): they stay unquantised, as a projector that trains does.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loader: Any = AutoModelForImageTextToText if takes_images(model_config) else AutoModelForCausalLM
    dtype = dtype or pick_dtype(config.dtype, device)
    with model_mistakes(f"load {folder}", folder, config):
        attention = (
            "sdpa"
            if _takes_sdpa(loader, model_config, _own_class(loader, folder, config, model_config))
            else "eager"
        )
        with _quiet(), whole_shapes() if zero3 else contextlib.nullcontext():
            model, info = loader.from_pretrained(
                folder,
                config=model_config,
                dtype=dtype,
                attn_implementation=attention,
                quantization_config=nf4_settings(
                    loader, config, model_config, takes_images(model_config), dtype, replaced
                ),
                device_map=None
                if zero3
                else {"": device}
                if device.type == "cuda" or config.quantize
                else None,
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
            )
    missing = sorted(info["missing_keys"])
    if missing or info["mismatched_keys"]:
        names = missing or sorted(str(key) for key in info["mismatched_keys"])
        raise UserError(
            f"model.name: wanted every weight in {folder}, got none for {names[0]} ({len(names)} in all)"
        )
    check_quantised(model, folder, config.quantize is not None)
    if zero3 and (renamed := getattr(model, "_weight_conversions", None)):
        # transformers keeps them all under ZeRO-3, and what it saves would get names that old versions gave
        model._weight_conversions = [conversion for conversion in renamed if conversion.was_used()]
    for module in model.modules():
        # bitsandbytes repacks nf4 weights for another CPU kernel in evaluation mode only; reference and policy must be
        # computed by the same one
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def _own_class(loader: Any, folder: Path, config: ModelConfig, model_config: Any) -> Any:
    """The class that a model with code of its own will be loaded as; None for transformers' models."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = (getattr(model_config, "auto_map", None) or {}).get(loader.__name__)
    return get_class_from_dynamic_module(name, folder) if name and config.trust_remote_code else None


def _takes_sdpa(loader: Any, model_config: Any, own: Any) -> bool:
    """Whether the class that will be loaded, and each part of it, has scaled_dot_product_attention; some have not."""
    from transformers import AutoModel

    names = getattr(model_config, "sub_configs", {}) if takes_images(model_config) else {}
    parts = [getattr(model_config, name, None) for name in names]
    classes = [
        own or loader._model_mapping.get(type(model_config), None),
        *(AutoModel._model_mapping.get(type(part), None) for part in parts),
    ]
    return all(getattr(found, "_supports_sdpa", True) for found in classes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars and no advice from transformers; its errors still come through."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def stop_token_ids(processor: Any, folder: Path) -> list[int]:
    """Tokens that end a turn: the tokenizer's eos first, then those generation stops at; UserError if these cannot be read."""
    tokenizer = getattr(processor, "tokenizer", processor)
    stops = _generation_stops(folder / "generation_config.json")
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *stops] if i is not None))


def _generation_stops(path: Path) -> list[int]:
    if not path.exists():
        return []
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.name: cannot read {path}: {in_one_line(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"model.name: {path}: wanted a JSON object, got {type(settings).__name__}")
    stops = settings.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if wrong := [stop for stop in stops if type(stop) is not int or not 0 <= stop < 1 << 31]:
        raise UserError(
            f"model.name: {path}: eos_token_id: wanted a token id or a list of them, got {wrong[0]!r}"
        )
    return stops
