"""Fixtures of the data tools: the command in this process, small images, rows as files."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fasttrain_data.questions.readers import read_drafts

Row = dict[str, Any]

for _name in ("turns", "format_records"):  # the folder is no package and not on the path
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None and _spec.loader is not None
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])


@pytest.fixture
def write_rows() -> Callable[[Path, Sequence[Row]], Path]:
    def write(path: Path, rows: Sequence[Row]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def read_rows() -> Callable[[Path], list[Row]]:
    return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def draw() -> Callable[..., Path]:
    """A small PNG whose bytes depend on `number`."""

    def draw_image(path: Path, number: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (number % 256, number // 256 % 256, 40)).save(path, "PNG")
        return path

    return draw_image


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs `fasttrain-data ARGS` in this process; returns (exit code, stdout, stderr)."""
    import signal

    from fasttrain_data.cli import main

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fasttrain-data", *map(str, args)])
        before = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as exit_info:
                main()
        finally:
            signal.signal(signal.SIGTERM, before)
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def drafts(tmp_path: Path, write_rows: Callable[..., Path]) -> Callable[..., list[Any]]:
    """`drafts(*rows)` reads the rows as a source of questions."""

    def read(*rows: Row, form: str | None = None, turns: Any = None) -> list[Any]:
        return list(read_drafts(write_rows(tmp_path / "source.jsonl", rows), form, turns))

    return read


@pytest.fixture
def folder(tmp_path: Path, draw: Callable[..., Path]) -> Path:
    """A folder with six pictures, a copy of one and a broken one."""
    for number in range(6):
        draw(tmp_path / "img" / f"{number}.png", number)
    draw(tmp_path / "img" / "copy of 0.png", 0)
    (tmp_path / "img" / "broken.png").write_bytes(b"no image")
    return tmp_path


@pytest.fixture
def questions(tmp_path: Path, write_rows: Callable[..., Path], tiny_models: Any) -> Path:
    """A questions file with two images; the questions are of different lengths."""
    names = [tiny_models.draw_image(tmp_path / f"{n}.png", n).name for n in (1, 2)]
    rows = [
        {"id": "qa", "images": [names[0]], "question": "what is the value of the red bar?"},
        {"id": "qb", "images": [names[1]], "question": "how many?"},
        {"id": "qc", "images": [names[0]], "question": "and the left bar between the bars in this chart?"},
    ]
    rows[2]["history"] = [{"role": "user", "text": "what is it?"}, {"role": "assistant", "text": "the chart"}]
    return write_rows(tmp_path / "questions.jsonl", rows)


@pytest.fixture
def completions(
    tmp_path: Path, write_rows: Callable[..., Path], draw: Callable[..., Path]
) -> Callable[..., Path]:
    """`completions(prompts, answers)` writes a completions file with an image for every third prompt."""

    def make(prompts: int = 6, answers: int = 4) -> Path:
        rows = []
        for number in range(prompts):
            name = f"img/{number % 3}.png"
            draw(tmp_path / name, number % 3)
            for sample in range(answers):
                text = f"It is {number}, I say {sample}."
                rows.append(
                    {
                        "id": f"c{number}-{sample}",
                        "question_id": f"q{number}",
                        "images": [name],
                        "question": f"What is {number}?",
                        "text": text,
                    }
                )
        return write_rows(tmp_path / "completions.jsonl", rows)

    return make


@pytest.fixture
def annotate(
    command: Callable[..., Any],
    tmp_path: Path,
    read_rows: Callable[[Path], list[Row]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """Runs the command against a double; returns (exit code, rows, stdout, stderr)."""

    def run(
        double: Any,
        path: Path,
        *args: object,
        out: str = "annotations.jsonl",
        model: str = "gemini-3.8-flash",
    ) -> tuple[int, list[Row], str, str]:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", double.url)
        monkeypatch.setenv("GEMINI_API_KEY", double.api_key)
        output = tmp_path / out
        code, stdout, stderr = command(
            "annotate", path, "-o", output, "--model", model, "--backoff", "0.01", *args
        )
        return code, read_rows(output) if output.exists() else [], stdout, stderr

    return run
