"""Questions that are in evaluation files are left out."""

import base64
import json

import pytest
from PIL import Image
from turns import gpt, human

from fasttrain_data.errors import UserError
from fasttrain_data.questions.build import QuestionSettings, build_questions
from fasttrain_data.questions.duplicates import image_key


def test_images_of_evaluation_rows_that_ask_nothing_usable_are_left_out_too(tmp_path, write_rows, command):
    unusable = [
        {"image_file": "a.png", "conversations": [human("The figure shows scores."), gpt("Also.")]},
        {"image_id": 5, "question": None},
        {"image": "c.png", "conversations": [human("Why?"), human("And?")]},
        {"image_id": None, "question": "Why?"},
        {"image_id": "7.png", "question": None},
    ]
    evaluation = write_rows(tmp_path / "evaluation.jsonl", unusable)
    rows = [
        {"image": name, "question": "What is it?"}
        for name in ("a.png", "5.jpg", "c.png", "None.jpg", "7.jpg")
    ]
    source = write_rows(tmp_path / "source.jsonl", rows)
    arguments = ("--missing-images", "keep", "--eval-file", evaluation)
    code, stdout, _ = command("questions", source, "-o", tmp_path / "q.jsonl", *arguments)
    assert code == 0 and "5 read, 1 kept" in stdout and "4  overlap with evaluation" in stdout


def test_the_benchmarks_own_files_are_evaluation_files(tmp_path, write_rows, read_rows, command):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "one.png")
    rows = [{"image": "one.png", "question": "In MMBench?"}, {"image": "v1_7.png", "question": "In MM-Vet?"}]
    rows += [{"question": "In MT-Bench?"}, {"question": "In AlpacaEval?"}, {"question": "In none?"}]
    source = write_rows(tmp_path / "source.jsonl", rows)
    folder = tmp_path / "evaluation"
    folder.mkdir()
    cell = base64.b64encode((tmp_path / "one.png").read_bytes()).decode()
    table = [["index", "question", "A", "B", "image"], ["3", "Which?", "x", "y", cell]]
    (folder / "MMBench.tsv").write_text("".join("\t".join(cells) + "\n" for cells in table))
    mm_vet = {"v1_7": {"imagename": "v1_7.png", "question": "What?", "answer": "x", "capability": ["ocr"]}}
    (folder / "mm-vet.json").write_text(json.dumps(mm_vet, indent=1))
    write_rows(
        folder / "question.jsonl", [{"question_id": 81, "category": "stem", "turns": ["In MT-Bench?", "B"]}]
    )
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": "In AlpacaEval?", "output": "-"}]))
    files = [word for path in sorted(folder.iterdir()) for word in ("--eval-file", path)]
    arguments = ("-o", tmp_path / "q.jsonl", "--missing-images", "keep")
    code, stdout, stderr = command("questions", source, *arguments, *files)
    assert code == 0 and "4  overlap with evaluation" in stdout, stderr
    assert [row["question"] for row in read_rows(tmp_path / "q.jsonl")] == ["In none?"]
    (folder / "MMBench.tsv").write_text("index\tquestion\n")
    code, _, stderr = command("questions", source, *arguments, *files)
    assert code == 2 and "MMBench.tsv: wanted MMBench's columns, got none called 'A'" in stderr


def test_overlap_with_evaluation_is_judged_by_bytes_where_both_images_are_there(
    folder, write_rows, read_rows
):
    source = write_rows(
        folder / "source.jsonl",
        [{"question": "What?", "image": f"img/{number}.png"} for number in range(4)]
        + [{"question": "Why me?"}],
    )
    evaluation = write_rows(
        folder / "eval" / "eval.jsonl",
        [
            {"question_id": 1, "text": "Is it?", "image": "COCO_val2014_1.png"},  # absent: by name
            {"question_id": 2, "text": "why me"},
            {"question_id": 3, "text": "Is it?", "image": "2.png"},  # there, but another picture
            {"question_id": 4, "text": "Is it?", "image": "other name.png"},  # the same bytes as 3.png
        ],
    )
    (folder / "eval" / "2.png").write_bytes((folder / "img" / "5.png").read_bytes())
    (folder / "eval" / "other name.png").write_bytes((folder / "img" / "3.png").read_bytes())
    settings = QuestionSettings(eval_files=(evaluation,))
    account = build_questions([str(source)], folder / "q.jsonl", settings)
    assert [row["images"] for row in read_rows(folder / "q.jsonl")] == [["img/0.png"], ["img/2.png"]]
    assert account.dropped["source.jsonl"] == {"overlap with evaluation": 3}
    refusing = QuestionSettings(eval_files=(evaluation,), on_overlap="refuse")
    with pytest.raises(UserError, match=r"line 2: image img/1.png is in an evaluation file"):
        build_questions([str(source)], folder / "q.jsonl", refusing)
    assert image_key("x/COCO_val2014_000000310196.jpg") == image_key("000000310196.png")


def test_an_image_inside_an_evaluation_row_is_looked_for_by_its_bytes(folder, write_rows, read_rows):
    rows = [{"question": "What?", "image": f"img/{number}.png"} for number in range(2)]
    source = write_rows(folder / "source.jsonl", rows)
    inline = base64.b64encode((folder / "img" / "0.png").read_bytes()).decode()
    evaluation = write_rows(
        folder / "eval.jsonl", [{"question": "Is it?", "image": f"data:image/png;base64,{inline}"}]
    )
    account = build_questions([str(source)], folder / "q.jsonl", QuestionSettings(eval_files=(evaluation,)))
    assert [row["images"] for row in read_rows(folder / "q.jsonl")] == [["img/1.png"]] and not account.notes


def test_what_an_evaluation_file_holds_and_is_not_looked_for_is_told(folder, write_rows):
    """An image under another key was in the training questions without a word."""
    source = write_rows(folder / "source.jsonl", [{"question": "What?", "image": "img/0.png"}])
    rows = [{"question": "Is it?", "image_path": f"img/{number}.png"} for number in range(2)]
    rows += [{"question": "Whose?"}, {"question": 3}, {"question": 3, "image": "img/4.png"}]
    evaluation = write_rows(folder / "eval.jsonl", rows)
    settings = QuestionSettings(eval_files=(evaluation,))
    account = build_questions([str(source)], folder / "q.jsonl", settings)
    assert account.notes == [
        f"note: {evaluation}: not looked for: 2 (image_path is not read)",
        f"note: {evaluation}: not looked for: 1 (no question)",
    ]
