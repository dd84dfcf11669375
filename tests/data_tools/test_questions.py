"""Questions made of sources: what is kept, dropped and counted, their ids and their images."""

import json

import pytest
from turns import gpt, human

from fasttrain_data.errors import UserError
from fasttrain_data.questions.build import QuestionSettings, build_questions


def test_an_image_given_as_base64_is_told_for_what_it_is(tmp_path, write_rows, read_rows, command):
    inline = "iVBORw0KGgo" * 500
    rows = [{"question": "Why?", "image": image} for image in ([], inline, f"data:image/png;base64,{inline}")]
    source = write_rows(tmp_path / "source.jsonl", rows)
    code, stdout, stderr = command("questions", source, "-o", tmp_path / "q.jsonl")
    assert (code, stderr) == (0, "")
    assert "1  missing image" in stdout and "1  image is a data: URL; wanted a file's name" in stdout
    [skipped, _] = read_rows(tmp_path / "q.skipped.jsonl")
    assert skipped["detail"].startswith("no path of a file (File name too long): iVBORw0KGgo")
    assert len(skipped["detail"]) < 400


def test_every_row_is_kept_or_counted_with_its_reason(folder, write_rows, read_rows):
    source = write_rows(
        folder / "source.jsonl",
        [
            {"question": "What is it?", "image": "img/0.png"},
            {"question": "what is IT", "image": "img/0.png"},
            {"question": "What is it?", "image": "img/1.png"},
            {"question": "What is it?", "image": "img/copy of 0.png"},
            {"question": "What is it?", "image": "img/none.png"},
            {"question": "What is it?", "image": "../img/0.png"},
            {"question": "What is it?", "image": "img/broken.png"},
            {"question": "Anything to say?"},
            {"question": ""},
        ],
    )
    account = build_questions([str(source)], folder / "questions.jsonl", QuestionSettings())
    rows = read_rows(folder / "questions.jsonl")
    assert [(row["images"], row["question"]) for row in rows] == [
        (["img/0.png"], "What is it?"),
        (["img/1.png"], "What is it?"),
        ([], "Anything to say?"),
    ]
    assert account.dropped["source.jsonl"] == {
        "duplicate": 2,
        "missing image": 2,
        "broken image": 1,
        "no question": 1,
    }
    listed = read_rows(folder / "questions.skipped.jsonl")
    assert [row["where"].rsplit(" ", 1)[1] for row in listed] == ["2", "4", "5", "6", "7", "9"]
    assert len({row["id"] for row in rows}) == 3


def test_ids_follow_the_image_bytes_not_the_file_name(folder, write_rows, read_rows):
    ids = []
    for name in ("img/0.png", "img/copy of 0.png", "img/1.png"):
        source = write_rows(folder / "source.jsonl", [{"question": "What?", "image": name}])
        build_questions([str(source)], folder / "q.jsonl", QuestionSettings())
        ids.append(read_rows(folder / "q.jsonl")[0]["id"])
    assert ids[0] == ids[1] != ids[2]


def test_missing_images_are_kept_only_on_demand_and_marked(folder, write_rows, read_rows):
    source = write_rows(folder / "source.jsonl", [{"question": "What?", "image": "img/none.png"}])
    with pytest.raises(UserError, match=r"1 missing image.*--image-root"):
        build_questions([str(source)], folder / "q.jsonl", QuestionSettings())
    assert not (folder / "q.jsonl").exists()
    with pytest.raises(UserError, match="wanted an existing file"):
        build_questions([str(source)], folder / "q.jsonl", QuestionSettings(missing_images="stop"))
    build_questions([str(source)], folder / "q.jsonl", QuestionSettings(missing_images="keep"))
    assert read_rows(folder / "q.jsonl")[0]["image_sha256"] == [None]


def test_names_are_relative_to_the_output_or_to_the_given_root(folder, write_rows, read_rows):
    source = write_rows(folder / "sub" / "source.jsonl", [{"question": "What?", "image": "../img/0.png"}])
    with pytest.raises(UserError, match="missing image"):  # leaves the folder of the file that names it
        build_questions([str(source)], folder / "q.jsonl", QuestionSettings())
    write_rows(source, [{"question": "What?", "image": "0.png"}])
    root = QuestionSettings(image_root=folder / "img")
    build_questions([str(source)], folder / "out" / "q.jsonl", root)
    assert read_rows(folder / "out" / "q.jsonl")[0]["images"] == ["0.png"]
    inner = write_rows(folder / "img" / "source.jsonl", [{"question": "What?", "image": "0.png"}])
    account = build_questions([str(inner)], folder / "q.jsonl", QuestionSettings())
    assert read_rows(folder / "q.jsonl")[0]["images"] == ["img/0.png"]
    assert account.notes == []
    account = build_questions([str(inner)], folder / "out" / "q.jsonl", QuestionSettings())
    assert read_rows(folder / "out" / "q.jsonl")[0]["images"] == ["0.png"]
    assert "--image-root" in account.notes[0]


def test_images_of_one_name_in_two_folders_are_two_images(folder, draw, write_rows, read_rows):
    draw(folder / "photos" / "0.png", 40)
    draw(folder / "img" / "0.webp", 41)  # another picture beside 0.png
    (folder / "link.png").symlink_to(folder / "img" / "0.png")
    names = (
        "img/0.png",
        "photos/0.png",
        "img/0.webp",
        "link.png",
        "img/../img/0.png",
        "img/none.png",
        "none.png",
    )
    source = write_rows(folder / "s.jsonl", [{"question": "Describe it.", "image": name} for name in names])
    account = build_questions([str(source)], folder / "q.jsonl", QuestionSettings(missing_images="keep"))
    kept = [row["images"][0] for row in read_rows(folder / "q.jsonl")]
    assert kept == ["img/0.png", "photos/0.png", "img/0.webp", "img/none.png"]
    assert account.dropped["s.jsonl"] == {"duplicate": 3}


def test_text_that_no_record_can_hold_is_a_dropped_row(folder, write_rows, read_rows):
    conversation = [human("<image>\nWho \ud83d?"), gpt("Ann."), human("Where?"), gpt("Rome.")]
    rows = [
        {"question": "What is it \ud83d?"},
        {"question": "What?", "answer": "\udfff"},
        {"question": "What?", "history": [{"role": "user", "text": "\ud83d"}]},
        {"question": "Who?", "other column": "\ud83d"},
    ]
    for name, content in (
        ("plain", rows),
        ("llava", [{"image": "img/0.png", "conversations": conversation}]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    sources = [str(folder / "plain.jsonl"), str(folder / "llava.jsonl")]
    account = build_questions(sources, folder / "q.jsonl", QuestionSettings())
    assert [row["question"] for row in read_rows(folder / "q.jsonl")] == ["Who?"]
    assert account.dropped == {
        "plain.jsonl": {"text that is not valid Unicode": 3},
        "llava.jsonl": {"text that is not valid Unicode": 1},
    }


def test_a_failed_run_leaves_the_listing_of_the_last_good_one(folder, write_rows):
    rows = [{"question": "What?", "image": "img/0.png"}, {"question": ""}]
    source = write_rows(folder / "s.jsonl", rows)
    build_questions([str(source)], folder / "q.jsonl", QuestionSettings())
    listing = folder / "q.skipped.jsonl"
    before = listing.read_bytes()
    write_rows(source, [{"question": ""}] * 3)
    for output in ("q", "never"):
        with pytest.raises(UserError, match="got none"):
            build_questions([str(source)], folder / f"{output}.jsonl", QuestionSettings())
    assert listing.read_bytes() == before
    assert not list(folder.glob("*never*"))
    write_rows(source, rows[:1])
    build_questions([str(source)], folder / "q.jsonl", QuestionSettings())
    assert not listing.exists()


def test_only_rows_with_images_need_an_image_root(folder, write_rows):
    source = write_rows(
        folder / "in" / "s.jsonl", [{"question": "Why?"}, {"question": "So?", "image": "no.png"}]
    )
    account = build_questions([str(source)], folder / "out" / "q.jsonl", QuestionSettings())
    assert (account.total_kept(), account.notes) == (1, [])


def test_a_tilde_that_no_shell_expands_is_the_home_folder(tmp_path, write_rows, command, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in" / "s.jsonl", [{"question": "Why?"}])
    code, _, stderr = command("questions", "plain:~/in/s.jsonl", "--out=~/q.jsonl", "--image-root=~/in")
    assert (code, stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "q.jsonl"]


def test_real_scigraphqa_files_are_read_whole_and_the_dirt_is_found(shared_data, tmp_path, command):
    folder = shared_data / "scigraphqa"
    records = folder / "mplug_owl_answer_and_openai_rating.jsonl"
    questions = folder / "updated_llava_eval_questions_first1500.jsonl"
    out = tmp_path / "q.jsonl"
    code, stdout, _ = command("questions", records, "-o", out, "--missing-images", "keep")
    assert code == 0
    assert "99 read, 98 kept" in stdout
    # 12 of the 99 are known to be damaged; "<image>" follows the question in 55
    assert "changed       11  fake human turns cut" in stdout
    assert "changed        3  split answer put together again" in stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    [split] = [row for row in rows if row["source_place"] == "line 3"]
    lines = split["reference_answer"].splitlines()
    assert lines[0] == "The main takeaways from the graph in Figure 9 are as follows:"
    assert lines[2].startswith("* The runtime of pruned") and lines[-1].startswith("These results verify")
    assert "dropped        1  first human turn asks nothing" in stdout
    assert "changed       55  placeholder moved to the front" in stdout
    assert not any("<image>" in line for line in out.read_text().splitlines())
    code, stdout, _ = command("questions", questions, "-o", out, "--missing-images", "keep")
    assert "1,500 read, 1,500 kept" in stdout
    code, _, stderr = command("questions", questions, "-o", out)
    assert (code, "1,500 missing image" in stderr) == (2, True)


def test_real_lrv_and_llava_files_are_read_whole(shared_data, tmp_path, command):
    lrv = shared_data / "lrv_instruction" / "evaluation_set.json"
    rows = json.loads(lrv.read_text())
    code, stdout, _ = command("questions", lrv, "-o", tmp_path / "q.jsonl", "--missing-images", "keep")
    assert (code, f"{len(rows):,} read" in stdout) == (0, True)
    coordinates = sum("X:" in row["question"] for row in rows)
    assert f"{coordinates:>8,}  holds pixel coordinates" in stdout
    llava = shared_data / "llava" / "qa90_questions.jsonl"
    code, stdout, _ = command("questions", llava, "-o", tmp_path / "q.jsonl", "--missing-images", "keep")
    assert (code, "90 read, 90 kept" in stdout) == (0, True)
    samples = shared_data / "mmbench_samples" / "questions.jsonl"
    code, stdout, _ = command(
        "questions", samples, "-o", tmp_path / "q.jsonl", "--image-root", samples.parent
    )
    assert (code, "12 read, 12 kept" in stdout) == (0, True)
