"""Which parameters train: a LoRA adapter through peft, the whole language model, the projector."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fasttrain.config import LoraConfig
from fasttrain.errors import UserError, is_out_of_memory
from fasttrain.files import user_path
from fasttrain.model.head import LogprobHead, trunk
from fasttrain.progress import say
from fasttrain.ranks import full_shape

# What stands between tower and language model: LLaVA's and most others', Idefics', Qwen-VL's and GLM-V's, Janus' and
# DeepSeek-VL's, VideoLLaMA 3's and PaddleOCR-VL's, LightOnOCR's, Ernie 4.5 VL's, Gemma 4's, MiniCPM-V's, HunYuan-VL's, Granite
# Vision 4's.
PROJECTORS = (
    "multi_modal_projector", "connector", "visual.merger", "visual.deepstack_merger_list", "visual.merger_list", "model.aligner",
    "model.projector", "model.vision_projection", "model.visual_embeddings_table", "model.resampler_model", "model.embed_vision",
    "model.merger", "vision_tower.patch_merger", "model.layerwise_projectors", "model.spatial_projectors",
)  # fmt: skip


def images_train_alone(model: Any) -> bool:
    """Whether nothing behind the images' features trains, so that a text without images has no gradient."""
    parts = (language_model(model), model.get_input_embeddings(), model.get_output_embeddings())
    return not any(parameter.requires_grad for part in parts for parameter in part.parameters())


def in_projector(name: str) -> bool:
    """Whether a module or parameter of this name belongs to the projector."""
    return any(f".{projector}." in f".{name}." for projector in PROJECTORS)


def _projectors(model: Any) -> list[str]:
    """Names, without what stands before them, of the modules that make up the projector; those of lists one by one."""
    found: list[str] = []
    for name, module in model.named_modules():
        short = next((p for p in PROJECTORS if f".{name}".endswith(f".{p}")), None)
        if short is not None:
            parts = range(len(module)) if isinstance(module, nn.ModuleList) else None
            found += [short] if parts is None else [f"{short}.{part}" for part in parts]
    return list(dict.fromkeys(found))


def _to_train(model: Any, train_projector: bool) -> list[str] | None:
    """The projector's modules if they are to be trained; UserError if the model has none that we know."""
    if not train_projector:
        return None
    names = _projectors(model)
    if not names:
        raise UserError(
            f"model.train_projector: wanted a vision-language model with a projector, got {type(model).__name__}: none of "
            f"its modules is called {', '.join(PROJECTORS)}"
        )
    if not all(p.is_floating_point() for name, p in model.named_parameters() if in_projector(name)):
        raise UserError(
            "model.train_projector: wanted false with a projector that the model's files hold quantised, got true"
        )
    return names


def language_model(model: Any) -> nn.Module:
    """The decoder without vision tower, projector and head."""
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else trunk(model)
    return trunk(model) if decoder is model else decoder


def _decoder_name(model: Any) -> str:
    decoder = language_model(model)
    return next(name for name, module in model.named_modules() if module is decoder)


def auto_targets(model: Any) -> str:
    """A regular expression for every linear of the language model, as peft's target_modules, without kinds of which peft could not
    load every adapter again."""
    import peft

    decoder, prefix = language_model(model), _decoder_name(model)
    names = {name for name, module in decoder.named_modules() if _is_linear(module)}
    kinds = {_leaf(name) for name in names} - _not_by_peft(model)
    weights = {f"base_model.model.{prefix}.{name}.lora_A.weight": name for name in names}
    lost = _lost(model, peft.LoraConfig(), {key: torch.empty(1, 1, device="meta") for key in weights})
    # where peft could load none, the adapter is refused by name
    leaves = sorted(kinds - {_leaf(weights[key]) for key in lost} or kinds)
    if not leaves:
        raise UserError("lora.targets: wanted linear layers in the language model, found none; name them")
    return rf"{re.escape(prefix)}\.(.*\.)?({'|'.join(leaves)})"


def _beside(model: Any, targets: str) -> str | None:
    """A pattern of what peft must leave alone under auto's targets, where it would not: for some mixtures it keeps the last names of
    a pattern alone, and other parts have linears of these names too (Qwen3-Omni's sound tower)."""
    start = re.escape(_decoder_name(model)) + r"\."
    linears = [name for name, module in model.named_modules() if _is_linear(module)]
    outside = (name for name in linears if not re.match(start, name))
    if _not_by_peft(model) and any(re.fullmatch(targets.removeprefix(start), name) for name in outside):
        return f"(?!{start}).*"
    return None


def _leaf(name: str) -> str:
    """What the names of a kind of layer end in, as a pattern; with the list it is in where that is a number."""
    *_, parent, last = "", *name.split(".")
    return rf"{parent}\.{last}" if last.isdigit() else last


def _not_by_peft(model: Any) -> set[str]:
    """Names of linears that peft does not adapt as such: Mamba's fused ones, and those it takes for old names of experts.

    It would turn a shared expert's gate_proj into an adapter of all fused experts; see peft's transformers_weight_conversion.
    """
    import peft.utils.transformers_weight_conversion as conversion

    kind = model.config.get_text_config().model_type
    if kind in ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"):
        return {"out_proj", "conv1d"}
    kinds = {kind, model.config.model_type}
    patterns = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {})
    renamed = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {})
    return {name for k in kinds if k in patterns for name in renamed.get(patterns[k], {})}


def fused_experts(model: Any) -> dict[str, nn.Parameter]:
    """Expert weights (experts, out, in) that a mixture keeps in one parameter per layer, by name: no linear layers."""
    decoder = language_model(model)
    return {
        name: parameter
        for name, parameter in decoder.named_parameters()
        if len(full_shape(parameter)) == 3 and "lora_" not in name and "experts" in name
    }


def _targets(model: Any, lora: LoraConfig) -> tuple[Any, list[str] | None]:
    """peft's target_modules and target_parameters: names of a list that are fused expert weights go to the latter."""
    if lora.targets == "auto":
        return auto_targets(model), None
    if isinstance(lora.targets, str) or lora.targets is None:
        return lora.targets, None
    parameters = [
        wanted
        for wanted in lora.targets
        if any(f".{name}".endswith(f".{wanted}") for name in fused_experts(model))
    ]
    return [name for name in lora.targets if name not in parameters], parameters or None


def note_experts(model: Any, lora: LoraConfig | None) -> None:
    """Say where a fresh adapter leaves the fused weights of experts as they are: the most of such a model."""
    experts = fused_experts(model)
    if lora is None or lora.init_from is not None or lora.targets != "auto" or not experts:
        return
    every = [p for name, p in language_model(model).named_parameters() if "lora_" not in name]
    share = sum(full_shape(p).numel() for p in experts.values()) / sum(full_shape(p).numel() for p in every)
    kinds = sorted({".".join(name.split(".")[-2:]) for name in experts})
    say(
        f"note: lora.targets auto adapts linear layers; the fused weights of the experts ({share:.0%} of the "
        f"language model) stay as they are unless lora.targets is a list with {', '.join(kinds)}"
    )


def _is_linear(module: nn.Module) -> bool:
    # bitsandbytes' quantised linears are subclasses; GPT-2's Conv1D is a linear by another name; the routers of Llama 4 and
    # Phi-3.5-MoE are subclasses that return more than a linear does, DeepSeek V4's grouped linears many linears
    name = type(module).__name__
    other = name.endswith(("Router", "GroupedLinear"))
    return (isinstance(module, nn.Linear) and not other) or name == "Conv1D"


def attach_lora(model: Any, lora: LoraConfig, train_projector: bool) -> Any:
    """The model with a fresh adapter, or with the one of `init_from`; a PeftModel. Adapter weights have the model's dtype."""
    import peft

    if lora.init_from is not None:
        return _load_adapter(model, lora, train_projector)
    targets, parameters = _targets(model, lora)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none",
        task_type="CAUSAL_LM", modules_to_save=_to_train(model, train_projector), target_parameters=parameters,
        exclude_modules=_beside(model, targets) if lora.targets == "auto" else None,
    )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what other packages tell each other
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"lora.targets: {str(error).splitlines()[0]}") from None
    refuse_head(model, "lora.targets")
    _refuse_unreadable(adapted)
    return adapted


def _lost(model: Any, config: Any, written: dict[str, Tensor]) -> list[str]:
    """Names of an adapter's weights that peft would look for by other names than it saves them by: it renames them as
    transformers renames those of the model's first checkpoints."""
    from peft.utils import transformers_weight_conversion as conversion

    read = conversion.convert_peft_adapter_state_dict_for_transformers(model, config, dict(written))
    return sorted(written.keys() - read.keys())


def _refuse_unreadable(adapted: Any) -> None:
    """UserError where what was trained could not be loaded by anything."""
    import peft

    written = {
        name.replace(".default", ""): torch.empty(full_shape(parameter), device="meta")
        for name, parameter in adapted.named_parameters()
        if ".lora_" in name
    }
    if lost := _lost(adapted, adapted.peft_config["default"], written):
        layers = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in lost})
        raise UserError(
            f"lora.targets: wanted layers whose adapters peft can load again, got {', '.join(layers)} of "
            f"{type(adapted.get_base_model()).__name__}: peft {peft.__version__} looks for {lost[0]} by another name"
        )


def refuse_head(model: Any, key: str) -> None:
    """UserError if peft has wrapped the head: the policy calls the head itself, so what wraps it would never run."""
    if not isinstance(model.get_output_embeddings(), LogprobHead):
        raise UserError(
            f"{key}: wanted layers below the head, got the head too: an adapter or a copy of the head is not offered"
        )


def _load_adapter(model: Any, lora: LoraConfig, train_projector: bool) -> Any:
    folder = user_path(str(lora.init_from))
    config = adapter_to_train(model, read_adapter_config(folder), lora, train_projector)
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        refuse_in_parts(config, folder)
    replaces = _replaces_embeddings(model, folder)
    adapted = read_adapter(model, folder, config, trainable=True)
    refuse_head(model, "lora.init_from")
    adapted.replaces_embeddings = replaces  # `final/` must hold them too
    return adapted


def refuse_in_parts(config: Any, folder: Path) -> None:
    """UserError for an adapter that peft makes from the base's weights as it loads it: under ZeRO-3 no rank has them whole."""
    start = str(config.init_lora_weights).lower()
    made = [name for name in ("use_dora", "trainable_token_indices") if getattr(config, name, None)]
    if start not in ("true", "false", "gaussian", "orthogonal", "eva"):
        made.append(f"init_lora_weights {start}")
    if made:
        raise UserError(
            f"lora.init_from: {folder} has {made[0]}, for which peft reads whole weights, and distributed.zero_stage 3 has them in "
            "parts: set it to 2 or null, or merge that adapter and start a new one"
        )


def adapter_to_train(model: Any, config: Any, lora: LoraConfig, train_projector: bool) -> Any:
    """The settings of `init_from`'s adapter, set to train; UserError where the recipe wants something else of it."""
    for name, theirs in (("rank", config.r), ("alpha", config.lora_alpha)):
        wanted = getattr(lora, name)
        if wanted is not None and wanted != theirs:
            raise UserError(f"lora.{name}: wanted the adapter's {theirs} (or no value), got {wanted}")
    if lora.targets not in (None, "auto") and not _same_targets(lora.targets, config.target_modules):
        raise UserError(f"lora.targets: wanted the adapter's own (or no value), got {lora.targets}")
    if train_projector and not set(_to_train(model, True) or []) <= set(config.modules_to_save or []):
        raise UserError(
            "lora.init_from: wanted an adapter that holds the projector, since model.train_projector is true"
        )
    config.lora_dropout = lora.dropout
    config.inference_mode = False
    return config


def _replaces_embeddings(model: Any, folder: Path) -> bool:
    """Whether an adapter's file holds other weights for the embedding or the head than the model has: peft saves them beside an
    adapter that was trained over a changed vocabulary, and puts them into the model that it loads the adapter into. UserError
    where ZeRO-3 has parted the model's, which peft cannot fill."""
    ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    names = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(parameter is end for end in ends)
    }
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            held = {
                name.removeprefix("base_model.model.").replace(".base_layer.", "."): name
                for name in file.keys()  # noqa: SIM118 (no mapping)
            }
            both = {name: file.get_tensor(held[name]) for name in names if name in held}
    except (SafetensorError, OSError):  # told when peft reads it
        return False
    if both and any(hasattr(end, "ds_shape") for end in ends):
        raise UserError(
            f"lora.init_from: {folder} holds weights of the embedding or the head, which cannot be loaded with distributed.zero_stage "
            "3: set it to 2 or null, or merge that adapter and start a new one"
        )
    return any(not torch.equal(value.to(names[name]), names[name]) for name, value in both.items())


def read_adapter_config(folder: Path, weights: bool = True) -> Any:
    """The settings of a LoRA adapter in PEFT's format; UserError if the folder holds none, or no weights where they are wanted."""
    import peft

    wanted = ["adapter_config.json", *(["adapter_model.safetensors"] if weights else [])]
    if not all((folder / name).is_file() for name in wanted):
        raise UserError(
            f"lora.init_from: wanted a folder with adapter_config.json and adapter_model.safetensors, got {folder}"
        )
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        _ = list(getattr(config, "modules_to_save", None) or [])  # of names
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"lora.init_from: cannot read {folder / 'adapter_config.json'}: {problem}") from None
    if config.peft_type != "LORA":
        raise UserError(f"lora.init_from: wanted a LoRA adapter, got {config.peft_type}")
    _refuse_variants(config, folder)
    return config


def _refuse_variants(config: Any, folder: Path) -> None:
    """UserError for LoRA that is another function, or stands on another base, than the one we would run."""
    start = str(config.init_lora_weights).lower()
    reasons = {
        "alora_invocation_tokens": "it acts behind its invocation tokens only, which fasttrain does not look for",
        "layer_replication": "it runs layers of the base several times, which is another model",
    }
    for name, reason in reasons.items():
        if getattr(config, name, None):
            raise UserError(f"lora.init_from: wanted an adapter without {name}, got {folder}: {reason}")
    if start.startswith("pissa_niter"):
        raise UserError(
            f"lora.init_from: wanted an adapter over the base's own weights, got {folder} (init_lora_weights {start}): what it "
            "takes off them is drawn anew at each load; save it as ordinary LoRA (peft: path_initial_model_for_weight_conversion)"
        )


def modules_replaced(adapter: Path | None) -> list[str]:
    """The names of the modules that an adapter has copies of, to take the place of the model's; UserError as `read_adapter_config`."""
    return list(read_adapter_config(adapter).modules_to_save or []) if adapter else []


@contextlib.contextmanager
def adapter_mistakes(folder: Path) -> Iterator[None]:
    """UserError, in one line, for what an adapter's files make peft raise: a setting of a wrong type fails where it is first used."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        plain = isinstance(error, ValueError | RuntimeError | SafetensorError)
        problem = " ".join(f"{'' if plain else type(error).__name__ + ': '}{error}".split())[:200]
        raise UserError(f"lora.init_from: {folder} does not fit the model: {problem}") from None


def read_adapter(model: Any, folder: Path, config: Any, *, trainable: bool) -> Any:
    """The PeftModel; UserError unless the file has every weight, in the model's shapes: peft draws what is missing."""
    import peft

    with adapter_mistakes(folder), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(
            model, folder, config=config, is_trainable=trainable, autocast_adapter_dtype=False
        )
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            missing = re.findall(r"'([^']+)'", str(warning.message))
            raise UserError(
                f"lora.init_from: wanted an adapter of this model, got none in {folder} for {missing[0]} "
                f"({len(missing)} weights in all)"
            )
        if not issubclass(warning.category, FutureWarning):  # what other packages tell each other
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return adapted


def _same_targets(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, str) or isinstance(theirs, str):
        return bool(ours == theirs)
    return set(ours) == set(theirs)


def choose_trainable(model: Any, adapted: Any | None, train_projector: bool) -> None:
    """Set requires_grad: the adapter (peft has done it), or the language model and head, and the projector."""
    _to_train(model, train_projector)
    if adapted is not None:
        if not train_projector:  # an adapter of init_from may hold one, which peft lets train
            for name, parameter in model.named_parameters():
                if in_projector(name) and "lora_" not in name:
                    parameter.requires_grad_(False)
        return
    model.requires_grad_(False)
    language_model(model).requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    if train_projector:
        for name, parameter in model.named_parameters():
            if in_projector(name):
                parameter.requires_grad_(True)
