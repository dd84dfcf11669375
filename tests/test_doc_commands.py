"""Every command in README.md and docs/ runs, in order, in a small world that has the files they name, or says why it cannot.

A block of commands is fenced; a command that does not run here ends in a remark `# needs ...` (a GPU, a key, an hour), or its
block follows a comment `<!-- not run: needs ... -->`. The world has the names that the documents use: recipe.yaml,
pairs.jsonl, MODEL and llava-hf/llava-1.5-13b-hf (both the demo's model), data/pope, and a double of Gemini in place of the real one.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
PROGRAMS = {
    "fasttrain", "fasttrain-data", "python", "pip", "make", "torchrun", "deepspeed", "srun", "ssh", "export", "bash", "git",
    "apt-get", "sudo", "pytest",
}  # fmt: skip
WHY_NOT = (
    "a GPU", "GPUs", "a key", "a network", "a scheduler", "other machines", "a machine of its own", "a larger model",
    "minutes", "an hour", "a server", "a person",
)  # fmt: skip
REMARK = re.compile(rf"#.*\bneeds ((?:{'|'.join(WHY_NOT)}).*?)\s*$")
BLOCK_REMARK = re.compile(r"<!-- not run: needs (.+?) -->\s*$")


@dataclass(frozen=True)
class Command:
    """line: where it stands. why_not: the reason its remark gives, None for a command that is run."""

    line: int
    text: str
    why_not: str | None


def commands_of(text: str) -> Iterator[Command]:
    """Commands of the fenced blocks of a document, continued lines joined, remarks taken off."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"(\s*)```(\w*)\s*$", lines[number])
        if fence is None:
            number += 1
            continue
        end = next(i for i in range(number + 1, len(lines)) if lines[i].startswith(fence[1] + "```"))
        body, first = lines[number + 1 : end], number + 2
        before = next((line for line in reversed(lines[:number]) if line.strip()), "")
        excused = BLOCK_REMARK.search(before)
        if fence[2] in ("", "bash", "sh", "console") and any(_starts_a_command(line) for line in body):
            yield from _commands(body, first, excused[1] if excused else None)
        number = end + 1


def _starts_a_command(line: str) -> bool:
    words = line.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return bool(words) and words[0] in PROGRAMS


def _commands(body: list[str], first: int, excused: str | None) -> Iterator[Command]:
    held, start = "", 0
    for number, line in enumerate(body, start=first):
        held, start = (held, start) if held else ("", number)
        held += line.strip()
        if held.endswith("\\"):
            held = held[:-1]
            continue
        remark = REMARK.search(held)
        text = re.sub(r"(^|\s)#.*$", "", held).strip()
        if text:
            yield Command(start, text, excused or (remark[1] if remark else None))
        held = ""


def test_remarks_and_continued_lines_are_read() -> None:
    text = "\n".join(
        ["```", "fasttrain env", "fasttrain dpo \\", "  -c a.yaml  # needs a GPU", "```", "```json", "{}", "```",
         "<!-- not run: needs a scheduler -->", "", "```bash", "srun x", "wait", "```", "```", "fasttrain: error: x", "```"]
    )  # fmt: skip
    assert list(commands_of(text)) == [
        Command(2, "fasttrain env", None), Command(3, "fasttrain dpo -c a.yaml", "a GPU"),
        Command(12, "srun x", "a scheduler"), Command(13, "wait", "a scheduler"),
    ]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_not_run_says_why(document: str) -> None:
    for command in commands_of((REPOSITORY / document).read_text(encoding="utf-8")):
        if command.why_not is not None:
            assert command.why_not.startswith(WHY_NOT), f"{document} line {command.line}: needs what?"
        else:
            program = shlex.split(command.text)[0]
            assert program in ("fasttrain", "fasttrain-data", "python", "export", "cp") or "=" in program, (
                f"{document} line {command.line}: {command.text!r} is neither run nor marked `# needs ...`"
            )


STUDY = """\
output: runs/study
recipe: recipe.yaml
models: {tiny: MODEL}
answers: {tiny: {annotations: annotations.jsonl, image_root: data}}
runs: [{method: rejection}]
settings: {all: {train.max_steps: 1}}
evaluate: {held_out: {questions: questions_with_answers.jsonl, image_root: data, max_new_tokens: 8}}
"""
RECIPE = """\
model: {name: MODEL}
lora: {rank: 4, alpha: 8}
data: {train: pairs.jsonl, image_root: data, workers: 0}
train: {output: runs/first, max_steps: 2, pairs_per_step: 4, checkpoint_every: null}
track: []
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the documents' commands are typed in; copied for each document."""
    from fasttrain.demo.chart_files import write_pope, write_questions
    from fasttrain.demo.run import MODEL

    folder = tmp_path_factory.mktemp("world")
    data = folder / "data"
    charts = write_questions(data, 8, 11, "train")
    rows = [json.loads(line) for line in charts.read_text().splitlines()]
    charts.unlink()
    _write_sources(folder, rows)
    write_pope(data / "pope", 6, 11, "held_out")
    (data / "mt_bench").mkdir()
    turns = {"question_id": 81, "category": "writing", "turns": ["How many bars are there?", "And now?"]}
    (data / "mt_bench" / "question.jsonl").write_text(json.dumps(turns) + "\n")
    (data / "mmbench").mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "study.yaml").write_text(STUDY)
    for name in ("MODEL", "llava-hf/llava-1.5-13b-hf", "llava-hf/llava-1.5-7b-hf"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(MODEL)
    for name in ("recipes", "examples", "bench"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "images").symlink_to("data/images")  # some documents name the folder, some do not
    _train(folder)
    return folder


def _train(folder: Path) -> None:
    """runs/paper, the adapter that the page about evaluation has from elsewhere."""
    from fasttrain import load_config, train_dpo

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_dpo(load_config("recipe.yaml", ["train.output=runs/paper"]))


def _write_sources(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The questions as the public data sets have them, as our records, and pairs of them in both forms."""
    scigraphqa = [
        {"id": row["id"], "image_file": row["image"], "q_a_pairs": [[row["question"], row["answer"]]]} for row in rows
    ]  # fmt: skip
    for row in rows:  # LRV-Instruction names a photo by its number
        with Image.open(folder / "data" / row["image"]) as image:
            image.save(folder / "data" / f"{Path(row['image']).stem}.jpg")
    lrv = [{"image_id": Path(row["image"]).stem, "question": row["question"], "answer": "a"} for row in rows]
    pairs = [
        {"id": row["id"], "images": [row["image"]], "prompt": row["question"], "chosen": row["answer"],
         "rejected": f"I cannot say. {row['answer']} It is a very nice chart."}
        for row in rows
    ]  # fmt: skip
    (folder / "lrv.json").write_text(json.dumps(lrv))
    grades = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    annotations = [
        {"images": [row["image"]], "question": row["question"], "status": "ok",
         "completions": [{"text": text, **dict.fromkeys(grades, grade)} for text, grade in ((row["answer"], 4), ("No.", 0))]}
        for row in rows
    ]  # fmt: skip
    asked = [{**row, "reference_answer": row["answer"]} for row in rows]
    for name, lines in (
        ("scigraphqa", scigraphqa), ("questions", asked), ("questions_with_answers", asked), ("pairs", pairs),
        ("annotations", annotations),
    ):  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path) -> Iterator[Path]:
    from fasttrain_data.gemini_double import GeminiDouble

    folder = tmp_path / "here"
    shutil.copytree(world, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    with GeminiDouble(_judge) as double:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", double.url)
        monkeypatch.setenv("GEMINI_API_KEY", double.api_key)
        yield folder


def _judge(question: str, images: Any, answers: Any) -> list[dict[str, int]]:
    """Likes answers in the order of their texts, so that most prompts give a pair."""
    places = {answer: place for place, answer in enumerate(sorted(set(answers)))}
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return [dict.fromkeys(names, min(4, places[answer])) for answer in answers]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Runs one command, ours in this process; AssertionError unless it ends well."""
    import signal

    import fasttrain.cli
    import fasttrain_data.cli

    mains = {"fasttrain": fasttrain.cli.main, "fasttrain-data": fasttrain_data.cli.main}

    def run(text: str) -> None:
        words = shlex.split(text)
        if words[0] == "export" or "=" in words[0]:
            name, _, value = words[-1].partition("=")
            if name not in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):  # the double has its own
                monkeypatch.setenv(name, value)
            return
        if words[0] in ("python", "cp"):
            program = sys.executable if words[0] == "python" else "cp"
            done = subprocess.run([program, *words[1:]], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
            return
        handler = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr("sys.argv", words)
        code: Any = 0
        try:
            mains[words[0]]()
        except SystemExit as leave:
            code = leave.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
        said = capsys.readouterr()
        assert code == 0, f"exit code {code}\n{said.out[-1500:]}\n{said.err[-1500:]}"

    return run


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_of_the_document_run(document: str, here: Path, typed: Callable[[str], None]) -> None:
    for command in commands_of((REPOSITORY / document).read_text(encoding="utf-8")):
        if command.why_not is None:
            try:
                typed(command.text)
            except AssertionError as error:
                raise AssertionError(f"{document} line {command.line}: {command.text}\n{error}") from None
