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
