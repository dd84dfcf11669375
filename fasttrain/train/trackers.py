"""TensorBoard, Weights & Biases, Trackio: told every metrics line; none of them can stop a run."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from typing import Any

INSTALL = {
    "tensorboard": "pip install 'fasttrain-dpo[track]'",
    "wandb": "pip install wandb",
    "trackio": "pip install trackio",
}


class _TensorBoard:
    def __init__(self, folder: Path, config: dict[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, line: dict[str, Any], step: int) -> None:
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandbLike:
    """wandb, and trackio, which copies its calls."""

    def __init__(self, module: str, folder: Path, config: dict[str, Any]) -> None:
        self._module = importlib.import_module(module)
        options = {"dir": str(folder)} if module == "wandb" else {}
        self._module.init(project="fasttrain", name=folder.name, config=config, **options)

    def log(self, line: dict[str, Any], step: int) -> None:
        self._module.log({name: value for name, value in line.items() if name != "step"}, step=step)

    def close(self) -> None:
        self._module.finish()


class Trackers:
    """All trackers of the recipe. One that is missing or fails is named once on stderr and left out."""

    def __init__(self, names: list[str], folder: Path, config: dict[str, Any], first_step: int) -> None:
        self._open: dict[str, Any] = {}
        # what ended TensorBoard's own thread, which writes its file
        self._lost: list[BaseException | None] = []
        self._hook = threading.excepthook
        threading.excepthook = self._note_lost
        for name in names:
            try:
                if name == "tensorboard":
                    self._open[name] = _TensorBoard(folder, config, first_step)
                else:
                    self._open[name] = _WandbLike(name, folder, config)
            except ImportError:
                print(f"fasttrain: {name} is not installed, not tracked ({INSTALL[name]})", file=sys.stderr)
            except Exception as error:  # noqa: BLE001 (a tracker must not stop a run)
                print(f"fasttrain: {name} failed, not tracked: {error}", file=sys.stderr)

    def log(self, line: dict[str, Any], step: int) -> None:
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(line, step)
            except Exception as error:  # noqa: BLE001 (a tracker must not stop a run)
                print(f"fasttrain: {name} failed, no longer tracked: {error}", file=sys.stderr)
                del self._open[name]

    def close(self) -> None:
        for name, tracker in self._open.items():
            try:
                tracker.close()
                if name == "tensorboard" and self._lost and self._lost[0]:
                    raise self._lost[0]
            except Exception as error:  # noqa: BLE001 (a tracker must not stop a run)
                print(f"fasttrain: {name} failed while closing: {error}", file=sys.stderr)
        threading.excepthook = self._hook

    def _note_lost(self, given: threading.ExceptHookArgs) -> None:
        """Keep TensorBoard's failure for where it is told: the thread's traceback says no more."""
        if type(given.thread).__module__.startswith("tensorboard."):
            self._lost.append(given.exc_value)
        else:
            self._hook(given)
