"""What a run was made from, by content: kept in its checkpoints, so that a resumed run is not silently another one."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain.data.prepared_cache import contents
from fasttrain.errors import UserError

if TYPE_CHECKING:
    from fasttrain.train.job import Job


def fingerprints(job: Job) -> dict[str, str]:
    """A hash by name of each input: pair files, model weights, model configuration, tokenizer and template, adapter."""
    found = {}
    for field in ("train", "eval"):
        names = getattr(job.config.data, field) or []
        for name in [names] if isinstance(names, str) else names:
            path = Path(name).expanduser()
            if field == "train" or not path.is_dir():  # a benchmark folder is watched, not trained on
                found[f"data.{field} {name}"] = _digest(contents(path, job.memo))
    found["the weights of model.name"] = _digest(job.identity["weights"])
    found["the configuration of model.name"] = _digest(job.identity["config"])
    fast = getattr(job.chat.tokenizer, "backend_tokenizer", None)
    template = str(getattr(job.processor, "chat_template", None))
    found["the tokenizer or chat template of model.name"] = _digest(
        [fast and fast.to_str(), template, job.chat.end_tokens]
    )
    if "code" in job.identity:
        found["the Python code in the folder of model.name"] = _digest(job.identity["code"])
    if job.chat.written_date:
        found["the date that the chat template of model.name writes"] = _digest(job.chat.written_date)
    if "adapter" in job.identity:
        found["lora.init_from"] = _digest(job.identity["adapter"])
    job.memo.save()
    return found


def check_inputs(checkpoint: Path, now: dict[str, str]) -> None:
    """UserError if an input is no longer what it was when the checkpoint was written; older checkpoints do not tell."""
    try:
        before: dict[str, str] = json.loads((checkpoint / "state.json").read_text()).get("inputs", {})
    except (OSError, ValueError, AttributeError):
        return  # damaged: restoring it says so
    changed = [name for name in before if name in now and before[name] != now[name]]
    if changed:
        raise UserError(
            f"--resume: changed since {checkpoint} was written: {', '.join(changed)}; put back what it was, or start anew "
            "with --overwrite"
        )


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
