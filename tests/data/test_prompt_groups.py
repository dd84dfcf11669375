"""Grouping: rows with the same prompt and the same image bytes, whatever the files are called."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttrain.data import groups as module
from fasttrain.data.bad_row import BadRow
from fasttrain.data.groups import PairFiles
from fasttrain.data.row_index import group_rows
from fasttrain.files import HashMemo


def bmp(colour: int) -> bytes:
    """Images of one size in bytes, whatever their colour."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (colour, 1, 2)).save(buffer, "BMP")
    return buffer.getvalue()


@pytest.fixture
def grouped(tmp_path: Path) -> Callable[..., tuple[list[list[int]], list[str]]]:
    """Writes rows (prompt, images) as a pair file; gives the rows of each group and the bad rows' places."""

    def group(*rows: tuple[Any, ...], files: dict[str, bytes]) -> tuple[list[list[int]], list[str]]:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        lines = []
        for number, (prompt, *images) in enumerate(rows):
            row = {"prompt": prompt, "chosen": f"good {number}", "rejected": "bad"}
            lines.append(json.dumps(row | ({"images": images} if images else {})))
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
        memo, bad = HashMemo(tmp_path / "hashes.sqlite"), []
        index = group_rows(
            PairFiles([str(tmp_path / "pairs.jsonl")], None), memo, lambda e: bad.append(e.where)
        )
        memo.close()
        assert len(index) == len(index.starts) - 1
        return [index.group(number).tolist() for number in range(len(index))], bad

    return group


def test_same_prompt_and_same_bytes_under_other_paths_are_one_group(grouped: Any) -> None:
    files = {"a.bmp": bmp(1), "copy.bmp": bmp(1), "deep/again.bmp": bmp(1)}
    assert grouped(("q", "a.bmp"), ("q", "copy.bmp"), ("q", "deep/again.bmp"), files=files)[0] == [[0, 1, 2]]


def test_same_prompt_and_size_with_other_bytes_are_groups_of_their_own(grouped: Any) -> None:
    files = {"a.bmp": bmp(1), "b.bmp": bmp(2), "c.bmp": bmp(1), "d.bmp": bmp(3), "e.bmp": bmp(2)}
    assert len(set(map(len, files.values()))) == 1
    found, _ = grouped(
        *[("q", name) for name in ("a.bmp", "b.bmp", "c.bmp", "d.bmp", "e.bmp", "a.bmp")], files=files
    )
    assert found == [[0, 2, 5], [1, 4], [3]]


def test_groups_stand_in_the_order_of_their_first_rows(grouped: Any) -> None:
    files = {"a.bmp": bmp(1)}
    rows = [("z",), ("a", "a.bmp"), ("m",), ("a", "a.bmp"), ("z",), ("a",)]
    assert grouped(*rows, files=files)[0] == [[0, 4], [1, 3], [2], [5]]


def test_the_order_of_images_and_their_places_matter(grouped: Any) -> None:
    files = {"a.bmp": bmp(1), "b.bmp": bmp(2), "c.bmp": bmp(1)}
    first = "<image>q<image>"
    rows = [(first, "a.bmp", "b.bmp"), (first, "b.bmp", "a.bmp"), ("<image><image>q", "a.bmp", "b.bmp"), (first, "c.bmp", "b.bmp")]  # fmt: skip
    assert grouped(*rows, files=files)[0] == [[0, 3], [1], [2]]


def test_a_missing_image_is_a_bad_row_and_the_others_still_group(grouped: Any) -> None:
    found, bad = grouped(("q", "a.bmp"), ("q", "none.bmp"), ("q", "a.bmp"), files={"a.bmp": bmp(1)})
    assert found == [[0, 2]] and [place.rpartition(" ")[2] for place in bad] == ["2"]


def test_an_image_that_cannot_be_read_is_a_bad_row(grouped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: HashMemo, path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(HashMemo, "__call__", denied)
    found, bad = grouped(("q", "a.bmp"), ("q", "b.bmp"), files={"a.bmp": bmp(1), "b.bmp": bmp(2)})
    assert found == [[0]] and len(bad) == 1


def test_images_are_hashed_only_where_prompt_and_size_agree(
    grouped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HashMemo, "__call__", lambda memo, path: pytest.fail(f"{path} was read"))
    files = {"a.bmp": bmp(1), "b.bmp": bmp(2), "long.bmp": bmp(2) + b"\0"}
    rows = [("q", "a.bmp"), ("q", "a.bmp"), ("other", "b.bmp"), ("q", "long.bmp"), ("text",), ("text",)]
    assert grouped(*rows, files=files)[0] == [[0, 1], [2], [3], [4, 5]]


def test_work_grows_with_the_rows_even_when_all_images_have_one_size(
    grouped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = module.read_pair, []
    monkeypatch.setattr(module, "read_pair", lambda *given: reads.append(1) or read(*given))
    files = {f"{number}.bmp": bmp(number) for number in range(200)}
    found, _ = grouped(*[("describe it", name) for name in files], files=files)
    assert found == [[number] for number in range(200)]
    assert len(reads) <= 2 * 200


def test_groups_equal_a_plain_comparison_of_prompts_and_bytes(grouped: Any) -> None:
    rng = random.Random(7)
    files = {f"{number}.bmp": bmp(number % 4) + b"\0" * (number % 3) for number in range(24)}
    rows = [(rng.choice("xyz"), *rng.sample(sorted(files), rng.choice([0, 1, 1, 2]))) for _ in range(300)]
    truth: dict[Any, list[int]] = {}
    for number, (prompt, *images) in enumerate(rows):
        truth.setdefault((prompt, *(files[name] for name in images)), []).append(number)
    assert grouped(*rows, files=files)[0] == list(truth.values())


def test_a_bad_row_goes_to_on_bad_or_stops(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('nope\n{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    memo = HashMemo(tmp_path / "hashes.sqlite")

    def stop(error: BadRow) -> None:
        raise error

    with pytest.raises(BadRow, match=r"pairs\.jsonl line 1: row"):
        group_rows(PairFiles([str(tmp_path / "pairs.jsonl")], None), memo, stop)
    memo.close()
