"""Prepared data on disk: a second start over the same files reads no row and tokenizes nothing.

An entry is a folder under `prepared/` of the cache root, named by a hash of everything that the tokens depend on: contents of
the pair files, where their image paths start, the settings of `data`, tokenizer, template, image settings, versions. Image
files may change beside a pair file that does not: their sizes and times are compared when an entry is opened, and
the data carries what they were as `image_state`. An entry that does not fit, or whose files are not byte for byte what was
written, is made again; the newest `KEPT` stay.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain import __version__
from fasttrain.config import DataConfig
from fasttrain.data.group_tokens import Tokenizing
from fasttrain.data.groups import PairFiles, Skipped
from fasttrain.data.prepared import Account, PreparedData
from fasttrain.data.tokens import ChatTokenizer
from fasttrain.files import (
    HashMemo,
    atomic_folder,
    cache_root,
    file_state,
    naming,
    remove_dead,
    user_path,
)

VERSION = 7  # raised when the same rows become other tokens, groups or pairs
KEPT = 8
SMALLEST = 2000  # rows; fewer are prepared in about a second


def entry_key(
    paths: list[str], roots: list[Path], data: DataConfig, chat: ChatTokenizer, memo: HashMemo, **more: Any
) -> str | None:
    """Name of the entry; None where what decides the tokens cannot be seen (a tokenizer without a fast form).

    roots: for each of the paths, the folder where its rows' image paths start.
    """
    fast = getattr(chat.tokenizer, "backend_tokenizer", None)
    if fast is None:
        return None
    what = {
        "version": [VERSION, __version__, *(importlib.metadata.version(n) for n in ("transformers", "tokenizers", "jinja2"))],
        "files": [
            [path, os.path.realpath(root), *contents(user_path(path), memo)]
            for path, root in zip(paths, roots, strict=True)
        ],
        "data": [data.max_length, data.overflow, data.on_bad_row, data.group_by],
        "tokenizer": [fast.to_str(), str(getattr(chat.processor, "chat_template", None)), chat.end_tokens, chat.bos],
        "special": chat.tokenizer.special_tokens_map,  # a template may write them; the fast form does not name them
        "images": [chat.fingerprint(), chat.image_token_id, _settings(chat.processor)],
        "more": more,
    }  # fmt: skip
    if chat.written_date:
        what["date"] = chat.written_date
    memo.save()
    return blake2b(json.dumps(what, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def are_hashed(paths: list[str], memo: HashMemo) -> bool:
    """Whether the contents of all these files are known already."""
    return all(memo.knows(file) for path in paths for file in _files(user_path(path)))


def _settings(processor: Any) -> Any:
    """What a vision model's processor is set to; a tokenizer is hashed whole."""
    return [type(processor).__name__, processor.to_dict() if hasattr(processor, "image_processor") else None]


def contents(path: Path, memo: HashMemo) -> list[str]:
    """Hashes of a file, or of the files of a folder."""
    return [memo(file) for file in _files(path)]


def _files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in files if file.is_file()]


class ImageWitness:
    """The image files that rows name, with sizes and times, folded into one hash as the rows go by."""

    def __init__(self) -> None:
        self._digest = blake2b(digest_size=16)
        self._folder = Path(tempfile.gettempdir())
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed by `close`)

    def see(self, paths: list[str]) -> None:
        with naming(self._folder):
            self._file.write("".join([json.dumps(path) + "\n" for path in paths]))
        for path in paths:
            self._digest.update(_state_of(path))

    def written(self, folder: Path) -> str:
        """Write the names into `folder`; the hash over them."""
        with naming(self._folder):
            self._file.seek(0)
        with (folder / "images.jsonl").open("w", encoding="utf-8") as out:
            shutil.copyfileobj(self._file, out)
        return self._digest.hexdigest()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take is tried once more
            self._file.close()


def _state_of(path: str) -> bytes:
    try:
        size, *times = file_state(path)
    except OSError:
        return b"gone"
    return f"{path} {size} {times}".encode("utf-8", "surrogatepass")


def _images_now(folder: Path) -> str:
    digest = blake2b(digest_size=16)
    with (folder / "images.jsonl").open(encoding="utf-8") as file:
        for line in file:
            digest.update(_state_of(json.loads(line)))
    return digest.hexdigest()


def _sums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file of an entry but the one that holds them: against damage, at some GB a second."""
    return {path.name: _sum(path) for path in folder.iterdir() if path.name != "sums.json"}


def _sum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
    return total


def load(
    key: str, files: PairFiles, chat: ChatTokenizer, tokenizing: Callable[..., Tokenizing]
) -> PreparedData | None:
    """The data of an entry; None if there is none, an image changed since, or the entry is not whole."""
    folder = cache_root() / "prepared" / key
    try:
        if json.loads((folder / "sums.json").read_text(encoding="utf-8")) != _sums(folder):
            return None
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if about["images"] != _images_now(folder):
            return None
        account = Account(
            **about["account"] | {"skipped": [Skipped(**s) for s in about["account"]["skipped"]]}
        )
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in PreparedData.ARRAYS}
        prepared = PreparedData(files, account, arrays, tokenizing)
        os.utime(folder)  # the newest stay
    except (OSError, ValueError, KeyError, TypeError):
        return None
    prepared.key, prepared.image_state = key, about["images"]
    chat.appended_end += about["appended_end"]
    chat.split_boundary += about["split_boundary"]
    return prepared


def store(key: str, prepared: PreparedData, witness: ImageWitness | _Copied, notes: dict[str, int]) -> None:
    """Write an entry and remove the oldest; a full or read-only disk only costs the next start its time."""
    if any(skipped.reason.startswith("image") for skipped in prepared.account.skipped):
        return  # that file may appear, or open, tomorrow
    folder = cache_root() / "prepared" / key
    try:
        remove_dead(folder)
        with atomic_folder(folder) as temporary:
            for name, array in prepared.arrays().items():
                np.save(temporary / f"{name}.npy", array)
            state = witness.written(temporary)
            about = {"account": asdict(prepared.account), "images": state, **notes}
            (temporary / "about.json").write_text(json.dumps(about), encoding="utf-8")
            (temporary / "sums.json").write_text(json.dumps(_sums(temporary)), encoding="utf-8")
        entries = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in entries[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        return
    prepared.key, prepared.image_state = key, state


class _Copied:
    """The witness of an entry that is there already."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.names, self.digest = (folder / "images.jsonl").read_bytes(), digest

    def written(self, folder: Path) -> str:
        (folder / "images.jsonl").write_bytes(self.names)
        return self.digest


def replace(prepared: PreparedData, split_boundary: int) -> None:
    """Write the entry of data that got more tokens again; without it the next start makes them again."""
    if prepared.key is None or prepared.dropped:
        return
    folder = cache_root() / "prepared" / prepared.key
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        witness = _Copied(folder, about["images"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    notes = {
        "appended_end": about["appended_end"],
        "split_boundary": about["split_boundary"] + split_boundary,
    }
    store(prepared.key, prepared, witness, notes)


@contextlib.contextmanager
def counted(chat: ChatTokenizer) -> Iterator[Callable[[], dict[str, int]]]:
    """What the tokenizer had to note about answers while the block ran."""
    before = {"appended_end": chat.appended_end, "split_boundary": chat.split_boundary}
    yield lambda: {name: getattr(chat, name) - value for name, value in before.items()}
