"""What a run writes as it goes: metrics.jsonl, pair_changes.jsonl and the trackers, in step with its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttrain.train.metrics import MetricsFile
from fasttrain.train.trackers import Trackers


class RunLog:
    """Lines of logged steps, cut back to step `done`; on a rank that does not write (`main` false), nothing."""

    def __init__(self, folder: Path, config: dict[str, Any], done: int, *, main: bool, changes: bool) -> None:
        names = ["metrics.jsonl", *(["pair_changes.jsonl"] if changes else [])] if main else []
        self._files = [MetricsFile(folder / name, keep_through=done) for name in names]
        self._trackers = Trackers(config["track"] if main else [], folder, config, done + 1)

    def write(self, line: dict[str, Any], changes: list[list[float]]) -> None:
        """A step's metrics, and its pairs that moved most and least: [row, place, chosen, rejected] each."""
        if not self._files:
            return
        self._files[0].write(line)
        for file in self._files[1:]:
            file.write({"step": line["step"], "epoch": line["epoch"], "pairs": changes})
        self._trackers.log(line, line["step"])

    def sync(self) -> None:
        """On disk before the checkpoint that continues from here."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        self._trackers.close()  # first: a full disk ends the files' closing
        for file in self._files:
            file.close()
