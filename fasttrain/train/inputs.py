"""What a run was made from, by content: kept in its checkpoints, so that a resumed run is not silently another one."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrain.data.groups import image_hash
from fasttrain.data.images import ImageRef
from fasttrain.data.prepared import PreparedData
from fasttrain.data.prepared_cache import contents
from fasttrain.errors import UserError
from fasttrain.files import HashMemo, user_path
from fasttrain.train.checkpoint import read_state

if TYPE_CHECKING:
    from fasttrain.train.job import Job


def fingerprints(job: Job) -> dict[str, str]:
    """A hash by name of each input: pair files and their images, model weights, model configuration, processor, adapter.

    To be asked for before groups are dropped.
    """
    found = {}
    for field in ("train", "eval"):
        names = getattr(job.config.data, field) or []
        for name in [names] if isinstance(names, str) else names:
            path = user_path(name)
            if field == "train" or not path.is_dir():  # a benchmark folder is watched, not trained on
                found[f"data.{field} {name}"] = _digest(contents(path, job.memo))
    for field, data in (("train", job.train), ("eval", job.eval)):
        if data is not None:
            found |= _of_rows(field, data, job.memo)
    found["the weights of model.name"] = _digest(job.identity["weights"])
    found["the configuration of model.name"] = _digest(job.identity["config"])
    fast = getattr(job.chat.tokenizer, "backend_tokenizer", None)
    template = str(getattr(job.processor, "chat_template", None))
    found["the tokenizer or chat template of model.name"] = _digest(
        [fast and fast.to_str(), template, job.chat.end_tokens]
    )
    found["the special tokens of model.name"] = _digest(job.chat.tokenizer.special_tokens_map)
    if job.chat.pixels is not None:
        found["the image processor of model.name"] = job.chat.fingerprint()
    if "code" in job.identity:
        found["the Python code in the folder of model.name"] = _digest(job.identity["code"])
    if job.chat.written_date:
        found["the date that the chat template of model.name writes"] = _digest(job.chat.written_date)
    if "adapter" in job.identity:
        found["lora.init_from"] = _digest(job.identity["adapter"])
    job.memo.save()
    return found


def _of_rows(field: str, data: PreparedData, memo: HashMemo) -> dict[str, str]:
    """Which rows can be used, and what is in their image files; of many, in some of them: no start reads them all."""
    account = data.account
    counts = [account.rows, account.pairs, account.groups, account.images]
    left_out = sorted(entry.where for entry in account.skipped)
    found = {f"the usable rows of data.{field}": _digest([counts, left_out])}
    if account.images:
        images = [_image(ref, memo) for number in data.some_groups() for ref in data.images(number)]
        found[f"the images of data.{field}"] = _digest(images)
    return found


def _image(ref: ImageRef, memo: HashMemo) -> str:
    """The hash of an image file; one within the pair file is hashed with it."""
    try:
        return "" if ref.path is None else image_hash(ref, memo)
    except OSError:  # gone since it was first seen: whoever needs it says so
        return "gone"


def check_inputs(checkpoint: Path, now: dict[str, str]) -> None:
    """UserError if an input is no longer what it was when the checkpoint was written; older checkpoints do not tell."""
    before = read_state(checkpoint)["inputs"]
    changed = [name for name in before if name in now and before[name] != now[name]]
    if changed:
        raise UserError(
            f"--resume: changed since {checkpoint} was written: {', '.join(changed)}; put back what it was, or start anew "
            "with --overwrite"
        )


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
