"""`fasttrain merge`: a run's adapter, or an adapter folder, and its base model as one ordinary Hugging Face model folder."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fasttrain import __version__
from fasttrain.config import ModelConfig, load_config
from fasttrain.errors import UserError
from fasttrain.files import atomic_folder, remove_dead
from fasttrain.model.folder import card_line, find_folder
from fasttrain.model.load import (
    load_model,
    load_model_config,
    load_processor,
    takes_images,
)
from fasttrain.model.lora import read_adapter, read_adapter_config
from fasttrain.model.no_videos import save_processor
from fasttrain.progress import say


def merge(run: Path, out: Path, *, trust_remote_code: bool = False) -> Path:
    """Write the merged model to `out`, whole or not at all; UserError for a run or folder that cannot be merged.

    The weights of an adapter are rounded to the type of the base model's files; so is the product of each low-rank pair, which
    is made in fp32, and so is its sum with the base's weights. A trained projector takes the base's place. Of a base whose
    files hold quantised weights the merged model has the values in full. A fully fine-tuned run is copied: its `final/` is such a
    folder already.
    `trust_remote_code` lets the Python code run that comes with the base; a run's recipe may say so itself.
    """
    trained = _find_trained(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"-o: wanted a new or empty folder, got {out}")
    try:  # before the minutes that merging takes
        out.mkdir(parents=True, exist_ok=True)
        out.rmdir()
    except OSError as error:
        raise UserError(f"-o: cannot make {out}: {error.strerror}") from None
    remove_dead(out)  # as large as the model
    if (trained / "adapter_config.json").is_file():
        try:
            _merge_adapter(run, trained, out, trust_remote_code)
        except UserError as error:
            raise UserError(str(error).replace("model.trust_remote_code", "--trust-remote-code", 1)) from None
    else:
        with atomic_folder(out) as temporary:
            shutil.copytree(trained, temporary, dirs_exist_ok=True)
    return out


def _find_trained(run: Path) -> Path:
    """The folder with the adapter or the whole model: `final/` of a run, or the folder itself."""
    if not run.is_dir():
        raise UserError(f"RUN: wanted a run folder or an adapter folder, got {run} (no such folder)")
    for folder in (run / "final", run):
        if (folder / "adapter_config.json").is_file():
            return folder
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    if (run / "checkpoints").is_dir():
        raise UserError(
            f"RUN: wanted a finished run with final/, got {run}; finish it with fasttrain dpo --resume"
        )
    raise UserError(f"RUN: wanted a run with final/, or a folder with adapter_config.json, got {run}")


def _base_model(run: Path, adapter: Path, about: Any) -> ModelConfig:
    """The base as the run's config.yaml names it, else as the adapter does."""
    if (run / "config.yaml").is_file() and adapter.parent == run:
        return load_config(run / "config.yaml").model
    if not about.base_model_name_or_path:
        raise UserError(f"RUN: wanted an adapter that names its base model, got none in {adapter}")
    return ModelConfig(name=about.base_model_name_or_path, revision=about.revision)


def _merge_adapter(run: Path, adapter: Path, out: Path, trust_remote_code: bool) -> None:
    about = read_adapter_config(adapter)
    base = _base_model(run, adapter, about)
    if base.quantize:
        say(
            f"warning: the adapter was trained over {base.quantize} weights and is merged into the unquantised ones: answers differ "
            "a little from those of the run"
        )
    trusted = base.trust_remote_code or trust_remote_code
    base = dataclasses.replace(base, quantize=None, trust_remote_code=trusted)
    folder = find_folder(base)
    model_config = load_model_config(folder, base)
    model = load_model(folder, base, model_config, torch.device("cpu"), dtype=_stored_dtype(model_config))
    if getattr(model, "is_quantized", False):
        model = _widened(model, base)
    model.requires_grad_(False)
    about.inference_mode = True
    adapted = read_adapter(model, adapter, about, trainable=False)
    _untie_head(model)
    try:
        merged = adapted.merge_and_unload()
    except (ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"RUN: wanted an adapter that peft can merge, got {adapter}: {problem}") from None
    processor = load_processor(folder, base, takes_images(model_config))  # training leaves it as it is
    with atomic_folder(out) as temporary:
        _save(merged, temporary, folder)
        save_processor(processor, folder, temporary)
        card = _card(base, run)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _widened(model: Any, base: ModelConfig) -> Any:
    """The model with the values of its quantised weights in ordinary ones; UserError where transformers cannot make them."""
    try:
        model = model.dequantize()
    except (NotImplementedError, ValueError, AttributeError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"RUN: wanted a base whose weights are not quantised in its files, or can be widened, got {base.name}: {problem}"
        ) from None
    say(
        f"note: the files of {base.name} hold quantised weights; the merged model has them, with the adapter added, in full"
    )
    return model


def _untie_head(model: Any) -> None:
    """Give the head weights of its own where it shares the input embedding's and the adapter is on one of the two.

    Beside the base the adapter changes that one alone; added to shared weights it would change both. UserError for a model
    whose configuration ties other weights too: it could not be loaded untied.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (_without_adapter(end) for end in ends)
    if embedding.weight is not getattr(head, "weight", None) or (embedding, head) == ends:
        return
    if _share_a_copy(*ends):
        return
    if len(getattr(model, "all_tied_weights_keys", ())) != 1:
        raise UserError(
            f"RUN: wanted an adapter without the embedding or the head, which share their weights, got one with it, and "
            f"{type(model).__name__} cannot be saved with weights of its own for each"
        )
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in _configs(model.config):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    say(
        "note: the adapter is on the embedding or the head, which share their weights: the merged model has them apart"
    )


def _without_adapter(module: Any) -> Any:
    """The base model's module under what peft has put around it: a LoRA layer, or a copy that was trained."""
    module = getattr(module, "original_module", module)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _share_a_copy(embedding: Any, head: Any) -> bool:
    """Whether the adapter holds one trained copy for both (peft's `ensure_weight_tying`): they stay tied."""
    copies: list[Any] = [getattr(end, "modules_to_save", {}) for end in (embedding, head)]
    return all("default" in copy for copy in copies) and copies[0].default.weight is copies[1].default.weight


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            yield from _configs(getattr(config, name))


def _stored_dtype(model_config: Any) -> torch.dtype:
    """The type of the base's weights as its configuration says; fp32 where it says none."""
    found = getattr(model_config, "dtype", None) or getattr(model_config.get_text_config(), "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _save(model: Any, folder: Path, base: Path) -> None:
    """Weights in shards, configuration, and the base's own generation settings, which transformers may refuse to write."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    model.save_pretrained(folder, max_shard_size="5GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name in ("generation_config.json", *(path.name for path in base.glob("*.py"))):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def _card(base: ModelConfig, run: Path) -> str:
    return (
        f"---\n{card_line(base.name)}library_name: transformers\ntags: [dpo, fasttrain]\n---\n\n# {run.resolve().name}, merged\n\n"
        f"`{base.name}` with the adapter of the run `{run.resolve().name}` added to its weights by fasttrain {__version__}.\n"
    )
