"""The key of a cached reference log-prob: a hash of everything it depends on."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.config import ModelConfig
from fasttrain.errors import UserError
from fasttrain.files import HashMemo

_VERSION = 1  # raised when the way log-probs are computed changes their values
_INCIDENTAL = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype")


def model_identity(
    folder: Path, model_config: Any, config: ModelConfig, dtype: str, adapter: Path | None, memo: HashMemo
) -> dict[str, Any]:
    """What identifies the reference model: contents of its weights, configuration and own code, dtype, quantisation, adapter.

    Weights are identified by content: a hub file by the blob hash its link points to, a local file by its own hash,
    remembered by size and times.
    """
    settings = {key: value for key, value in model_config.to_dict().items() if key not in _INCIDENTAL}
    identity: dict[str, Any] = {
        "version": _VERSION,
        "weights": {path.name: _weight_hash(path, memo) for path in sorted(folder.glob("*.safetensors"))},
        "config": blake2b(
            json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16
        ).hexdigest(),
        "dtype": dtype,
        "quantize": config.quantize,
    }
    if config.trust_remote_code and (code := sorted(folder.glob("*.py"))):
        identity["code"] = {path.name: memo(path) for path in code}
    if config.quantize and hasattr(model_config, "vision_config"):
        identity["quantised"] = "all but patch embeddings" + " and projector" * config.train_projector
    if adapter is not None:
        names = ("adapter_model.safetensors", "adapter_config.json")
        try:
            identity["adapter"] = {name: memo(adapter / name) for name in names}
        except OSError as error:
            raise UserError(f"lora.init_from: cannot read {error.filename}: {error.strerror}") from None
    memo.save()
    return identity


def _weight_hash(path: Path, memo: HashMemo) -> str:
    target = path.resolve()
    if target.parent.name == "blobs" and len(target.name) == 64:
        return target.name  # the hub's own sha256
    return memo(path)


def identity_hash(identity: dict[str, Any]) -> str:
    return blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


class CompletionKeys:
    """Keys (20 bytes) of completions, given the model and how images become pixels."""

    def __init__(self, model_hash: str, pixel_hash: str) -> None:
        self.model_hash, self.pixel_hash = model_hash, pixel_hash

    def of_group(
        self, prompt_ids: np.ndarray, image_hashes: list[str], completion_ids: list[np.ndarray]
    ) -> list[bytes]:
        """The same keys however many prompts share the group's: what is given of a completion (~id) belongs to its prompt."""
        model = blake2b(self.model_hash.encode(), digest_size=20)
        if image_hashes:
            model.update(" ".join([self.pixel_hash, *image_hashes]).encode())
        prompts: dict[bytes, Any] = {}
        keys = []
        for ids in completion_ids:
            given = int(np.argmax(ids >= 0))
            prompt = np.concatenate([prompt_ids, ~ids[:given]]).astype(np.int32)
            name = prompt[len(prompt_ids) :].tobytes()
            if name not in prompts:
                prompts[name] = model.copy()
                prompts[name].update(len(prompt).to_bytes(8, "little"))
                prompts[name].update(prompt.tobytes())
            digest = prompts[name].copy()
            digest.update(np.ascontiguousarray(ids[given:], np.int32).tobytes())
            keys.append(digest.digest())
        return keys
