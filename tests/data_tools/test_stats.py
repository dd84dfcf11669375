"""Statistics against published values, definitions written out, and files made by hand."""

import json
import math
import random
import re
from itertools import combinations, permutations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fasttrain_data.records import ATTRIBUTES, Annotation
from fasttrain_data.stats.agreement import (
    krippendorff_alpha,
    pearson,
    quadratic_weighted_kappa,
    spearman,
    within,
)
from fasttrain_data.stats.annotation_report import annotation_report
from fasttrain_data.stats.collect import AnnotationSums
from fasttrain_data.stats.report import make_report

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section D: 4 observers, 12 units, values 1 to 5.
KRIPPENDORFF_2011 = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""


@pytest.mark.parametrize(
    ("metric", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_is_krippendorffs_published_value(metric, published):
    rows = [line.split() for line in KRIPPENDORFF_2011.split("\n") if line]
    units = [[int(value) - 1 for value in column if value != "."] for column in zip(*rows, strict=True)]
    assert krippendorff_alpha(units, 5, metric) == pytest.approx(published, abs=5e-4)


def alpha_by_definition(units, levels):
    """1 - observed / expected disagreement over all pairs of values, ordinal distances by counting ranks."""
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]
    count = [values.count(level) for level in range(levels)]

    def distance(a, b):
        low, high = min(a, b), max(a, b)
        return 0 if a == b else (sum(count[low : high + 1]) - (count[low] + count[high]) / 2) ** 2

    observed = sum(sum(distance(a, b) for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    expected = sum(distance(a, b) for a, b in permutations(values, 2))
    return 1 - (len(values) - 1) * observed / expected


def test_alpha_is_its_definition_on_random_ratings():
    rng = random.Random(2)
    for _ in range(20):
        units = [
            [min(4, max(0, rng.randrange(5) // 2 + rng.randrange(3))) for _ in range(rng.randrange(5))]
            for _ in range(9)
        ]
        if len({value for unit in units if len(unit) > 1 for value in unit}) > 1:
            assert krippendorff_alpha(units, 5) == pytest.approx(alpha_by_definition(units, 5), abs=1e-12)


def table_of(one, other, levels=5):
    table = np.zeros((levels, levels))
    for a, b in zip(one, other, strict=True):
        table[a, b] += 1
    return table


@pytest.mark.parametrize(
    ("one", "other", "published"),
    # the worked cases in the tests of the Metrics package (Hamner), which set the metric for Kaggle
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 1], [1, 2, 2], 0.4),
        ([1, 2, 3, 1, 2, 2, 3], [1, 2, 3, 1, 2, 3, 2], 0.75),
    ],
)
def test_kappa_has_the_published_values(one, other, published):
    assert quadratic_weighted_kappa(table_of(one, other)) == pytest.approx(published)


def test_kappa_is_the_mean_squared_difference_against_chance():
    rng = np.random.default_rng(4)
    one, other = rng.integers(0, 5, 83), rng.integers(0, 5, 83)
    by_chance = np.mean([(a - b) ** 2 for a in one for b in other])
    assert quadratic_weighted_kappa(table_of(one, other)) == pytest.approx(
        1 - np.mean((one - other) ** 2) / by_chance
    )


def test_ratings_without_variation_have_no_agreement_to_measure():
    assert math.isnan(quadratic_weighted_kappa(table_of([2, 2], [2, 2])))
    assert math.isnan(krippendorff_alpha([[2, 2], [2, 2]], 5))
    assert math.isnan(quadratic_weighted_kappa(np.zeros((5, 5))))
    assert math.isnan(pearson(np.array([1.0, 1.0]), np.array([1.0, 2.0])))
    assert within(table_of([0, 1, 4], [0, 2, 1]), 0) == pytest.approx(1 / 3)
    assert within(table_of([0, 1, 4], [0, 2, 1]), 1) == pytest.approx(2 / 3)


def test_rank_correlation_gives_ties_their_mean_rank():
    x, y = np.array([1, 2, 2, 3]), np.array([10, 30, 20, 40])
    ranks_x, ranks_y = np.array([1, 2.5, 2.5, 4]), np.array([1, 3, 2, 4])
    assert spearman(x, y) == pytest.approx(np.corrcoef(ranks_x, ranks_y)[0, 1])


def annotation(scores, lengths, votes=(), question="Why?"):
    """votes: (order, scores by answer) per vote; a third element marks a recheck."""
    completions = [
        {"text": "x" * length, **dict(zip(ATTRIBUTES, row, strict=True))}
        for row, length in zip(scores, lengths, strict=True)
    ]
    calls = [
        {
            "key": "k",
            "vote": number,
            "recheck": bool(recheck),
            "order": list(order),
            "status": "ok",
            "scores": [given[index] for index in order],
        }
        for number, (order, given, *recheck) in enumerate(votes)
    ]
    return {
        "question": question,
        "completions": completions,
        "status": "ok",
        "calls": calls,
        "model_version": "v",
    }


def report_of(*rows):
    sums = AnnotationSums()
    for row in rows:
        sums.add(Annotation.model_validate(row))
    return annotation_report(sums)


def row(hcc, cx=0, v=0):
    """Five scores with the given three-attribute sum."""
    h, rest = min(4, hcc), max(0, hcc - 4)
    return [h, min(4, rest), max(0, rest - 4), cx, v]


def test_distributions_correlations_and_yield_are_counted_right():
    report = report_of(
        annotation([row(12), row(9), row(9)], [30, 10, 20]),
        annotation([row(5), row(5)], [10, 40], question="Who?"),
        annotation([row(3), row(4)], [70, 50], question="How?"),
        {"question": "x", "completions": [{"text": "t"}], "status": "blocked_prompt"},
    )
    assert report["statuses"] == {"ok": 3, "blocked_prompt": 1}
    assert report["attributes"]["helpfulness"]["counts"] == [0, 0, 0, 1, 6]
    assert report["attributes"]["helpfulness"]["ceiling"] == pytest.approx(6 / 7)
    helpfulness, correctness = [4, 4, 4, 4, 4, 3, 4], [4, 4, 4, 1, 1, 0, 0]
    assert report["correlation"][0][1] == pytest.approx(np.corrcoef(helpfulness, correctness)[0, 1])
    assert math.isnan(report["correlation"][0][3])
    lengths = [30, 10, 20, 10, 40, 70, 50]
    assert report["length"]["correlation"]["correctness"]["pearson"] == pytest.approx(
        np.corrcoef(correctness, lengths)[0, 1]
    )
    by_margin = {
        entry["margin"]: (entry["prompts"], entry.get("chars_chosen_minus_lowest"))
        for entry in report["yield"]
    }
    assert by_margin[0] == (1, None)
    assert by_margin[1] == (2, 0.0)  # 30 - 10 and 50 - 70
    assert by_margin[2] == by_margin[3] == (1, 20.0)
    assert by_margin[4][0] == 0


def test_position_bias_is_seen_against_the_mean_of_each_call():
    """The judge adds 2 to whatever stands first."""
    rng, rows = random.Random(3), []
    for number in range(60):
        base = [rng.randrange(0, 9) for _ in range(3)]
        order = rng.sample(range(3), 3)
        given = [row(value + (2 if index == order[0] else 0)) for index, value in enumerate(base)]
        rows.append(annotation(given, [5, 5, 5], [(order, given)], question=str(number)))
    first, second, third = report_of(*rows)["position"]
    assert first["calls"] == 60
    assert first["mean_minus_call_mean"] == pytest.approx(
        -(second["mean_minus_call_mean"] + third["mean_minus_call_mean"])
    )
    assert first["mean_minus_call_mean"] > 0.7
    assert first["share_best"] + second["share_best"] + third["share_best"] == pytest.approx(1)


def test_votes_and_rechecks_are_told_apart_and_flips_counted():
    rng, rows, one, other, again = random.Random(5), [], [], [], []
    flips = pairs = 0
    for number in range(40):
        votes = [[[rng.randrange(5) for _ in range(5)] for _ in range(3)] for _ in range(3)]
        orders = rng.sample(list(permutations(range(3))), 3)
        marked = [(orders[0], votes[0]), (orders[1], votes[1]), (orders[2], votes[2], True)]
        rows.append(annotation(votes[0], [5, 5, 5], marked, question=str(number)))
        for answer in range(3):
            one.append(votes[0][answer][1])
            other.append(votes[1][answer][1])
            again.append(votes[2][answer][1])
        for left, right in combinations(votes, 2):
            for a, b in combinations(range(3), 2):
                first, second = (sum(vote[a][:3]) - sum(vote[b][:3]) for vote in (left, right))
                pairs += first != 0
                flips += first * second < 0
    agreement = report_of(*rows)["agreement"]
    symmetric = table_of(one + other, other + one)
    assert agreement["votes"]["correctness"]["kappa"] == pytest.approx(quadratic_weighted_kappa(symmetric))
    assert agreement["votes"]["correctness"]["ratings"] == 120
    assert agreement["recheck"]["correctness"]["ratings"] == 240
    both = table_of(one + again + other + again, again + one + again + other)
    assert agreement["recheck"]["correctness"]["kappa"] == pytest.approx(quadratic_weighted_kappa(both))
    alpha = krippendorff_alpha([list(values) for values in zip(one, other, again, strict=True)], 5)
    assert agreement["krippendorff_alpha"]["correctness"] == pytest.approx(alpha)
    assert agreement["pair_flips"] == pytest.approx(flips / pairs)


def test_the_page_needs_nothing_else_and_numbers_without_meaning_are_null(tmp_path, write_rows, command):
    rows = [
        annotation(
            [row(12), row(2)],
            [9, 5],
            [((0, 1), [row(12), row(2)]), ((1, 0), [row(11), row(2)])],
            question=str(n),
        )
        for n in range(3)
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    code, stdout, _ = command("stats", path)
    assert code == 0
    # and no money: none of the rows says what it cost
    assert stdout.startswith("3 prompts, 6 scored answers\n")
    folder = tmp_path / "a.stats"
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page.replace("data:", "") and "<script" not in page
    numbers = json.loads((folder / "stats.json").read_text())
    assert numbers["correlation"][3][4] is numbers["usd"] is None
    for name in ("scores", "correlation", "length", "position", "yield", "agreement"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_of_any_layout_are_described(tmp_path, write_rows, command, shared_data):
    pairs = [
        {"image": "a.png", "prompt": "Why?", "chosen": "x" * 10, "rejected": "y" * 4, "margin": 2},
        {"image": "a.png", "prompt": "Why?", "chosen": "x" * 10, "rejected": "y" * 20, "margin": 5},
        {"prompt": "Who?", "chosen": "x" * 10, "rejected": "y" * 10, "margin": 2},
    ]
    report = make_report(write_rows(tmp_path / "p.jsonl", pairs))
    assert (report["pairs"], report["prompts"], report["pairs_with_images"]) == (3, 2, 2)
    length = report["length"]
    assert (length["mean_chars_chosen"], length["mean_chosen_minus_rejected"]) == (
        10,
        pytest.approx((6 - 10 + 0) / 3),
    )
    assert (length["share_chosen_longer"], length["share_chosen_shorter"]) == (
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
    )
    assert report["margin"]["counts"] == {"2": 2, "5": 1}
    code, stdout, _ = command(
        "stats", shared_data / "llamafactory_demo" / "dpo_en_demo_first150.json", "--no-files"
    )
    assert (code, "150 pairs of" in stdout) == (0, True)


def test_a_folder_that_import_reads_is_described(tmp_path, command, monkeypatch):
    row = {"prompt": "Why?", "chosen": "xx", "rejected": "y"}
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "set" / f"{name}.parquet")
    monkeypatch.chdir(tmp_path / "set")
    for name in (tmp_path / "set", "."):
        code, stdout, _ = command("stats", name)
        assert (code, "2 pairs of" in stdout) == (0, True)
    assert (tmp_path / "set.stats" / "index.html").is_file()


def test_a_file_of_neither_kind_is_refused(tmp_path, write_rows, command):
    code, _, stderr = command("stats", write_rows(tmp_path / "x.jsonl", [{"foo": 1}]))
    assert (code, "wanted annotations or pairs, got keys foo in line 1" in stderr) == (2, True)
    code, _, stderr = command("stats", write_rows(tmp_path / "x.jsonl", []))
    assert (code, "an empty file" in stderr) == (2, True)
    only_failed = [{"question": "x", "completions": [{"text": "t"}], "status": "empty"}]
    code, stdout, _ = command("stats", write_rows(tmp_path / "x.jsonl", only_failed))
    assert (code, "1 empty" in stdout) == (0, True)


def test_margins_that_are_no_finite_numbers_are_left_out(tmp_path):
    pair = '{"prompt": "Why?", "chosen": "x%d", "rejected": "y", "margin": %s}\n'
    margins = ("2", "1" + "0" * 400, "NaN", "Infinity", "true", "4")
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(pair % item for item in enumerate(margins)))
    assert make_report(path)["margin"] == {"mean": 3.0, "counts": {"2": 1, "4": 1}}


def test_a_prompt_annotated_again_over_the_same_answers_counts_once(tmp_path, write_rows, command):
    once = annotation([row(12), row(2)], [9, 5]) | {"cost_usd": 0.25}
    failed = {"question": once["question"], "completions": once["completions"], "status": "quota"}
    more = annotation([row(3), row(4)], [7, 8])  # the same question with other answers
    path = write_rows(tmp_path / "a.jsonl", [failed, once, once, more, {**once, "created": "later"}])
    report = make_report(path)
    assert report["repeated_rows"] == 2
    assert (report["prompts"], report["answers"], report["usd"]) == (3, 4, 0.25)
    assert "2 rows repeat a prompt" in command("stats", path, "--no-files")[1]


def test_a_number_without_a_meaning_is_shown_as_a_dash(tmp_path, write_rows, command):
    """Every answer as complex as every other: no correlation, and no agreement beyond chance."""
    path = write_rows(tmp_path / "a.jsonl", [annotation([row(12), row(2)], [9, 5])])
    shown = command("stats", path, "--no-files")[1]
    assert "nan" not in shown and "-0" not in shown.split("characters")[-1]
    assert re.search(r"^complexity .* \(0\.\d+\) +-$", shown, re.MULTILINE)


def test_margins_that_look_alike_are_counted_together_and_many_are_not_spelled_out(
    tmp_path, write_rows, command
):
    margins = [1234567.8, 1234567.9, *range(1, 41)]
    rows = [{"prompt": f"q{m}", "chosen": "a", "rejected": "b", "margin": m} for m in margins]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    assert make_report(path)["margin"]["counts"]["1.23457e+06"] == 2
    assert "(41 different ones from 1 to 1.23457e+06)" in command("stats", path, "--no-files")[1]


def test_a_prompt_of_one_answer_is_no_tie(tmp_path, write_rows, command):
    rows = [annotation([row(5)], [10]), annotation([row(5), row(5)], [10, 40], question="Who?")]
    tie = report_of(*rows)["yield"][0]
    assert (tie["prompts"], tie["share"], tie["one_answer"]) == (1, 0.5, 1)
    code, text, _ = command("stats", write_rows(tmp_path / "a.jsonl", rows), "--no-files")
    assert code == 0 and re.search(r"tie +1 +50\.0%\n  none +1 +one answer only\n", text)
