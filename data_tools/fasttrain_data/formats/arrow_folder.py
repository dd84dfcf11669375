"""A data set's folder as `save_to_disk` of Hugging Face's datasets writes it, as one memory-mapped table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fasttrain_data.errors import UserError


def is_arrow_folder(path: Path) -> bool:
    """Whether a folder is one of a data set, or of several splits."""
    return any((path / name).exists() for name in ("state.json", "dataset_dict.json"))


def arrow_table(path: Path) -> Any:
    """The rows of all its Arrow files; UserError if it is no such folder, of several splits, damaged or empty."""
    import pyarrow as pa

    if (path / "dataset_dict.json").exists():
        splits = sorted(state.parent for state in path.glob("*/state.json"))
        example = f", for example {splits[0]}" if splits else ""
        raise UserError(f"{path}: wanted one split of this datasets folder{example}, got all of it")
    try:
        names = [entry["filename"] for entry in json.loads((path / "state.json").read_text())["_data_files"]]
        elsewhere = [name for name in names if Path(name).name != name]
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"{path}: wanted a folder written by datasets' save_to_disk, got no valid state.json"
        ) from None
    if elsewhere:
        raise UserError(f"{path / 'state.json'}: wanted names of files in its folder, got {elsewhere[0]}")
    try:
        tables = [pa.ipc.open_stream(pa.memory_map(str(path / name))).read_all() for name in names]
        table = pa.concat_tables(tables) if tables else pa.table({})
    except (pa.ArrowException, OSError, ValueError) as error:
        told = str(error).strip() or type(error).__name__
        raise UserError(f"{path}: broken Arrow file: {told.splitlines()[0]}") from None
    if not table.num_rows:
        raise UserError(f"{path}: wanted at least one row, got none")
    return table
