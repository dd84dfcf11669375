"""Pair files as rows one can fetch by number, without holding them in memory.

JSON lines are indexed by byte offset and memory-mapped, folders of datasets memory-mapped as they are; Parquet and foreign
layouts are spooled once to a memory-mapped file.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from fasttrain.data.bad_row import BadRow, printable
from fasttrain.data.json_lines import JsonLines, json_problem
from fasttrain.errors import UserError, mistakes_of_data_tools
from fasttrain.files import cache_root, naming

_AT_ONCE = 64  # rows with images inside are some MB
_READ = ("images", "image", "prompt", "chosen", "rejected", "completion", "id")  # by `pairs.read_pair`
_LOOKED_AT = 100  # rows in which a readable one is looked for, to tell the layout


class Source(Protocol):
    """One pair file. `folder` is where its relative image paths start; `passed_over` what held no pair, and why.

    `bad` are rows of a foreign layout that could not be read as one.
    """

    folder: Path
    passed_over: list[tuple[str, str]]
    bad: list[BadRow]

    def __len__(self) -> int: ...
    def row(self, number: int) -> dict[str, Any]: ...
    def rows(self, start: int, end: int) -> Iterator[dict[str, Any] | BadRow]: ...
    def where(self, number: int) -> str: ...


def _each(source: Source, start: int, end: int) -> Iterator[dict[str, Any] | BadRow]:
    for number in range(start, end):
        try:
            yield source.row(number)
        except BadRow as error:
            yield error


class ArrowRows:
    """Rows of a memory-mapped Arrow table, whose batches are searched: slicing a table walks all of them."""

    def __init__(self, table: Any, folder: Path, label: str) -> None:
        self.folder, self.label = folder, label
        self.passed_over: list[tuple[str, str]] = []
        self.bad: list[BadRow] = []
        self._batches = [batch for batch in table.to_batches() if batch.num_rows]
        self._ends = list(itertools.accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def where(self, number: int) -> str:
        return f"{self.label} row {number + 1}"

    def rows(self, start: int, end: int) -> Iterator[dict[str, Any] | BadRow]:
        """Rows from `start` up to `end`, the bad ones as what is wrong with them."""
        while start < end:
            index = bisect.bisect_right(self._ends, start)
            batch = self._batches[index]
            offset = start - (self._ends[index] - batch.num_rows)
            count = min(end - start, batch.num_rows - offset, _AT_ONCE)
            try:
                yield from batch.slice(offset, count).to_pylist()
            except (ValueError, OverflowError):
                yield from _each(self, start, start + count)
            start += count

    def row(self, number: int) -> dict[str, Any]:
        index = bisect.bisect_right(self._ends, number)
        batch = self._batches[index]
        offset = number - (self._ends[index] - batch.num_rows)
        try:
            rows: list[dict[str, Any]] = batch.slice(offset, 1).to_pylist()
            return rows[0]
        except (ValueError, OverflowError):  # text that is no UTF-8, dates beyond Python's
            return self._what_is_read(batch, offset, number)

    def _what_is_read(self, batch: Any, offset: int, number: int) -> dict[str, Any]:
        """A row without the columns that Python cannot hold; BadRow if one of them is a pair's."""
        row: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                row[name] = column[offset].as_py()
            except (ValueError, OverflowError) as error:
                if name in _READ:
                    raise BadRow(
                        self.where(number), "row", "values that Python can hold", str(error)
                    ) from None
        return row


def open_source(path: Path) -> Source:
    """Open a pair file or datasets folder; UserError if it cannot be read as one."""
    if not path.exists():
        start = (
            "" if path.is_absolute() else f" (relative paths start at the working directory, {Path.cwd()})"
        )
        raise UserError(
            f"{path}: data.train/data.eval: wanted a pair file or folder, got nothing there{start}"
        )
    source: Source
    suffix = path.suffix.lower()
    if path.is_dir():
        source = _open_datasets_folder(path)
    elif suffix == ".parquet":
        source = _open_parquet(path)
    elif suffix == ".json":
        source = _open_json(path)
    elif suffix in (".jsonl", ".ndjson"):
        source = JsonLines(path)
    else:
        raise UserError(
            f"{path}: wanted .jsonl, .json, .parquet or a datasets folder, got {path.suffix or 'no suffix'}"
        )
    if not len(source):
        raise UserError(f"{path}: wanted at least one row, got none")
    return _convert_foreign(path, source)


def _convert_foreign(path: Path, source: Source) -> Source:
    """Rows in another project's layout become rows in ours, spooled to a temporary file."""
    first = first_readable(source)
    if first is None or _is_ours(first):
        return source
    from fasttrain_data.formats import detect_format, read_pairs
    from fasttrain_data.formats.taught import is_taught, read_taught

    passed_over: list[tuple[str, str]] = []
    bad: list[BadRow] = []
    with mistakes_of_data_tools():
        form = detect_format(first)
        ours = form in (None, "trl")
        if ours and not is_taught(first):
            return source

        def tell(error: Any) -> None:
            bad.append(BadRow.told(error.where, printable(error.reason)))

        if ours:
            spooled = _spool(read_taught(path, tell), path, unit="conversation")
        else:
            pairs = read_pairs(path, form, lambda where, why: passed_over.append((where, why)), tell)
            spooled = _spool(pairs, path, unit="pair")  # a row may hold no pair, or several
    if not len(spooled) and bad:
        raise bad[0]
    if not len(spooled):
        raise UserError(
            f"{path}: wanted at least one pair, got none" + (f" ({passed_over[0][1]})" if passed_over else "")
        )
    spooled.folder, spooled.passed_over, spooled.bad = source.folder, passed_over, bad
    return spooled


def first_readable(source: Source) -> dict[str, Any] | None:
    """The first row that can be read, of those that are looked at to tell the layout."""
    for number in range(min(len(source), _LOOKED_AT)):
        try:
            return source.row(number)
        except BadRow:  # reported, or skipped, when the rows are read
            continue
    return None


def _is_ours(row: dict[str, Any]) -> bool:
    """Whether `pairs.read_pair` takes the row as it is, whatever other keys it has."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if prompt is not None and chosen is None and row.get("completion") is not None:
        return True  # TRL's prompt-completion format
    if not isinstance(chosen, list):
        return prompt is not None and isinstance(chosen, str)
    said = all(isinstance(message, dict) and "role" in message for message in chosen)
    return said and (prompt is None or len(chosen) == 1)


def _open_json(path: Path) -> Source:
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        return JsonLines(path)
    from fasttrain_data.errors import BadRow as BadArray
    from fasttrain_data.jsonl import array_rows

    with contextlib.suppress(BadArray, ValueError, RecursionError):  # told by line below
        return _spool((row for _, row in array_rows(path)), path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: wanted UTF-8, got byte {error.object[error.start]:#04x} at {error.start}"
        ) from None
    except (ValueError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: wanted a JSON array, got {json_problem(error)}") from None
    return _spool(rows, path)


def _spool(rows: Iterable[Any], path: Path, unit: str = "row") -> JsonLines:
    """Rows as JSON lines in an unlinked temporary file that lives as long as its mapping."""
    folder = cache_root() / "spool"
    folder.mkdir(parents=True, exist_ok=True)
    with (
        naming(folder, reads=True),
        tempfile.NamedTemporaryFile("w", dir=folder, suffix=".jsonl", encoding="utf-8") as file,
    ):
        for row in rows:
            file.write(json.dumps(row, default=_as_json) + "\n")
        file.flush()
        source = JsonLines(Path(file.name), label=str(path), unit=unit)
    source.folder = path.parent
    return source


def _as_json(value: Any) -> Any:
    """Bytes as images are spooled; dates, decimals and whatever else other tools' columns hold as text."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    return str(value)


def _open_parquet(path: Path) -> ArrowRows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = cache_root() / "spool"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        parquet = pq.ParquetFile(path)
        with naming(folder, reads=True), tempfile.NamedTemporaryFile(dir=folder, suffix=".arrow") as file:
            with pa.ipc.new_file(file, parquet.schema_arrow) as writer:
                for batch in parquet.iter_batches(batch_size=64):
                    writer.write_batch(batch)
            file.flush()
            table = pa.ipc.open_file(pa.memory_map(file.name)).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's: Arrow reports damage as an OSError without a number
        raise UserError(f"{path}: wanted a Parquet file, got {_first_line(error)}") from None
    return ArrowRows(table, path.parent, str(path))


def _open_datasets_folder(path: Path) -> ArrowRows:
    from fasttrain_data.formats.arrow_folder import arrow_table, is_arrow_folder

    if not is_arrow_folder(path) and (shards := sorted(path.rglob("*.parquet"))):
        raise UserError(
            f"{path}: wanted a folder written by datasets' save_to_disk, got {len(shards)} Parquet files; "
            f"name those of a split in a list, as [{shards[0]}]"
        )
    with mistakes_of_data_tools():
        return ArrowRows(arrow_table(path), path, str(path))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def iterate(sources: list[Source]) -> Iterator[tuple[int, int]]:
    """Every (source, row) in file order."""
    for index, source in enumerate(sources):
        for number in range(len(source)):
            yield index, number
