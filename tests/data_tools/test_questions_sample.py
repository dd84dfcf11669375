"""Which of the questions are taken: shares, limits, rows."""

import itertools
import random

from turns import gpt, human

from fasttrain_data.questions.build import QuestionSettings, build_questions
from fasttrain_data.questions.sample import BottomK, Shuffled, share_out


def test_share_out_gives_a_short_stratum_what_it_has_and_the_rest_to_others():
    rng = random.Random(5)
    assert share_out(6000, {"sci": 295_602, "lrv": 300_000}) == {"sci": 3000, "lrv": 3000}
    assert share_out(10, {"a": 2, "b": 0, "c": 100, "d": 3}) == {"a": 2, "b": 0, "c": 5, "d": 3}
    for _ in range(50):
        available = {name: rng.randrange(20) for name in "abcde"}
        total = rng.randrange(120)
        shares = share_out(total, available)
        assert sum(shares.values()) == min(total, sum(available.values()))
        capped = [name for name in shares if shares[name] < available[name]]
        assert all(shares[name] <= available[name] for name in shares)
        assert all(max(shares.values()) - shares[name] <= 1 for name in capped)


def test_the_sample_does_not_depend_on_the_order_of_the_rows():
    keys = [f"k{number}" for number in range(400)]
    picked = []
    for order in (keys, keys[::-1]):
        heap = BottomK(31, seed=7)
        for key in order:
            heap.offer(key, key)
        picked.append(heap.ordered())
    assert picked[0] == picked[1]
    assert len(set(picked[0])) == 31
    other = BottomK(31, seed=8)
    for key in keys:
        other.offer(key, key)
    assert other.ordered() != picked[0]


def test_a_limit_is_shared_by_the_sources_and_broken_images_are_replaced(folder, write_rows, read_rows):
    rows = [{"question": f"What is {number}?", "image": f"img/{number % 6}.png"} for number in range(40)]
    rows += [{"question": f"What is {number}?", "image": "img/broken.png"} for number in range(40)]
    one = write_rows(folder / "one.jsonl", rows)
    two = write_rows(folder / "two.jsonl", [{"image_id": "0", "question": "Which?"}])
    (folder / "0.jpg").write_bytes((folder / "img" / "0.png").read_bytes())
    settings = QuestionSettings(limit=20, seed=4)
    build_questions([str(one), str(two)], folder / "q.jsonl", settings)
    first = read_rows(folder / "q.jsonl")
    assert [row["source_file"] for row in first] == ["one.jsonl"] * 19 + ["two.jsonl"]
    places = [int(row["source_place"].split()[1]) for row in first[:-1]]
    assert places == sorted(places)
    build_questions([str(one), str(two)], folder / "again.jsonl", settings)
    again = read_rows(folder / "again.jsonl")
    assert [row["id"] for row in again] == [row["id"] for row in first]
    build_questions([str(one), str(two)], folder / "q.jsonl", QuestionSettings(limit=20, seed=5))
    assert [row["id"] for row in read_rows(folder / "q.jsonl")] != [row["id"] for row in first]


def test_what_a_stratum_turns_out_not_to_have_the_others_give(folder, write_rows, read_rows):
    rows = [{"question": f"What is {number}?", "image": f"img/{number % 6}.png"} for number in range(40)]
    one = write_rows(folder / "one.jsonl", rows)
    rows = [{"question": f"What is {number}?", "image": "img/broken.png"} for number in range(30)]
    rows[7]["image"] = rows[8]["image"] = "img/0.png"
    two = write_rows(folder / "two.jsonl", rows)
    settings = QuestionSettings(limit=20, seed=4)
    account = build_questions([str(two), str(one)], folder / "q.jsonl", settings)
    kept = read_rows(folder / "q.jsonl")
    assert [row["source_file"] for row in kept] == ["two.jsonl"] * 2 + ["one.jsonl"] * 18
    assert account.notes == ["sampled two.jsonl: 2 of 30", "sampled one.jsonl: 18 of 40"]
    build_questions([str(two), str(one)], folder / "again.jsonl", settings)
    assert [row["id"] for row in read_rows(folder / "again.jsonl")] == [row["id"] for row in kept]
    build_questions([str(two), str(one)], folder / "q.jsonl", QuestionSettings(limit=99))
    assert len(read_rows(folder / "q.jsonl")) == 42


def test_a_limit_is_met_however_many_bad_images_are_drawn_before(folder, write_rows, read_rows):
    rows = [{"question": f"What is {number}?", "image": "img/broken.png"} for number in range(300)]
    for number in range(0, 300, 20):
        rows[number]["image"] = f"img/{number // 20 % 6}.png"
    source = write_rows(folder / "s.jsonl", rows)
    found = []
    for limit in (5, 12, 15, 16):
        account = build_questions([str(source)], folder / "q.jsonl", QuestionSettings(limit=limit, seed=3))
        found.append({row["id"] for row in read_rows(folder / "q.jsonl")})
    assert [len(ids) for ids in found] == [5, 12, 15, 15]
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(found))
    assert account.notes == [
        "sampled s.jsonl: 15 of 300",
        "wanted 16 questions (--limit), got 15: no more can be used",
    ]
    build_questions(
        [str(write_rows(folder / "s.jsonl", rows[::-1]))],
        folder / "q.jsonl",
        QuestionSettings(limit=5, seed=3),
    )
    assert {row["id"] for row in read_rows(folder / "q.jsonl")} == found[0]


def test_strata_are_drawn_in_a_seeded_order_that_is_not_the_rows():
    drawn = []
    for seed, keys in ((7, range(400)), (7, range(399, -1, -1)), (8, range(400))):
        items = Shuffled(seed)
        for key in keys:
            items.add("even" if key % 2 == 0 else "odd \udcff", str(key), {"key": key})
        assert items.sizes["even"] == items.sizes["odd \udcff"] == 200
        drawn.append([item["key"] for item in items.draw("even")])
        items.close()
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == list(range(0, 400, 2)) != drawn[0]


def test_rows_of_the_paper_can_be_cut_out(folder, write_rows, read_rows):
    source = write_rows(folder / "s.jsonl", [{"question": f"What is {number}?"} for number in range(9)])
    build_questions([str(source)], folder / "q.jsonl", QuestionSettings(rows=(3, 5)))
    assert [row["question"] for row in read_rows(folder / "q.jsonl")] == ["What is 3?", "What is 4?"]
    turns = [
        [human(f"What is {number}?"), gpt("A."), human(f"Why {number}?"), gpt("B.")] for number in range(4)
    ]
    turns[1][0] = gpt("no question")  # a row all the same
    rows = [{"image": "img/0.png", "conversations": conversation} for conversation in turns]
    source = write_rows(folder / "s.jsonl", rows)
    settings = QuestionSettings(rows=(1, 3), turns="each")
    account = build_questions([str(source)], folder / "q.jsonl", settings)
    assert [row["question"] for row in read_rows(folder / "q.jsonl")] == ["What is 2?", "Why 2?"]
    assert account.dropped["s.jsonl"] == {"outside --rows": 4, "no question": 1}
