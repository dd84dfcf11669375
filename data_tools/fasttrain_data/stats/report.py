"""The report of a file, whatever it holds: annotations or pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttrain_data.errors import UserError, shorten
from fasttrain_data.ids import content_hash
from fasttrain_data.jsonl import read_rows
from fasttrain_data.records import Annotation, parse_record
from fasttrain_data.spill import SeenKeys
from fasttrain_data.stats.annotation_report import annotation_report
from fasttrain_data.stats.collect import AnnotationSums


def make_report(path: Path) -> dict[str, Any]:
    """Numbers about annotations.jsonl, or about any preference file; UserError if it is neither."""
    from fasttrain_data.formats import detect_format
    from fasttrain_data.formats.detect import first_keys
    from fasttrain_data.stats.pair_report import pair_report

    if path.is_file() and path.suffix != ".parquet":
        first = next(iter(read_rows(path)), None)
        if first is None:
            raise UserError(f"{path}: wanted annotations or pairs, got an empty file")
        if {"question", "completions"} <= set(first[1]):
            return _annotations(path)
    if detect_format(path) is None:
        raise UserError(f"{path}: wanted annotations or pairs, got {shorten(first_keys(path))}")
    return pair_report(path)


def _annotations(path: Path) -> dict[str, Any]:
    """A prompt annotated with the same outcome again, over the same answers, counts once, as in `pair`."""
    sums, seen, repeated = AnnotationSums(), SeenKeys(), 0
    for place, row in read_rows(path):
        annotation = parse_record(Annotation, row, path, place)
        answers = sorted(completion.text for completion in annotation.completions)
        if seen.add(content_hash(annotation.prompt_key(), answers, annotation.status == "ok")):
            sums.add(annotation)
        else:
            repeated += 1
    seen.close()
    return annotation_report(sums) | {"repeated_rows": repeated}
