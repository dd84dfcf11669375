"""The data of the paper's SFT arms: which prompts, which answers, under which words, and what is counted."""

import json
from collections import Counter
from itertools import product

import pytest

from fasttrain_data.errors import UserError
from fasttrain_data.pairs.build import PairSettings, held_out_path, make_pairs
from fasttrain_data.pairs.demonstrations import DemonstrationSettings, make_demonstrations
from fasttrain_data.pairs.steering import steering_text
from fasttrain_data.records import ATTRIBUTES

# arXiv 2402.10884's wording, with its own example values
STEERED = (
    "\nPlease answer the question such that your response is in the following attributes in 5-point Likert scale:"
    "\nHelpfulness:4,Correctness:4,Coherence:4,Complexity:4,Verbosity:4"
)


def annotation(number, *graded, **more):
    """A prompt whose answers are (text, five scores)."""
    completions = [
        {"id": f"id-{text}", "text": text, **dict(zip(ATTRIBUTES, scores, strict=True))}
        for text, scores in graded
    ]
    row = {"question_id": f"q{number}", "image": "a.png", "question": f"Why {number}?", "status": "ok"}
    return {**row, "completions": completions, **more}


GOOD, FAIR, BAD = (4, 4, 4, 1, 1), (3, 4, 4, 2, 2), (1, 0, 2, 3, 4)
ROWS = [
    annotation(0, ("fair", FAIR), ("good", GOOD), ("bad", BAD)),
    annotation(1, ("one", GOOD), ("two", GOOD)),
    annotation(2, ("alone", GOOD)),
    annotation(3, ("worst", BAD), ("best", GOOD), ("also best", GOOD)),
]


@pytest.fixture
def arm(tmp_path, write_rows, read_rows):
    def run(method, rows=ROWS, **settings):
        out = tmp_path / f"{method}.jsonl"
        counts = make_demonstrations(
            write_rows(tmp_path / "annotations.jsonl", rows),
            out,
            DemonstrationSettings(method=method, **settings),
        )
        return read_rows(out), counts

    return run


def said(rows):
    return [row["completion"][0]["content"][0]["text"] for row in rows]


def asked(rows):
    return [row["prompt"][-1]["content"][-1]["text"] for row in rows]


def test_rejection_sampling_learns_what_dpo_chooses_on_the_same_prompts(arm, tmp_path, read_rows):
    rows, counts = arm("rejection")
    make_pairs(tmp_path / "annotations.jsonl", tmp_path / "pairs.jsonl", PairSettings())
    pairs = read_rows(tmp_path / "pairs.jsonl")
    assert said(rows) == [pair["chosen"][0]["content"][0]["text"] for pair in pairs] == ["good", "best"]
    assert [row["prompt"] for row in rows] == [pair["prompt"] for pair in pairs]
    assert counts.account.dropped["prompts"] == {"tie: all answers score the same": 1, "one answer only": 1}
    assert [row["score"] for row in rows] == [12, 12]


def test_margin_0_takes_every_annotated_prompt(arm):
    assert said(arm("rejection", margin=0)[0]) == ["good", "one", "alone", "best"]


def test_steerlm_asks_for_each_answers_own_scores_and_leaves_the_next_question_alone(arm):
    rows, _ = arm("steerlm")
    assert said(rows) == ["fair", "good", "bad", "worst", "best", "also best"]
    assert asked(rows)[1] == "Why 0?" + STEERED.replace(
        "Complexity:4,Verbosity:4", "Complexity:1,Verbosity:1"
    )
    assert all(text.count("Please answer the question") == 1 for text in asked(rows))
    assert all(row["prompt"][0]["content"].count({"type": "image"}) == 1 for row in rows)


def test_the_steering_text_is_the_papers():
    assert steering_text() == STEERED
    texts = {steering_text(scores) for scores in product(range(5), repeat=5)}
    assert len(texts) == 5**5
    for wrong in ((4, 4, 4, 4), (4, 4, 4, 4, 5), (4, 4, 4, 4, 0.5)):
        with pytest.raises(ValueError, match="whole numbers"):
            steering_text(wrong)


def test_standard_sft_learns_the_datasets_own_answers(arm, tmp_path, write_rows):
    questions = [
        {"id": f"q{n}", "question": "x", "reference_answer": f"gold {n}" if n != 3 else " "} for n in range(4)
    ]
    rows, counts = arm("sft", questions=write_rows(tmp_path / "questions.jsonl", questions))
    assert (said(rows), asked(rows)) == (["gold 0"], ["Why 0?"])
    assert counts.account.dropped["prompts"]["no reference answer"] == 1
    held = [annotation(9, ("a", GOOD), ("b", BAD), reference_answer="in the annotation")]
    assert said(arm("sft", rows=held)[0]) == ["in the annotation"]
    with pytest.raises(
        UserError, match=r"--questions questions\.jsonl, or learn the model's own with --take random"
    ):
        arm("sft")


def test_random_answers_are_drawn_as_often_as_they_were_sampled(arm):
    rows = [annotation(n, ("often", BAD), ("once", GOOD)) for n in range(600)]
    for row in rows:
        row["completions"][0]["count"] = 3
    drawn = Counter(said(arm("sft", rows=rows, take="random")[0]))
    assert 400 < drawn["often"] < 500
    assert said(arm("sft", rows=rows, take="random")[0]) != said(
        arm("sft", rows=rows, take="random", seed=1)[0]
    )
    assert len(arm("sft", rows=rows, take="all")[0]) == 1200


def test_every_arm_holds_out_the_same_prompts(arm, tmp_path, read_rows, write_rows):
    rows = [annotation(n, ("a", GOOD), ("b", BAD)) for n in range(60)]
    make_pairs(write_rows(tmp_path / "p.jsonl", rows), tmp_path / "pairs.jsonl", PairSettings(held_out=0.3))
    wanted = {row["question_id"] for row in read_rows(held_out_path(tmp_path / "pairs.jsonl"))}
    for method in ("rejection", "steerlm"):
        arm(method, rows=rows, held_out=0.3)
        assert {
            row["question_id"] for row in read_rows(held_out_path(tmp_path / f"{method}.jsonl"))
        } == wanted


def test_settings_that_contradict_each_other_are_named(arm, tmp_path, command, write_rows):
    with pytest.raises(UserError, match="--take: wanted best with --for rejection, got all"):
        arm("rejection", take="all")
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    for options, wanted in (
        (("--for", "dpo", "--take", "best"), "--take: wanted only with --for sft"),
        (("--for", "sft", "--rejected", "all"), "--rejected: wanted only with --for dpo"),
        (("--for", "steerlm", "--margin", "-1"), "--margin: wanted 0 or more"),
        (("--for", "rejection", "--questions", path), "--questions: wanted only with --take gold"),
    ):
        code, _, stderr = command("pair", path, "-o", tmp_path / "o.jsonl", *options)
        assert (code, wanted in stderr, stderr.count("\n")) == (2, True, 1), stderr


def test_the_command_tells_scores_and_lengths(tmp_path, command, write_rows):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    code, stdout, _ = command("pair", path, "-o", tmp_path / "o.jsonl", "--for", "steerlm")
    assert code == 0
    assert "prompts: 4 read, 2 kept" in stdout
    assert "mean score 8.83; mean length 5 characters" in stdout
    assert f"{tmp_path / 'o.jsonl'}: 6 answers of 4 prompts" in stdout
    row = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])
    assert row["rule"] == {"for": "steerlm", "take": "all", "score": "hcc", "margin": 2.0, "seed": 0}


def test_flipped_labels_are_nested_seeded_and_swap_all_that_is_said(tmp_path, write_rows, read_rows):
    rows = [annotation(n, ("good", GOOD), ("bad", BAD)) for n in range(300)]
    path = write_rows(tmp_path / "a.jsonl", rows)

    def run(flip, **settings):
        out = tmp_path / "p.jsonl"
        counts = make_pairs(path, out, PairSettings(flip=flip, **settings))
        return read_rows(out), counts

    clean, quarter, half = (run(flip)[0] for flip in (0.0, 0.25, 0.5))
    swapped = [{row["question_id"] for row in made if row.get("flipped")} for made in (clean, quarter, half)]
    assert swapped[0] < swapped[1] < swapped[2]
    assert 50 < len(swapped[1]) < 100 and 125 < len(swapped[2]) < 175
    assert all(row.get("flipped") for row in run(1.0)[0])
    assert run(0.5)[0] == half != run(0.5, seed=1)[0]
    row = next(row for row in half if row.get("flipped"))
    before = next(other for other in clean if other["question_id"] == row["question_id"])
    for name in ("{}", "{}_id", "score_{}", "scores_{}", "{}_chars"):
        assert row[name.format("chosen")] == before[name.format("rejected")]
        assert row[name.format("rejected")] == before[name.format("chosen")]
    assert (row["margin"], row["id"] != before["id"]) == (-before["margin"], True)
    _, counts = run(0.5, held_out=0.3)
    assert not any(row.get("flipped") for row in read_rows(held_out_path(tmp_path / "p.jsonl")))
    assert counts.account.changed["pairs"]["labels swapped"] > 50
    assert "pairs:" in counts.account.lines()  # they are made here: "0 read, 0 kept" stood there


def test_steer_asks_every_kind_of_question_and_renames_images(tmp_path, command, write_rows, read_rows):
    rows = [
        {"id": "a", "image": "x.png", "question": "Why?", "answer": "So."},
        {"question_id": 1, "images": ["y.png"], "text": "Who?"},
        {"prompt": "Where?"},
    ]
    path = write_rows(tmp_path / "in" / "q.jsonl", rows)
    out = tmp_path / "q.jsonl"
    code, stdout, _ = command("steer", path, "-o", out)
    assert (code, "3 questions" in stdout) == (0, True)
    made = read_rows(out)
    assert [made[0]["question"], made[1]["text"], made[2]["prompt"]] == [
        q + STEERED for q in ("Why?", "Who?", "Where?")
    ]
    assert (made[0]["image"], made[1]["images"], made[0]["answer"]) == ("in/x.png", ["in/y.png"], "So.")
    for scores in ("4,4,4", "4,4,4,4,5", "high"):
        code, _, stderr = command("steer", path, "-o", out, "--scores", scores)
        assert (code, "--scores: wanted five whole numbers from 0 to 4" in stderr) == (2, True)
    write_rows(path, [{"id": "a"}])
    code, _, stderr = command("steer", path, "-o", out)
    assert (code, "line 1: question: wanted text, question or prompt" in stderr) == (2, True)
    path.write_text("\n")
    out.unlink()
    code, _, stderr = command("steer", path, "-o", out)
    assert (code, "wanted at least one question, got none" in stderr, out.exists()) == (2, True, False)
