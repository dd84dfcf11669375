"""The command `fasttrain answer`: the file it writes, mistakes in one line, and the moment of a kill."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasttrain import cli
from fasttrain.answering.local import LocalModel
from fasttrain.answering.questions import read_questions
from fasttrain.errors import UserError


def test_a_model_that_cannot_answer_is_a_mistake_in_one_line(
    tiny_llava: Path, picture_questions: Path, tmp_path: Path, run_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from safetensors.torch import load_file, save_file

    for name in ("nan", "grid", "gap"):
        shutil.copytree(tiny_llava, tmp_path / name)
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights[next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))].fill_(float("nan"))
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    del weights[next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(weights, tmp_path / "gap" / "model.safetensors", {"format": "pt"})
    settings = tmp_path / "grid" / "processor_config.json"
    settings.write_text(settings.read_text().replace('"patch_size": 7', '"patch_size": 14'))
    for name, message in (
        ("nan", "its logits are not numbers"),
        ("grid", "another number of image tokens"),
        ("gap", "wanted every weight in"),
    ):
        words = ("answer", "-m", tmp_path / name, picture_questions, "-o", tmp_path / f"{name}.jsonl")
        assert run_command(*words, "--max-new-tokens", 3) == 2
        assert (
            f"--model: {message}"
            in capsys.readouterr().err.replace("the processor writes ", "").splitlines()[-1]
        )


def test_the_file_has_one_row_per_question_in_order_in_the_official_formats(
    tiny_llava: Path,
    picture_questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_command: Callable[..., int],
    tiny_models: ModuleType,
) -> None:
    out = tmp_path / "answers.jsonl"
    words = ("answer", "-m", tiny_llava, picture_questions, "-o", out, "--max-new-tokens", 5)
    assert run_command(*words) == 0
    rows = tiny_models.read_rows(out)
    assert [row["question_id"] for row in rows] == list(range(11))
    assert set(rows[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert rows[0]["model_id"] == "tiny-llava" and rows[0]["metadata"] == {
        "finish_reason": "length",
        "tokens": 5,
    }
    assert set(rows[3]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert rows[3]["choices"][0]["index"] == 0 and len(rows[3]["choices"][0]["turns"]) == 2
    before = out.read_bytes()
    monkeypatch.setattr(
        LocalModel, "generator", property(lambda self: pytest.fail("the weights were loaded"))
    )
    assert run_command(*words) == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1}, "question: wanted a question under turns, text"),
        ({"question_id": [1], "text": "a"}, "question_id: wanted text or an integer"),
        ({"question_id": 1, "turns": []}, "turns: wanted a list of texts"),
        ({"question_id": 1, "turns": ["a", "<image> b"]}, "turns: wanted <image> in the first turn only"),
        ({"question_id": 1, "text": "a", "image": "../outside.png"}, "a path inside the image root"),
        ({"question_id": 1, "text": "a", "image": "absent.png"}, "wanted an existing image file"),
        ({"question_id": 1, "text": "a", "image": "questions.jsonl"}, "images: wanted an image"),
        ({"question_id": 7, "text": "a"}, "question_id: wanted an id of its own"),
        ({"question_id": 1, "conversations": []}, "fasttrain-data questions"),
        ([1], "row: wanted a JSON object"),
    ],
)
def test_a_mistake_in_a_question_is_one_line_with_its_place(
    row: Any, message: str, tmp_path: Path, tiny_llava: Path, run_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str], tiny_models: ModuleType,
) -> None:  # fmt: skip
    questions = tiny_models.write_rows(tmp_path / "questions.jsonl", [{"question_id": 7, "text": "b"}, row])
    assert run_command("answer", "-m", tiny_llava, questions, "-o", tmp_path / "a.jsonl") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "questions.jsonl line 2" in err and message in err
    assert not (tmp_path / "a.jsonl").exists()


def test_images_under_a_key_that_is_not_read_are_told(
    tmp_path: Path, tiny_models: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question_id": 1, "text": "a"}, {"question_id": 2, "text": "b", "image_path": "b.png"}]
    read_questions(tiny_models.write_rows(tmp_path / "q.jsonl", rows))
    told = "line 2: image_path is not read; images go under images or image; questions asked without any: 1\n"
    assert told in capsys.readouterr().err


def test_what_lies_behind_the_first_questions_asked_for_does_not_matter(
    tmp_path: Path, tiny_models: ModuleType
) -> None:
    rows = [{"question_id": 1, "text": "a"}, {"question_id": 2, "text": "b", "image": "not_here.png"}]
    path = tiny_models.write_rows(tmp_path / "q.jsonl", rows)
    assert [question.id for question in read_questions(path, limit=1)] == [1]
    with pytest.raises(UserError, match="line 2"):
        read_questions(path)


def test_other_mistakes_are_one_line(
    tmp_path: Path, tiny_text: Path, tiny_llava: Path, text_questions: Path, picture_questions: Path,
    run_command: Callable[..., int], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("precious\n")
    for words, message in (
        (("-m", tmp_path, text_questions, "-o", tmp_path / "a.jsonl"), "--model: wanted a model folder"),
        (
            ("-m", tiny_text, tmp_path / "none", "-o", tmp_path / "a.jsonl"),
            "wanted a file, got nothing there",
        ),
        (
            ("-m", tiny_text, "-a", tmp_path, text_questions, "-o", tmp_path / "a.jsonl"),
            "--adapter: wanted a folder",
        ),
        (
            ("-m", tiny_text, picture_questions, "-o", tmp_path / "a.jsonl"),
            "text-only row for a model that is run on text only",
        ),
        (("-m", tiny_text, text_questions, "-o", text_questions), "wanted another file than the input"),
        (("-m", tiny_text, text_questions, "-o", tmp_path / "mine.jsonl"), "was not written here"),
        (
            ("-m", "x", "--server", "localhost", text_questions, "-o", tmp_path / "a.jsonl"),
            "--server: wanted http",
        ),
        *(
            (
                ("-m", "x", "--server", url, text_questions, "-o", tmp_path / "a.jsonl"),
                f"--server: wanted an address with a host, got '{url}'",
            )
            for url in ("http://[::1", "http://", "http://xn--/", f"http://{'a' * 70}.com/v1")
        ),
    ):
        assert run_command("answer", *words) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"


def test_help_answers_without_torch() -> None:
    code = "import sys; sys.argv = ['fasttrain', 'answer', '--help']\n" \
        "from fasttrain import cli\ntry: cli.main()\nfinally: assert 'torch' not in sys.modules"  # fmt: skip
    assert (
        "Answer every question"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.slow
@pytest.mark.forks
def test_answering_that_is_killed_again_and_again_writes_the_undisturbed_file(
    tiny_llava: Path, picture_questions: Path, tmp_path: Path
) -> None:
    out, calm = tmp_path / "answers.jsonl", tmp_path / "calm.jsonl"

    def start(output: Path) -> int:
        """The command in a forked child with a session of its own (imports are done once, here)."""
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            sys.stdout = sys.stderr = (tmp_path / "log.txt").open("a", buffering=1)
            sys.argv = ["fasttrain", "answer", "-m", str(tiny_llava), str(picture_questions), "-o", str(output),
                        "--batch-size", "1", "--max-new-tokens", "40", "--model-id", "m"]  # fmt: skip
            cli.main()
            os._exit(0)
        except BaseException:  # noqa: BLE001 (a forked child must not return into pytest)
            os._exit(1)

    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start(calm), 0)[1]) == 0, (tmp_path / "log.txt").read_text()
    duration = time.monotonic() - begun
    rng, kills, resumed = random.Random(1), 0, 0
    while not out.exists():
        held = tmp_path / "answers.journal.jsonl"
        before = held.read_bytes().count(b"\n") if held.exists() else 0
        pid = start(out)
        resumed += 0 < before < 11
        if kills == 6:
            os.waitpid(pid, 0)
            break
        time.sleep(duration * rng.uniform(0.2, 0.8))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        if held.exists() and not out.exists():  # as if the last line had been torn by a power cut
            with held.open("ab") as file:
                file.write(b'{"key": "torn')
    assert kills > 1 and resumed
    assert out.read_bytes() == calm.read_bytes()
    journal = [json.loads(line) for line in (tmp_path / "answers.journal.jsonl").read_text().splitlines()]
    assert sorted(entry["question_id"] for entry in journal) == list(range(11))  # nothing was answered twice
