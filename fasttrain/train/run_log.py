"""What a run writes as it goes: metrics.jsonl, pair_changes.jsonl and the trackers, in step with its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttrain.progress import say
from fasttrain.train.metrics import MetricsFile
from fasttrain.train.trackers import Trackers


class RunLog:
    """Lines of logged steps, cut back to step `done`; on a rank that does not write (`main` false), nothing."""

    def __init__(self, folder: Path, config: dict[str, Any], done: int, *, main: bool, changes: bool) -> None:
        names = ["metrics.jsonl", *(["pair_changes.jsonl"] if changes else [])] if main else []
        self._files = [MetricsFile(folder / name, keep_through=done) for name in names]
        self._trackers = Trackers(config["track"] if main else [], folder, config, done + 1)

    def lines(self) -> dict[str, int]:
        """How many lines each file holds."""
        return {file.path.name: file.lines for file in self._files}

    def tell_lost(self, lines: dict[str, int]) -> None:
        """Warn of files that hold fewer than the checkpoint that the run goes on from counted: the user's record has a gap."""
        for file in self._files:
            before = lines.get(file.path.name, 0)
            if file.lines < before:
                say(
                    f"warning: {file.path}: {file.lines} of the {before} lines up to the checkpoint are there; the run goes on to "
                    "the same weights, but its report lacks those steps"
                )

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
