"""JSON rows in and out: streamed reading that names file and line, files that appear whole or not at all."""

from __future__ import annotations

import base64
import contextlib
import datetime
import errno
import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from fasttrain_data.errors import BadRow, UserError

Row = dict[str, Any]
_CHUNK = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NON_FINITE = "NaN or infinity written as null"
_NO_JSON = {
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it first",
    b"PK\x03\x04": "a zip file: unpack it first",
    b"PAR1": "a Parquet file: write it as JSON lines",
}
_BETWEEN = re.compile(r"[\s,]*")


def read_rows(path: Path, bad: Callable[[BadRow], object] | None = None) -> Iterator[tuple[str, Row]]:
    """(place, row) of a JSON-lines file or a JSON array, streamed; place is "line 3" or "row 3".

    The content decides, not the suffix: several published `.json` files hold JSON lines. BadRow names the
    first row that is not a JSON object, or goes to `bad` and the next row follows; what breaks a JSON array ends it.
    UserError if the file is missing.
    """
    if not path.is_file():
        raise UserError(f"{path}: wanted a file, got {'a folder' if path.is_dir() else 'nothing there'}")
    rows = array_rows(path) if _head_of(path).startswith(b"[") else _line_rows(path, bad)
    for place, row in rows:
        if isinstance(row, dict):
            yield place, row
            continue
        error = BadRow(path, place, "row", "a JSON object", row)
        if bad is None:
            raise error
        bad(error)


def _head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, kind in _NO_JSON.items():
        if head.startswith(magic):
            raise UserError(f"{path}: wanted JSON, got {kind}")
    return head


def read_lines(path: Path) -> Iterator[tuple[int, str, Row]]:
    """(byte offset, place, row) of a JSON-lines file: what `row_at` needs to fetch a row again."""
    if not path.is_file():
        raise UserError(f"{path}: wanted a JSON-lines file, got nothing there")
    if _head_of(path).startswith(b"["):
        raise UserError(f"{path}: wanted JSON lines, one object a line, got a JSON array")
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield offset, f"line {number}", parse_line(raw, path, f"line {number}")
            offset += len(raw)


def parse_line(raw: bytes, path: object, place: str) -> Row:
    row = _parse(raw, path, place)
    if not isinstance(row, dict):
        raise BadRow(path, place, "row", "a JSON object", row)
    return row


def _parse(raw: bytes, path: object, place: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow(path, place, "row", "UTF-8", f"byte {raw[error.start]:#04x}") from None
    except ValueError as error:
        raise BadRow(path, place, "row", "a JSON object", f"invalid JSON ({_problem(error)})") from None
    except RecursionError:
        raise BadRow(path, place, "row", "a JSON object", "JSON nested too deeply") from None


def _problem(error: ValueError) -> str:
    """What is wrong with JSON text: its syntax, or a number of thousands of digits."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _line_rows(path: Path, bad: Callable[[BadRow], object] | None) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = _parse(raw, path, f"line {number}")
            except BadRow as error:
                if bad is None:
                    raise
                bad(error)
                continue
            yield f"line {number}", row


def array_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Elements of one big array, holding one chunk and one element at a time."""
    decoder = json.JSONDecoder()
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        try:
            buffer = file.read(max(_CHUNK, 4096))
            at = buffer.index("[") + 1
            while True:
                at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
                if buffer[at : at + 1] == "]":
                    if (buffer[at + 1 :] + file.read(_CHUNK)).strip():
                        raise BadRow(
                            path, f"row {number + 1}", "row", "nothing behind the array", "more data"
                        )
                    return
                problem = "the array does not end"
                try:
                    value, end = decoder.raw_decode(buffer, at)
                except ValueError as error:
                    end, problem = len(buffer), _problem(error)
                if end < len(buffer):  # else it may go on in the next chunk
                    number, at = number + 1, end
                    yield f"row {number}", value
                elif chunk := file.read(max(_CHUNK, len(buffer) - at)):
                    buffer, at = buffer[at:] + chunk, 0
                else:
                    wanted = "a JSON array of objects"
                    raise BadRow(path, f"row {number + 1}", "row", wanted, f"invalid JSON ({problem})")
        except UnicodeDecodeError as error:
            got = f"byte {error.object[error.start]:#04x}"
            raise BadRow(path, f"row {number + 1}", "row", "UTF-8", got) from None
        except RecursionError:
            got = "JSON nested too deeply"
            raise BadRow(path, f"row {number + 1}", "row", "a JSON object", got) from None


class LineFile:
    """Rows of a JSON-lines file by byte offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")

    def row_at(self, offset: int) -> Row:
        self._file.seek(offset)
        return parse_line(self._file.readline(), self.path, f"byte {offset}")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LineFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_output(output: Path, *inputs: Path, parquet: bool = False) -> None:
    """UserError if the output is a folder, a device, one of the files it is made from, or named Parquet and will not be."""
    if output.suffix == ".parquet" and not parquet:
        raise UserError(
            f"--out: wanted a name for JSON, got {output}; Parquet is what export --to trl writes"
        )
    if output.is_dir():
        raise UserError(f"--out: wanted a file, got the folder {output}")
    if _is_special(output):
        raise UserError(f"--out: wanted a file, got {output}, a device or a pipe")
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise UserError(f"--out: wanted another file than the input, got {output}")


def _is_special(path: Path) -> bool:
    """Whether the path is something else than a file or a folder: a file put in its place would end it."""
    return path.exists() and not path.is_file() and not path.is_dir()


def dump_row(row: Row) -> str:
    """One line of JSON, without its line break, whatever columns of other tools the row has.

    NaN and infinity are written as null, dates as ISO 8601, bytes as {"base64": ...}, other values as their text. A
    lone surrogate is written as its escape: the text comes back as it was, and UTF-8 can hold the line.
    """
    try:
        text = _dumps(row)
    except ValueError:  # NaN or infinity
        text = _dumps(_finite(row))
    return encoded(text).decode()


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "), allow_nan=False, default=_as_json)


def _as_json(value: Any) -> Any:
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    return str(value)


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def has_non_finite(value: Any) -> bool:
    """Whether NaN or infinity is in a row, which `dump_row` writes as null."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(map(has_non_finite, value.values()))
    return isinstance(value, list | tuple) and any(map(has_non_finite, value))


def finite_number(value: Any) -> float | None:
    """A JSON number as a float; None for anything else, NaN and infinity, and a whole number that no float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def encoded(text: str) -> bytes:
    """UTF-8; a lone surrogate, which JSON can hold and UTF-8 cannot, as the escape that JSON has for it."""
    return text.encode("utf-8", "backslashreplace")


def is_unicode(text: str) -> bool:
    """Whether the text holds no lone surrogate: records, SDKs, tokenizers and file names take none."""
    return text.isascii() or encoded(text).decode() == text


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """OSError of the block with the file's name: the system tells none when a write fails."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Any]:
    """A binary file to write; it takes the name `path`, or that of the file it links to, only when the block ends well.

    UserError for a device or a pipe.
    """
    if _is_special(path):
        raise UserError(f"{path}: wanted a file to write, got a device or a pipe")
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            with naming(path):
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the same disk may fail again
            temporary.unlink(missing_ok=True)
        # what was read while the block wrote is not this file's failure
        ours = isinstance(error, OSError) and error.errno in _NO_ROOM and error.filename is None
        if isinstance(error, OSError) and (ours or error.filename == str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with naming(path.parent):
            os.fsync(folder)
    finally:
        os.close(folder)


def _remove_leftovers(path: Path) -> None:
    """Delete what a killed writer of this file left; a living one's is kept."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = leftover.name.split(".")[-2]
        if pid.isdigit() and not _is_alive(int(pid)):
            leftover.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def whole_rows(path: Path) -> Iterator[Callable[[Row], None]]:
    """A function that writes rows to a JSON-lines file which appears whole or not at all."""
    with whole_file(path) as file:
        yield lambda row: file.write((dump_row(row) + "\n").encode())


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(encoded(text))
