"""A step of a study, and the notes that tell whether it is done: what made its result, from which files, in what time."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from fasttrain.errors import UserError
from fasttrain.evaluate.results import RESULTS
from fasttrain.files import hash_file, write_json


@dataclass(frozen=True, kw_only=True)
class Task:
    """kind: data, train or evaluate. subject: what it is of, for the table. output: what is there when it is done.

    inputs: files whose content decides the output. folder: the study file's, where its paths start.
    """

    kind: str
    subject: str
    command: tuple[str, ...]
    output: Path
    note: Path
    after: Path | None = None  # note of the task whose result this one uses
    inputs: tuple[Path, ...] = ()
    folder: Path | None = None

    @property
    def shown(self) -> str:
        return shlex.join(self.command)

    @property
    def tried(self) -> Path:
        """The note of attempts since `note` that have not ended well."""
        return self.note.with_suffix(".tried.json")

    def is_done(self) -> bool:
        if not (self.output.exists() and self.note.exists()):
            return False
        if self.tried.exists() and _read_attempt(self.tried).found != _modified_ns(self.output):
            return False  # a later attempt left another output
        said, now = _read(self.note), self.read()
        if not self._used_that(said):
            return False
        if not self._is_command(said["command"], said.get("folder")):
            return False
        # notes of earlier versions do not tell what was read; paths are the command's, by whatever name
        return list(said.get("inputs", now).values()) == list(now.values())

    def used(self) -> str | None:
        """A hash of the note of what this task uses, which is another one when that is made anew; None without one."""
        return hash_file(self.after) if self.after and self.after.exists() else None

    def _used_that(self, said: dict[str, Any]) -> bool:
        """Whether the note `said` is of what is there now to use."""
        used = self.used()
        if "used" in said:
            return bool(said["used"] == used)
        if self.after is None or used is None:
            return True
        # notes of earlier versions do not tell: theirs is the older one, if the clock was never set back
        return self.after.stat().st_mtime_ns <= self.note.stat().st_mtime_ns

    def is_same(self, attempt: Attempt) -> bool:
        """Whether it was at this command with these files."""
        same_files = list(attempt.inputs.values()) == list(self.read().values())
        return same_files and self._is_command(attempt.command, attempt.folder)

    def _is_command(self, noted: str, folder: str | None) -> bool:
        """Whether a note's command is this one, `folder` being the study's when the note was written."""
        if noted == self.shown or noted in _as_typed(self.shown, self.folder):
            return True
        if folder is None or self.folder is None or not self.note.resolve().is_relative_to(self.folder):
            return False  # what lies outside may be another study's
        return _moved(noted, folder, str(self.folder)) == self.command

    def read(self) -> dict[str, str]:
        """A hash of each input's content, as the note keeps it."""
        return {str(path): _hash(path) for path in self.inputs}

    @property
    def may_be_incomplete(self) -> bool:
        """Whether its results are of use when some are missing, as a benchmark's are whose judge left some out."""
        return self.kind == "evaluate" and self.output.name == RESULTS

    @property
    def is_incomplete(self) -> bool:
        return self.note.exists() and "incomplete" in _read(self.note)

    @property
    def seconds(self) -> float | None:
        """How long it took, over all the attempts it needed; None if it is not known."""
        said = _read(self.note).get("seconds") if self.note.exists() else None
        return None if said is None else float(said)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A command that runs, or ended without success. seconds: over all attempts at the same result; None if not known.

    found: when the output was modified last before the first attempt since the task's note; None if there was none. As
    long as the output is that one, the note tells the truth of it. folder: the study's then. used: as `Task.used`.
    """

    command: str
    inputs: dict[str, str]
    seconds: float | None
    found: int | None
    folder: str | None = None
    used: str | None = None


def begin(task: Task) -> Attempt:
    """The attempt that starts now, written down before its command can change the output.

    It takes over the time of earlier attempts by the same command from the same files: a study that was stopped has
    not cost less.
    """
    command, inputs = task.shown, task.read()
    before = _read_attempt(task.tried) if task.tried.exists() else None
    found = before.found if before else _modified_ns(task.output)
    seconds: float | None = 0.0
    if before and task.is_same(before):
        seconds = before.seconds
    elif found is not None and not task.note.exists():
        seconds = None  # made outside the study, as by a scheduler: to go on with it takes no time
    folder = None if task.folder is None else str(task.folder)
    attempt = Attempt(
        command=command, inputs=inputs, seconds=seconds, found=found, folder=folder, used=task.used()
    )
    write_json(task.tried, asdict(attempt))
    return attempt


def keep_time(task: Task, attempt: Attempt, seconds: float) -> Attempt:
    """The attempt with what its command took, written down; the note of an earlier success stays as it is."""
    if attempt.seconds is not None:
        attempt = replace(attempt, seconds=attempt.seconds + seconds)
    write_json(task.tried, asdict(attempt))
    return attempt


def succeed(task: Task, attempt: Attempt, *, incomplete: bool) -> None:
    """Note which command made the output, from which files, in what time."""
    names = ("command", "inputs", "seconds", "folder", "used")
    note = {name: getattr(attempt, name) for name in names}
    write_json(task.note, note | ({"incomplete": True} if incomplete else {}))
    task.tried.unlink()


_TYPES: dict[str, tuple[type, ...]] = {
    "command": (str,),
    "inputs": (dict,),
    "seconds": (int, float, NoneType),
    "folder": (str, NoneType),
    "used": (str, NoneType),
    "found": (int, NoneType),
}


def _read(path: Path, required: tuple[str, ...] = ("command",)) -> dict[str, Any]:
    """What a note says; UserError for one that is damaged."""
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        wrong = [name for name in required if name not in said]
        wrong += [name for name, types in _TYPES.items() if name in said and type(said[name]) not in types]
        if wrong:
            raise ValueError(f"{wrong[0]} is missing or no {_TYPES[wrong[0]][0].__name__}")
        shlex.split(said["command"])
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: the study's note is damaged ({error}); delete it, and its step is done again"
        ) from None
    return said


def _read_attempt(path: Path) -> Attempt:
    said = _read(path, ("command", "inputs", "seconds", "found"))
    return Attempt(**{about.name: said[about.name] for about in fields(Attempt) if about.name in said})


def _moved(command: str, folder: str, now: str) -> tuple[str, ...]:
    """The command's words with the paths in a folder that has another name now; settings hold them as JSON."""

    def renamed(word: str) -> str:
        before, after = (json.dumps(path)[1:-1] if '="' in word else path for path in (folder, now))
        return re.sub(rf'(?<![^="]){re.escape(before)}(?![^/"])', lambda found: after, word)

    return tuple(renamed(word) for word in shlex.split(command))


def _as_typed(command: str, folder: Path | None) -> list[str]:
    """The command as earlier versions noted it: the folder as it was typed, relative to itself or to one above it."""
    if folder is None:
        return []
    parts = folder.parts[1:]
    typed = ["/".join(parts[first:]) for first in range(len(parts))]
    spelled = [command.replace(str(folder), path) for path in typed]
    inside = re.sub(rf"{re.escape(str(folder))}(/?)", lambda found: "" if found[1] else ".", command)
    return [*spelled, inside]


def _modified_ns(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _hash(path: Path) -> str:
    if not path.is_file():
        return ""
    found = path.stat()
    return _hash_version(path, found.st_size, found.st_mtime_ns)


@cache
def _hash_version(path: Path, size: int, modified_ns: int) -> str:
    return hash_file(path)
