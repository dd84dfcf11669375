"""Records, their published schemas, the command's help, and that the docs show both as they are."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fasttrain_data
from fasttrain_data.account import listing_path
from fasttrain_data.calls.journal import journal_path
from fasttrain_data.commands.group import COMMANDS
from fasttrain_data.errors import BadRow
from fasttrain_data.pairs.build import held_out_path
from fasttrain_data.records import Annotation, Completion, Pair, Question, parse_record
from fasttrain_data.schema import RECORDS, schema_text


@pytest.mark.parametrize("kind", RECORDS)
def test_the_published_schema_is_the_records(kind, repository):
    """After a change: python -m fasttrain_data.schema docs/schema."""
    path = repository / "docs" / "schema" / f"{kind}.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(schema_text(kind))


def test_records_written_by_hand_need_only_what_no_stage_could_know():
    question = Question.model_validate({"id": "q", "question": "Why?", "image": "a.png", "mine": 1})
    assert question.row() == {"id": "q", "question": "Why?", "images": ["a.png"], "mine": 1}
    completion = {"id": "c", "question_id": "q", "image": "a.png", "question": "Why?", "text": "So."}
    assert Completion.model_validate(completion).images == ["a.png"]
    annotation = {"question": "Why?", "completions": [{"text": "So.", "helpfulness": 3}]}
    assert Annotation.model_validate(annotation).status == "ok"
    turn = [{"role": "user", "content": "x"}]
    assert Pair.model_validate({"id": "p", "prompt": turn, "chosen": turn, "rejected": turn}).images == []


CALL = {"key": "k", "vote": 0, "order": [0], "status": "ok", "scores": [[4, 3, 2, 1, 0]]}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (Question, {"id": "q"}, "question: wanted a value, got nothing"),
        (Question, {"id": "q", "question": "  "}, "question: wanted text that is not blank, got ' '"),
        (Question, {"id": "q", "question": 3}, "question: wanted a valid string, got 3"),
        (Question, {"id": "q", "question": "\ud800"}, "question: wanted valid Unicode"),
        (
            Completion,
            {"id": "c", "question_id": "q", "question": "x", "text": "y", "count": 0},
            "count: wanted greater than or equal to 1, got 0",
        ),
        (
            Annotation,
            {"question": "x", "completions": [{"text": "y", "verbosity": 5}]},
            "completions.0.verbosity: wanted less than or equal to 4, got 5",
        ),
        (
            Annotation,
            {"question": "x", "completions": [{"text": "y"}], "status": "fine"},
            "status: wanted 'ok', 'blocked_prompt'",
        ),
        (Annotation, {"question": "x", "completions": []}, "completions: wanted "),
        (Annotation, {"question": "x", "completions": [{"text": "y", "count": 0}]}, "completions.0.count: "),
        (
            Annotation,
            {"question": "x", "completions": [{"text": "y"}], "calls": [CALL | {"order": [1, 0]}]},
            "calls: wanted call 0 to grade the 1 completions here",
        ),
        (
            Annotation,
            {"question": "x", "completions": [{"text": "y"}], "calls": [CALL | {"order": [-1]}]},
            "calls: wanted call 0",
        ),
        (
            Annotation,
            {"question": "x", "completions": [{"text": "y"}], "calls": [CALL | {"scores": [[1, 2]]}]},
            "calls: wanted call 0 with 5 scores",
        ),
    ],
)
def test_a_wrong_record_names_its_field(kind, row, message):
    with pytest.raises(BadRow) as caught:
        parse_record(kind, row, "f.jsonl", "line 3")
    assert str(caught.value).startswith(f"f.jsonl line 3: {message}")


def test_prompts_differ_by_image_history_and_question():
    base = {"id": "q", "question": "Why?", "images": ["a.png"]}
    others = [
        {**base, "images": ["b.png"]},
        {**base, "question": "Who?"},
        {**base, "history": [{"role": "user", "text": "Hi"}]},
    ]
    keys = {Question.model_validate(row).prompt_key() for row in [base, *others]}
    assert len(keys) == 4


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example(name, command):
    code, stdout, _ = command(name, "--help")
    assert (code, f"Example: fasttrain-data {name}" in re.sub(r"\s+", " ", stdout)) == (0, True)


def test_the_docs_show_the_help_of_every_command_as_it_is(repository, command, monkeypatch):
    """After a change: python -m fasttrain_data.help_text docs/data.md."""
    from fasttrain_data.help_text import help_section

    text = (repository / "docs" / "data.md").read_text(encoding="utf-8")
    assert help_section() in text


def test_help_and_package_import_neither_torch_nor_the_trainer():
    code = (
        "import sys\n"
        "import fasttrain_data, fasttrain_data.gemini_double\n"
        "from fasttrain_data.commands.group import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'fasttrain', 'google.genai', 'matplotlib', 'pyarrow', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_interrupt_while_the_command_is_imported_is_one_line():
    """A Ctrl-C in the first moment, as click is asked for: none of it is imported before it can be told."""
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'click':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from fasttrain_data.cli import main\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "fasttrain-data: stopped; start the same command again to go on\n"
    assert (ended.returncode, ended.stderr) == (130, said)


def test_no_module_imports_torch_or_the_trainer_when_it_is_loaded(repository):
    folder = repository / "data_tools" / "fasttrain_data"
    modules = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        if parts[-1] != "__main__":
            modules.append(".".join(part for part in parts if part != "__init__"))
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "assert not {'torch', 'transformers', 'fasttrain', 'google.genai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_public_names_are_there_and_no_others_are_promised():
    assert sorted(fasttrain_data.__all__) == fasttrain_data.__all__
    for name in fasttrain_data.__all__:
        assert getattr(fasttrain_data, name) is not None
    with pytest.raises(AttributeError):
        _ = fasttrain_data.nonsense
    assert set(fasttrain_data._HOMES) | {"BadRow", "UserError"} == set(fasttrain_data.__all__)
    for name, home in fasttrain_data._HOMES.items():
        assert hasattr(importlib.import_module(f"fasttrain_data.{home}"), name)


def test_mistakes_on_the_command_line_are_one_line_with_exit_code_2(command, tmp_path):
    for arguments in (
        ("anotate",),
        ("pair",),
        ("pair", tmp_path / "no.jsonl", "-o", "x"),
        ("stats", "--nonsense", "x"),
    ):
        code, stdout, stderr = command(*arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "did you mean 'annotate'" in command("anotate")[2]


@pytest.mark.parametrize("name", ["questions", "complete", "annotate", "pair", "steer", "export", "import"])
def test_no_stage_writes_over_its_input_or_a_folder(name, command, tmp_path, write_rows):
    more = {
        "complete": ["-m", "x", "--server", "http://127.0.0.1:1"],
        "annotate": ["--model", "x", "--dry-run"],
        "export": ["--to", "trl"],
    }
    path = write_rows(tmp_path / "in.jsonl", [{"question": "Why?"}])
    before = path.read_text()
    for output, wanted in ((path, "another file than the input"), (tmp_path, "got the folder")):
        code, _, stderr = command(name, path, "-o", output, *more.get(name, []))
        assert (code, wanted in stderr, stderr.count("\n")) == (2, True, 1)
    assert path.read_text() == before


def test_docs_and_help_name_the_files_beside_an_output_as_they_are_named(repository):
    told = "".join((repository / "docs" / page).read_text(encoding="utf-8") for page in ("cli.md", "data.md"))
    assert "OUT." not in told
    outputs = {name: Path(f"{name}.jsonl") for name in ("answers", "completions", "annotations")}
    for path in [*map(journal_path, outputs.values()), listing_path(Path("questions.jsonl")),
                 listing_path(Path("pairs.jsonl")), held_out_path(Path("pairs.jsonl"))]:  # fmt: skip
        assert path.name in told
