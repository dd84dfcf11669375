"""The rule that makes pairs, against a plain restatement of it, and the paper's bug cases."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrain_data.errors import UserError
from fasttrain_data.pairs.build import PairSettings, held_out_path, make_pairs
from fasttrain_data.pairs.rule import choose
from fasttrain_data.pairs.scores import parse_score


def answer(text, h=2, c=2, co=2, cx=2, v=2, **more):
    scores = {"helpfulness": h, "correctness": c, "coherence": co, "complexity": cx, "verbosity": v}
    return {"id": f"id-{text}", "text": text, **scores, **more}


def annotation(question, *answers, image="a.png", status="ok", **more):
    return {
        "question_id": f"q-{question}-{image}",
        "image": image,
        "question": question,
        "completions": list(answers),
        "status": status,
        "model_version": "judge-001",
        **more,
    }


@pytest.fixture
def pair(tmp_path, write_rows, read_rows):
    """Pairs made from rows: (chosen text, rejected text) of each, and the counts."""

    def run(*rows, **settings):
        out = tmp_path / "pairs.jsonl"
        counts = make_pairs(write_rows(tmp_path / "annotations.jsonl", rows), out, PairSettings(**settings))
        made = read_rows(out)
        return [
            (row["chosen"][0]["content"][0]["text"], row["rejected"][0]["content"][0]["text"]) for row in made
        ], counts

    return run


@given(
    scores=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    margin=st.integers(1, 5),
    seed=st.integers(0, 10),
)
def test_the_choice_is_the_papers_rule(scores, margin, seed):
    def run(rejected):
        return choose(scores, margin, rejected, random.Random(seed))

    lower = [index for index, score in enumerate(scores) if score <= max(scores) - margin]
    first_best = next(index for index, score in enumerate(scores) if score == max(scores))
    assert {choice.chosen for choice in run("all")} <= {first_best}
    assert [choice.rejected for choice in run("all")] == lower
    assert len(run("random")) == len(run("lowest")) == bool(lower)
    if lower:
        assert run("random")[0].rejected in lower
        assert scores[run("lowest")[0].rejected] == min(scores)
        assert run("random") == run("random")


def test_every_qualifying_answer_is_rejected_about_equally_often():
    drawn = Counter(
        choose([12, 11, 3, 5, 10], 2, "random", random.Random(seed))[0].rejected for seed in range(900)
    )
    assert set(drawn) == {2, 3, 4}
    assert all(240 < count < 360 for count in drawn.values())


def test_an_answer_sampled_three_times_is_rejected_three_times_as_often():
    def draw(seed):
        return choose([12, 3, 5], 2, "random", random.Random(seed), counts=[1, 1, 3])[0].rejected

    drawn = Counter(draw(seed) for seed in range(800))
    assert 160 < drawn[1] < 240


def test_chosen_and_rejected_follow_helpfulness_correctness_and_coherence_only(pair):
    row = annotation("Why?", answer("fine", 4, 3, 3, cx=0, v=0), answer("long", 2, 3, 3, cx=4, v=4))
    assert pair(row)[0] == [("fine", "long")]
    with pytest.raises(UserError, match="1 low margin"):
        pair(row, margin=3)
    with pytest.raises(UserError, match=r"1 low margin"):
        pair(annotation("Why?", answer("a", 3), answer("b", 2)))


def test_prompts_are_grouped_by_image_and_question_never_by_image_alone(pair):
    """An early version grouped by image and mixed the questions of one figure."""
    rows = [
        annotation("What?", answer("good what", 4, 4, 4), answer("fair what", 3, 4, 4)),
        annotation("Why?", answer("good why", 4, 4, 4), answer("bad why", 1, 1, 1)),
        annotation(
            "Why?", answer("other good why", 4, 4, 4), answer("other bad why", 0, 0, 0), image="b.png"
        ),
    ]
    pairs, counts = pair(*rows)
    assert pairs == [("good why", "bad why"), ("other good why", "other bad why")]
    assert counts.account.dropped["prompts"] == {"low margin": 1}


def test_rows_of_one_prompt_are_joined_wherever_they_stand(pair):
    rows = [
        annotation("Why?", answer("good", 4, 4, 4)),
        annotation("What?", answer("x", 4), answer("y", 1, 1, 1)),
        annotation("Why?", answer("bad", 1, 1, 1)),
    ]
    assert pair(*rows)[0] == [("good", "bad"), ("x", "y")]


def test_incomplete_groups_are_counted_and_left_out_on_demand(pair):
    """The original computed a filter for prompts with fewer than four answers and never applied it."""
    full = annotation("Full?", *(answer(f"f{n}", n, n, n) for n in range(4)))
    short = annotation("Short?", *(answer(f"s{n}", n, n, n) for n in range(3)))
    merged = annotation("Merged?", answer("m0", 0, 0, 0, count=3), answer("m1", 4, 4, 4))
    pairs, counts = pair(full, short, merged)
    assert len(pairs) == 3
    assert "1 prompts have fewer than 4 answers" in counts.account.notes[0]
    pairs, counts = pair(full, short, merged, answers=4)
    assert [chosen for chosen, _ in pairs] == ["f3", "m1"]
    assert counts.account.dropped["prompts"] == {"incomplete: fewer than 4 answers": 1}


def test_failed_tied_and_unscored_prompts_are_counted_each_by_its_reason(pair, tmp_path, read_rows):
    unscored = answer("u2")
    del unscored["correctness"]
    rows = [
        annotation("Good?", answer("a", 4, 4, 4), answer("b", 0, 0, 0)),
        annotation("Tie?", answer("c"), answer("d")),
        annotation("Low?", answer("e", 3), answer("f", 2)),
        annotation("Blocked?", {"id": "1", "text": "g"}, {"id": "2", "text": "h"}, status="blocked_prompt"),
        annotation("Unscored?", answer("u1", 4, 4, 4), unscored),
        annotation("Alone?", answer("z")),
    ]
    pairs, counts = pair(*rows)
    assert pairs == [("a", "b")]
    assert counts.account.dropped["prompts"] == {
        "tie: all answers score the same": 1,
        "low margin": 1,
        "not annotated: blocked_prompt": 1,
        "incomplete: an answer without scores": 1,
        "one answer only": 1,
    }
    assert len(read_rows(tmp_path / "pairs.skipped.jsonl")) == 5


def test_a_pair_is_a_trl_row_that_records_how_it_was_made(pair, tmp_path, read_rows):
    row = annotation("Why?", answer("good", 4, 3, 4), answer("bad!", 1, 1, 1), model="judge")
    row["history"] = [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Hello"}]
    pair(row, seed=3)
    [made] = read_rows(tmp_path / "pairs.jsonl")
    assert made["images"] == ["a.png"]
    assert made["prompt"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    assert made["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}]
    assert (made["score_chosen"], made["score_rejected"], made["margin"]) == (11, 3, 8)
    assert (made["chosen_chars"], made["rejected_chars"]) == (4, 4)
    assert made["rule"] == {"score": "hcc", "margin": 2.0, "rejected": "random", "seed": 3}
    assert (made["annotator"], made["annotator_version"]) == ("judge", "judge-001")


def test_other_rules_need_no_new_scores(pair):
    row = annotation(
        "Why?", answer("a", 4, 4, 4, 4, 0), answer("b", 4, 4, 2, 4, 0), answer("c", 0, 0, 0, 0, 4)
    )
    assert pair(row, rejected="all")[0] == [("a", "b"), ("a", "c")]
    assert pair(row, rejected="lowest")[0] == [("a", "c")]
    assert pair(row, score="v=1")[0][0][0] == "c"
    assert pair(row, score="nemotron", margin=1.5)[0] == [("a", "c")]


def test_fractional_margins_do_not_fall_to_rounding():
    """0.3 * 3 - 0.3 * 2 is 0.29999999999999993 in floating point."""
    rule = parse_score("h=0.3")
    scores = [rule.of((3, 0, 0, 0, 0)), rule.of((2, 0, 0, 0, 0))]
    assert len(choose(scores, 0.3, "all", random.Random(0))) == 1
    assert parse_score("nemotron").of((4, 3, 2, 1, 4)) == pytest.approx(1.2 + 2.22 + 0.92 + 0.47 - 1.32)
    assert parse_score("nemotron").span() == pytest.approx((-1.32, 7.88))


def test_equal_scores_make_no_pair_under_the_smallest_margin():
    for margin in (1e-9, 1e-7, 1e-6, 0.5):
        assert choose([5.0, 5.0, 5.0], margin, "all", random.Random(0)) == []
        assert [c.rejected for c in choose([5.0, 4.0, 5.0], margin, "all", random.Random(0))] == [1]


@pytest.mark.parametrize("text", ["h=1,h=2", "h=1,c=1,helpfulness=3"])
def test_a_weight_given_twice_is_refused(text):
    with pytest.raises(UserError, match=r"--score: wanted one weight for helpfulness, got two in"):
        parse_score(text)


@pytest.mark.parametrize(
    "text", ["hccc", "h=", "q=1", "h=1,c", "h=0", "h=nan", "h=1,c=-inf", "h=1e308,c=1e308"]
)
def test_a_wrong_score_rule_is_named(text):
    with pytest.raises(UserError, match="--score: wanted"):
        parse_score(text)


def test_held_out_pairs_are_split_by_prompt(pair, tmp_path, read_rows):
    rows = [
        annotation(f"Why {n}?", answer("a", 4, 4, 4), answer("b", 0, 0, 0), answer("c", 1, 1, 1))
        for n in range(60)
    ]
    _, counts = pair(*rows, rejected="all", held_out=0.3)
    train, held_out = (
        {row["question_id"] for row in read_rows(path)}
        for path in (tmp_path / "pairs.jsonl", held_out_path(tmp_path / "pairs.jsonl"))
    )
    assert not train & held_out
    assert len(train | held_out) == 60
    assert 8 <= len(held_out) <= 28
    assert counts.held_out == 2 * len(held_out)


def test_the_choice_for_a_prompt_does_not_depend_on_other_prompts(pair):
    rows = [
        annotation(f"Why {n}?", answer("a", 4, 4, 4), *(answer(f"{n}-{k}", 1, 1, 1) for k in range(5)))
        for n in range(9)
    ]
    assert set(pair(*rows)[0]) == set(pair(*rows[::-1])[0]) > set(pair(*rows[3:])[0])
    assert pair(*rows, seed=1)[0] != pair(*rows, seed=2)[0]
    assert len({rejected.split("-")[1] for _, rejected in pair(*rows)[0]}) > 1  # each prompt draws for itself


def test_the_command_reports_lengths_and_names_a_bad_row(tmp_path, write_rows, command):
    rows = [annotation("Why?", answer("good one", 4, 4, 4), answer("bad", 0, 0, 0))]
    path = write_rows(tmp_path / "a.jsonl", rows)
    code, stdout, _ = command("pair", path, "-o", tmp_path / "p.jsonl")
    assert code == 0
    assert "mean length chosen 8, rejected 3 characters (chosen - rejected +5)" in stdout
    rows[0]["completions"][0]["helpfulness"] = 5
    write_rows(path, rows)
    code, _, stderr = command("pair", path, "-o", tmp_path / "p.jsonl")
    assert code == 2
    assert (
        stderr
        == f"fasttrain-data: {path} line 1: completions.0.helpfulness: wanted less than or equal to 4, got 5\n"
    )
    code, _, stderr = command("pair", path, "-o", tmp_path / "p.jsonl", "--score", "h=0.5")
    assert "spans 0.00 to 2.00" in stderr


def test_a_blank_answer_is_on_no_side_of_a_pair(pair):
    """The trainer and `export` refuse a file with one."""
    blank = [answer("", h=0, c=0), answer(" \n", h=4, c=4, co=4)]
    pairs, counts = pair(
        annotation("one", *blank, answer("good", h=4), answer("bad", h=0)),
        annotation("two", *blank, answer("alone")),
        annotation("three", *blank),
    )
    assert pairs == [("good", "bad")]
    assert counts.account.changed == {"prompts": {"blank answers left out": 6}}
    assert counts.account.dropped == {"prompts": {"one answer only": 1, "blank answers only": 1}}
