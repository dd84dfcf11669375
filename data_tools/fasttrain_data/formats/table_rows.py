"""Rows of a data file whatever its container: JSON lines, a JSON array, Parquet, a folder of Parquet shards or of datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.formats.arrow_folder import arrow_table, is_arrow_folder
from fasttrain_data.formats.splits import parquet_files
from fasttrain_data.jsonl import Row, read_rows

_BATCH = 64  # rows with embedded images are large


def iterate_rows(
    path: Path, bad: Callable[[BadRow], object] | None = None, split: str | None = None
) -> Iterator[tuple[str, str, Row]]:
    """(file, place, row), streamed; UserError for a file that cannot be read as one of them.

    A line that is no JSON object goes to `bad`, if that is given. split: which of a folder's.
    """
    if split is not None and not path.is_dir():
        raise UserError(f"--split: wanted a folder of several splits, got {path}")
    if path.is_dir() and is_arrow_folder(path):
        folder = path if split is None else path / split
        yield from _numbered(folder, arrow_table(folder).to_batches(max_chunksize=_BATCH))
    elif path.is_dir():
        for file in parquet_files(path, split):
            yield from _parquet_rows(file)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        for place, row in read_rows(path, bad):
            yield str(path), place, row


def first_of(row: Row, *keys: str) -> Any:
    """The first of these columns that holds something: a file may have `images` and `image`, one of them empty."""
    given = [row[key] for key in keys if row.get(key) is not None]
    return next((value for value in given if value not in ("", [])), given[0] if given else None)


def _parquet_rows(path: Path) -> Iterator[tuple[str, str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _numbered(path, file.iter_batches(batch_size=_BATCH))
    except FileNotFoundError:
        raise UserError(f"{path}: wanted a file, got nothing there") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: wanted a Parquet file, got {str(error).splitlines()[0]}") from None


def _numbered(path: Path, batches: Iterable[Any]) -> Iterator[tuple[str, str, Row]]:
    rows = (row for batch in batches for row in _python_rows(batch))
    for number, row in enumerate(rows, start=1):
        yield str(path), f"row {number}", row


def _python_rows(batch: Any) -> list[Row]:
    """The rows of a batch; a value that Python cannot hold (dates beyond its own) is told as its text, or is None."""
    try:
        rows: list[Row] = batch.to_pylist()
    except (ValueError, OverflowError):
        columns = [[_python_value(cell) for cell in column] for column in batch.columns]
        rows = [dict(zip(batch.schema.names, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return rows


def _python_value(cell: Any) -> Any:
    import pyarrow as pa

    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        pass
    try:
        return cell.cast(pa.string()).as_py()
    except (pa.ArrowException, ValueError):
        return None
