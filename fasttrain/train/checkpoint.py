"""Checkpoints: weights, optimizer, position and every random state, in safetensors and JSON, whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fasttrain.errors import UserError
from fasttrain.files import atomic_folder, delete_whole, remove_leftovers, write_json
from fasttrain.progress import say
from fasttrain.ranks import is_node_writer, ranks
from fasttrain.train.engine import TrainedState
from fasttrain.train.tensor_file import TensorFile, TensorStream, content_hash, write_tensors


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [path for path in _by_age(folder) if (path / "state.json").is_file()]


def _by_age(folder: Path) -> list[Path]:
    """Folders of checkpoints, whole or not, oldest first: step-1000000 is newer than step-999999."""
    found = [path for path in folder.glob("step-*") if path.is_dir()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def save_checkpoint(
    folder: Path, step: int, optimizer: TrainedState, keep: int, inputs: dict[str, str] | None = None,
    lines: dict[str, int] | None = None,
) -> Path:  # fmt: skip
    """Write `step-000050/` under `folder` atomically, then delete all but the newest `keep`.

    `inputs` are fingerprints of what the run is made from, `lines` how many the run's log files hold by then.
    Every rank calls; the first writes for all, so the folder serves any number of ranks.
    """
    path = folder / checkpoint_name(step)
    tensors, plain = optimizer.state()
    weights = optimizer.weights()
    random = {
        f"{kind}.{rank}": state
        for rank, own in enumerate(ranks().gather(_random()))
        for kind, state in own.items()
    }
    if not ranks().main:  # take part in gathering what the first writes
        write_tensors(weights, None)
        write_tensors(tensors, None)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(path, reads=False) as temporary:
            streams = {
                "weights.safetensors": weights,
                "optimizer.safetensors": tensors,
                "random.safetensors": TensorStream.of(random),
            }
            files = {name: write_tensors(stream, temporary / name) for name, stream in streams.items()}
            state = {"step": step, "ranks": ranks().size, "inputs": inputs or {}, "files": files}
            write_json(temporary / "state.json", state | {"lines": lines or {}, "optimizer": plain})
        delete_old(folder, keep)
    ranks().barrier()
    return path


def delete_old(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`; a warning for what cannot be deleted, as the new one is there."""
    for old in list_checkpoints(folder)[:-keep]:
        try:
            delete_whole(old)
        except OSError as error:
            say(f"warning: {old}: cannot delete this old checkpoint: {error.strerror}")


def _random() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def restore_checkpoint(path: Path, optimizer: TrainedState) -> int:
    """Load weights, optimizer and random states; the step they belong to. UserError names a damaged file.

    Every rank calls.
    """
    damage: UserError | None = None
    try:
        state = read_state(path)
        if is_node_writer():  # once for all ranks of a machine
            _check_files(path, state["files"])
    except UserError as error:
        damage = error
    ranks().share_mistake(damage)
    try:
        random = load_file(path / "random.safetensors")
        with (
            TensorFile(path / "weights.safetensors") as weights,
            TensorFile(path / "optimizer.safetensors") as tensors,
        ):
            missing = set(optimizer.names) ^ set(weights)
            if missing:
                raise UserError(
                    f"{path}: the checkpoint is of another model: {min(missing)} is in only one of them"
                )
            optimizer.load_weights(weights)
            optimizer.load_state(tensors, state["optimizer"])
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, error) from None
    _restore_random(random, state["step"])
    return int(state["step"])


def _damaged(path: Path, problem: object) -> UserError:
    return UserError(
        f"{path}: the checkpoint is damaged ({problem}); delete that folder to use the one before"
    )


def read_state(path: Path) -> dict[str, Any]:
    """What state.json holds; UserError if it is no JSON, without what every checkpoint has, or of another step.

    `inputs`, `files` and `lines`, of which older checkpoints do not tell, are empty then.
    """
    try:
        state: Any = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    told: dict[str, Any] = {"inputs": {}, "files": {}, "lines": {}}
    state = told | state if isinstance(state, dict) else {}
    for name in ("step", "optimizer", *told):
        if not isinstance(state.get(name), int if name == "step" else dict):
            raise _damaged(path, f"state.json holds no {name}")
    if not all(isinstance(count, int) for count in state["lines"].values()):
        raise _damaged(path, "state.json holds no numbers in lines")
    if checkpoint_name(state["step"]) != path.name:
        raise _damaged(path, f"state.json holds step {state['step']}")
    return state


def _check_files(path: Path, files: dict[str, str]) -> None:
    """UserError unless the files are what was written."""
    for name, digest in files.items():
        if (path / name).exists() and not (path / name).is_file():  # reading a pipe or device may never end
            raise _damaged(path, f"{name} is no file")
        try:
            now = content_hash(path / name)
        except OSError as error:
            raise _damaged(path, error) from None
        if now != digest:
            raise _damaged(path, f"{name} is not what was written")


def _restore_random(random: dict[str, torch.Tensor], step: int) -> None:
    """This rank's generators; a rank that the saved run did not have draws its own from here."""
    rank = ranks().rank
    if f"cpu.{rank}" not in random:
        torch.manual_seed((step + 1) * 1_000_003 + rank)
        return
    torch.set_rng_state(random[f"cpu.{rank}"])
    if f"cuda.{rank}" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random[f"cuda.{rank}"])


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint, UserError if it is not complete; leftovers of a kill are cleared away."""
    if not folder.exists():
        return None
    remove_leftovers(folder)
    found = _by_age(folder)
    if found and not (found[-1] / "state.json").is_file():
        raise _damaged(found[-1], "state.json is missing")
    return found[-1] if found else None
