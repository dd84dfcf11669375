"""MMBench: the option an answer names, the circular rule, the table as published, the spreadsheet for the official site."""

from __future__ import annotations

import base64
import csv
import json
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fasttrain.errors import UserError
from fasttrain.evaluate.benchmarks import ReadOptions
from fasttrain.evaluate.mmbench import read
from fasttrain.evaluate.mmbench_file import read_rows, with_rotations
from fasttrain.evaluate.mmbench_score import circular_verdict, option_of, rotated

OPTIONS = {
    "A": "Father and daughter",
    "B": "Mother and son",
    "C": "Brother and sister",
    "D": "Husband and wife",
}
SCENES = {"A": "A man rides a surfboard", "B": "A boy holds an umbrella", "C": "A giraffe in a field"}


@pytest.mark.parametrize(
    ("answer", "options", "named"),
    [
        ("B", OPTIONS, "B"),
        ("B.", OPTIONS, "B"),
        ("(C) Brother and sister", OPTIONS, "C"),
        ("The answer is D: they are married.", OPTIONS, "D"),
        ("A", OPTIONS, "A"),
        ("A. Father and daughter", OPTIONS, "A"),
        ("The answer is A.", OPTIONS, "A"),
        ("Option A is right", OPTIONS, "A"),
        ("They look like mother and son.", OPTIONS, "B"),
        ("A man rides a surfboard", SCENES, "A"),  # the article is no letter; the text decides
        ("I see a giraffe in a field of grass", SCENES, "C"),
        ("B or C", OPTIONS, None),  # two letters
        ("It could be A or B, hard to say", OPTIONS, None),
        ("b", OPTIONS, None),  # a lower-case letter is no label
        ("", OPTIONS, None),
        ("Two people on a bench", OPTIONS, None),
        ("E", OPTIONS, None),  # no such option
        ("It is not B", OPTIONS, None),  # a negation is a judge's business
        ("They are not mother and son", OPTIONS, None),
        ("A father and daughter, or a mother and son", OPTIONS, None),
        ("mother and son " + "and so on " * 40, OPTIONS, None),  # longer than twice all options
    ],
)
def test_an_option_is_named_by_its_letter_then_by_its_text_and_never_guessed(
    answer: str, options: dict[str, str], named: str | None
) -> None:
    assert option_of(answer, options) == named


def test_rotations_move_the_texts_and_the_right_letter_follows() -> None:
    for turn in range(4):
        options, answer = rotated(OPTIONS, "B", turn)
        assert list(options) == ["A", "B", "C", "D"]
        assert options[answer or ""] == "Mother and son"
    assert rotated(OPTIONS, "A", 1) == (
        {"A": OPTIONS["B"], "B": OPTIONS["C"], "C": OPTIONS["D"], "D": OPTIONS["A"]},
        "D",
    )


def test_a_question_is_right_only_if_right_in_every_rotation() -> None:
    assert circular_verdict(["A", "D", "C", "B"], ["A", "D", "C", "B"]) == "right"
    assert circular_verdict(["A", "A", "A", "A"], ["A", "D", "C", "B"]) == "wrong"
    assert circular_verdict(["A", None, "C", "B"], ["A", "D", "C", "B"]) == "undecided"
    assert circular_verdict(["A", None, "D", "B"], ["A", "D", "C", "B"]) == "wrong"


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "l2-category",
        "split",
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def sample_table(shared_data: Path, path: Path) -> list[dict[str, Any]]:
    """The twelve real samples as a table like the published one; images in base64."""
    folder = shared_data / "mmbench_samples"
    given = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    rows = []
    for row in given:
        image = base64.b64encode((folder / row["image"]).read_bytes()).decode()
        kept = {key: row[key] for key in ("index", "question", "hint", "category", "answer")}
        rows.append(kept | row["options"] | {"image": image, "split": "dev"})
    write_table(path, rows)
    return given


def test_the_real_samples_are_read_from_a_table_with_their_images_and_rotations(
    shared_data: Path, tmp_path: Path
) -> None:
    given = sample_table(shared_data, tmp_path / "mmbench_dev_en.tsv")
    rows = with_rotations(read_rows(tmp_path / "mmbench_dev_en.tsv"))
    assert len(rows) == sum(len(row["options"]) for row in given)
    for row in rows:
        truth = next(item for item in given if item["index"] == row.base)
        assert row.answer is not None and row.options[row.answer] == truth["options"][truth["answer"]]
        assert row.image is not None
        assert row.image.read() == (shared_data / "mmbench_samples" / truth["image"]).read_bytes()
    first, second = read(tmp_path, ReadOptions())[""][:2]
    assert first.text == (
        "What is correct Python code to generate the content of the image?\n"
        + "\n".join(f"{letter}. {text}" for letter, text in given[0]["options"].items())
        + "\nAnswer with the option's letter from the given choices directly."
    )
    assert second.id == 1_000_001 and second.text.splitlines()[1].startswith("A. thisdict")
    assert len(read(tmp_path, ReadOptions(circular=False))[""]) == 12
    assert len(read(shared_data / "mmbench_samples", ReadOptions())[""]) == len(
        rows
    )  # the samples as they are


def test_the_samples_are_scored_by_the_circular_rule(
    shared_data: Path, tmp_path: Path, fasttrain: Callable[..., Any], tiny_models: ModuleType
) -> None:
    """Always right; right by text; always "A"; no option named; right but once wrong; the rest right."""
    sample_table(shared_data, tmp_path / "d" / "MMBench_DEV_EN.tsv")
    rows = with_rotations(read_rows(tmp_path / "d" / "MMBench_DEV_EN.tsv", images=False))
    bases = list(dict.fromkeys(row.base for row in rows))
    answers = []
    for row in rows:
        right = row.answer or ""
        text = {
            bases[1]: f"It is: {row.options[right]}",
            bases[2]: "A",
            bases[3]: "I cannot tell.",
            bases[4]: right if row.index < 1_000_000 else f"{next(k for k in row.options if k != right)}.",
        }.get(row.base, right)
        answers.append({"question_id": row.index, "text": text, "model_id": "built"})
    path = tiny_models.write_rows(tmp_path / "a.jsonl", answers)
    words = ("eval", "mmbench", "--data", tmp_path / "d", "-o", tmp_path / "e", "--answers", path)
    code, out, err = fasttrain(*words)
    assert (code, err) == (0, "")
    scores = json.loads((tmp_path / "e" / "scores.json").read_text())
    unclear = sum(row.base == bases[3] for row in rows)
    assert (scores["n"], scores["needs_judge"], scores["undecided"]) == (12, unclear, 1)
    assert scores["accuracy"] == 9 / 12 and scores["score"] == 75.0
    assert scores["accuracy_if_undecided_were_right"] == 10 / 12
    right_unrotated = 12 - 1 - (next(row for row in rows if row.base == bases[2]).answer != "A")
    assert scores["accuracy_unrotated"] == right_unrotated / 12
    assert f"{unclear} of {len(rows)} answers name no option and need a judge" in out
    tiny_models.write_rows(path, [row for row in answers if row["question_id"] < 1_000_000])
    code, _, err = fasttrain(*words)  # answers to the unrotated questions only
    assert code == 0 and json.loads((tmp_path / "e" / "scores.json").read_text())["rotations"] == 1
    tiny_models.write_rows(path, answers[1:])
    code, _, err = fasttrain(*words)
    assert code == 3 and "1 questions have no answer and are not in the score, first 1" in err
    assert json.loads((tmp_path / "e" / "scores.json").read_text())["n"] == 11


def test_the_legacy_table_with_its_own_rotations_is_taken_as_it_is(
    tmp_path: Path, tiny_models: ModuleType
) -> None:
    image = base64.b64encode(tiny_models.draw_image(tmp_path / "x.png", seed=1).read_bytes()).decode()
    rows = [
        {
            "index": 7,
            "question": 'a "quoted"\ttab\nand line?',
            "A": "x",
            "B": "y",
            "answer": "A",
            "image": image,
        },
        {"index": 9, "question": "q?", "A": "u", "B": "v", "C": "nan", "answer": "B", "image": image},
        {"index": 1_000_007, "question": "q?", "A": "y", "B": "x", "answer": "B", "image": "7"},
        {"index": 1_000_009, "question": "q?", "A": "v", "B": "u", "answer": "A", "image": "9"},
    ]
    table = write_table(tmp_path / "d" / "mmbench_dev_20230712.tsv", rows)
    read_back = read_rows(table)
    assert with_rotations(read_back) == read_back
    assert read_back[0].question == 'a "quoted"\ttab\nand line?' and list(read_back[1].options) == ["A", "B"]
    assert read_back[2].image == read_back[0].image  # a short cell names the row that holds the image
    questions = read(tmp_path / "d", ReadOptions(limit=1))[""]
    assert [question.id for question in questions] == [7, 1_000_007]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "!!!" * 30}, "row 1: image: wanted an image in base64"),
        ({"image": "12"}, "row 1: image: wanted base64, or the index of a row with an image"),
        ({"answer": "E"}, "row 1: answer: wanted one of A, B, got E"),
        ({"index": "x"}, "row 1: index: wanted an integer"),
        ({"B": ""}, "row 1: question: wanted a question with at least two options"),
        ({"image": base64.b64encode(b"no image" * 20).decode()}, "row 1: images: wanted an image"),
    ],
)
def test_a_broken_row_is_one_line_with_its_place(
    change: dict[str, Any], message: str, tmp_path: Path, tiny_llava: Path, fasttrain: Callable[..., Any],
    tiny_models: ModuleType,
) -> None:  # fmt: skip
    image = base64.b64encode(tiny_models.draw_image(tmp_path / "x.png", seed=1).read_bytes()).decode()
    row = {"index": 7, "question": "q?", "A": "x", "B": "y", "answer": "A", "image": image}
    write_table(tmp_path / "d" / "t.tsv", [row | change])
    code, _, err = fasttrain(
        "eval", "mmbench", "-m", tiny_llava, "--data", tmp_path / "d", "-o", tmp_path / "e"
    )
    assert code == 2 and message in err and err.count("\n") == 1


def read_sheet(path: Path) -> list[dict[str, str]]:
    """The first sheet of a workbook, by its column names."""
    space = {"m": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    with zipfile.ZipFile(path) as file:
        root = ET.fromstring(file.read("xl/worksheets/sheet1.xml"))
    lines = []
    for row in root.iterfind(".//m:row", space):
        cells = {}
        for cell in row.iterfind("m:c", space):
            column = "".join(c for c in cell.get("r", "") if c.isalpha())
            found = cell.find("m:v", space) if cell.get("t") is None else cell.find("m:is/m:t", space)
            cells[column] = found.text or "" if found is not None else ""
        lines.append(cells)
    names = lines[0]
    return [{names[column]: value for column, value in line.items()} for line in lines[1:]]


def test_the_model_is_asked_every_rotation_and_the_spreadsheet_holds_the_tables_own_rows(
    shared_data: Path,
    tmp_path: Path,
    tiny_llava: Path,
    fasttrain: Callable[..., Any],
    tiny_models: ModuleType,
) -> None:
    sample_table(shared_data, tmp_path / "d" / "MMBench_DEV_EN.tsv")
    out = tmp_path / "e"
    words = (
        "eval",
        "mmbench",
        "-m",
        tiny_llava,
        "--data",
        tmp_path / "d",
        "-o",
        out,
        "--max-new-tokens",
        3,
        "--limit",
        3,
    )
    code, text, _ = fasttrain(*words)
    rows = tiny_models.read_rows(out / "mmbench_answers.jsonl")
    assert code == 0 and [row["question_id"] for row in rows[:4]] == [1, 1_000_001, 2_000_001, 3_000_001]
    scores = json.loads((out / "scores.json").read_text())
    assert scores["n"] == 3 and scores["answers"] == len(rows) and "3 questions hang on them" in text
    sheet = read_sheet(out / "mmbench_submission.xlsx")
    assert [int(row["index"]) for row in sheet] == [1, 1156, 1745]
    assert set(sheet[0]) == {"index", "question", "A", "B", "C", "D", "prediction"}
    assert sheet[0]["prediction"] == rows[0]["text"].replace("\x00", "") and sheet[1]["B"] == "Mother and son"


def test_a_test_split_is_answered_for_the_official_site_and_not_scored(
    shared_data: Path, tmp_path: Path, tiny_llava: Path, fasttrain: Callable[..., Any]
) -> None:
    table = tmp_path / "d" / "MMBench_TEST_EN.tsv"
    sample_table(shared_data, table)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    write_table(table, [{name: value for name, value in row.items() if name != "answer"} for row in rows])
    out = tmp_path / "e"
    words = ("eval", "mmbench", "--data", tmp_path / "d", "-o", out)
    code, text, _ = fasttrain(*words, "-m", tiny_llava, "--max-new-tokens", 3, "--limit", 2)
    assert code == 0 and "not scored" in text and "got a test split: the official site scores it" in text
    assert len(read_sheet(out / "mmbench_submission.xlsx")) == 2 and not (out / "scores.json").exists()
    code, _, said = fasttrain(*words, "--answers", out / "mmbench_answers.jsonl")
    assert (
        code == 2 and "got a test split: the official site scores it" in said
    )  # scores were all that was asked


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"index": None}, r"index: wanted a value, got None"),
        ({"question": None}, r"question: wanted a value, got None"),
        ({"images": []}, r"image: wanted one image, got 0"),
    ],
)
def test_a_row_that_lacks_a_field_is_named(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    row = {"index": 1, "question": "Which?", "options": {"A": "this", "B": "that"}, "answer": "A"} | wrong
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        read_rows(path)


def test_a_spreadsheet_keeps_text_that_xml_would_spoil(tmp_path: Path) -> None:
    from fasttrain.evaluate.spreadsheet import write_xlsx

    rows = [
        {"index": n, "text": text}
        for n, text in enumerate([' <a> & "b"\n', "=1+1", "ünï \U0001f600", "x\x00\x0b"])
    ]
    path = write_xlsx(tmp_path / "s.xlsx", ["index", "text"], rows)
    read_back = [(row["index"], row["text"]) for row in read_sheet(path)]
    assert read_back == [("0", ' <a> & "b"\n'), ("1", "=1+1"), ("2", "ünï \U0001f600"), ("3", "x")]
    first = path.read_bytes()
    assert write_xlsx(tmp_path / "s.xlsx", ["index", "text"], rows).read_bytes() == first
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl reads the file as spreadsheet programs do")
    sheet = openpyxl.load_workbook(path).active
    assert [cell.value for cell in sheet["B"]][1:3] == [' <a> & "b"\n', "=1+1"]


def test_blank_lines_are_no_rows_and_a_category_nan_is_none(tmp_path: Path) -> None:
    """pandas, which reads the official tables, passes over the former and reads the latter as missing."""
    row = {"index": 7, "question": "q?", "A": "x", "B": "y", "answer": "A", "image": "1", "category": "nan"}
    table = write_table(tmp_path / "t.tsv", [row, row | {"index": 8, "category": "color"}])
    first, second, third = table.read_text().splitlines()
    table.write_text(f"{first}\n{second}\n\n{third}\n\n\n")
    rows = read_rows(table, images=False)
    assert [(row.index, row.category) for row in rows] == [(7, None), (8, "color")]
