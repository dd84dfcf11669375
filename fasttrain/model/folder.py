"""Where a model's files are: a folder as named, or the hub's, downloaded; one line for each way this can fail."""

from __future__ import annotations

import stat
from pathlib import Path

from fasttrain.config import ModelConfig
from fasttrain.errors import UserError, is_out_of_memory
from fasttrain.files import user_path
from fasttrain.settings import require


def card_line(name: str) -> str:
    """A model card's line about its base model, for a hub id: the hub refuses an upload whose card names a folder there."""
    return "" if user_path(name).is_dir() else f"base_model: {name}\n"


def find_folder(config: ModelConfig) -> Path:
    """The local folder of the model: as given, or the hub snapshot, downloaded if needed."""
    folder = user_path(config.name)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name: wanted a model folder with config.json, got {folder}")
        if not any(folder.glob("*.safetensors")):
            kinds = ", ".join(sorted({path.suffix for path in folder.iterdir() if path.suffix})) or "nothing"
            raise UserError(f"model.name: wanted safetensors weights in {folder}, got {kinds}")
        _refuse_odd_files(folder)
        refuse_revision(folder, config)
        _refuse_adapter(folder, folder)
        return folder
    if config.name.count("/") > 1 or config.name.startswith((".", "/", "~")):
        raise UserError(f"model.name: wanted a model folder or hub id, got {config.name} (no such folder)")
    return _snapshot(config)


def _refuse_odd_files(folder: Path) -> None:
    """UserError for a pipe or device among the files, whose reading may never end, and a link that leads to itself."""
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:  # a link to nothing: told if it is looked for
            continue
        except OSError as error:
            raise UserError(f"model.name: cannot read {path}: {error.strerror}") from None
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"model.name: wanted files in {folder}, got a pipe, socket or device: {path}")


def refuse_revision(folder: Path, config: ModelConfig) -> None:
    """UserError for a revision of a model that is a folder: it has none."""
    require(config.revision is None, "model.revision", f"null with the folder {folder}", config.revision)


def _snapshot(config: ModelConfig) -> Path:
    from huggingface_hub import errors, snapshot_download

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    if config.trust_remote_code:
        patterns.append("*.py")
    try:
        folder = Path(snapshot_download(config.name, revision=config.revision, allow_patterns=patterns))
    except errors.HFValidationError:
        raise UserError(f"model.name: wanted a model folder or hub id, got {config.name!r}") from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"model.revision: wanted a branch, tag or commit of {config.name}, got {config.revision}"
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"model.name: the hub gives {config.name} to those only who were granted it: ask on its page, and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"model.name: the hub has no {config.name}, or it is private and HF_TOKEN is not that of somebody who may read it"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        why = f" ({in_one_line(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
        raise UserError(
            f"model.name: {config.name} is neither a folder nor whole in the local cache, and the hub is out of reach{why}"
        ) from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"model.name: the hub refused {config.name}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # what its HTTP library raises, and what is no JSON
        if is_out_of_memory(error):
            raise
        raise UserError(f"model.name: cannot get {config.name} from the hub: {in_one_line(error)}") from None
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model.name: wanted safetensors weights, got none in {config.name}")
    _refuse_adapter(folder, config.name)
    return folder


def _refuse_adapter(folder: Path, name: Path | str) -> None:
    """UserError for an adapter, or a model with one beside it, which transformers would put into the model unasked."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.name: wanted a model without an adapter, got {name} with adapter_config.json: name the base model here and the "
            "adapter as lora.init_from (answering: --adapter), or move the adapter's two files out of a whole model's folder"
        )


def in_one_line(error: Exception) -> str:
    """An exception's text; with its type where the text alone is hardly one, like a KeyError's."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else text[:297] + "..."
