"""Annotation against the local Gemini double, through both SDKs unmodified."""

import json
import statistics
from collections import Counter
from datetime import date
from itertools import permutations

import pytest

from fasttrain_data.annotations.plan import orders
from fasttrain_data.annotations.prices import price_of
from fasttrain_data.annotations.prompts import Prompt, Prompts
from fasttrain_data.calls.limits import Limiter
from fasttrain_data.gemini_double import FaultMix, GeminiDouble, hash_judge
from fasttrain_data.records import ATTRIBUTES, Completion

SDKS = ("google-genai", "google-generativeai")
# What a prompt ends with when its first request meets a fault that is gone the second time.
ENDS_WITH = {
    **dict.fromkeys(("rate_limit", "rate_limit_header", "server_error", "unavailable"), "retried"),
    **dict.fromkeys(("timeout", "disconnect", "html", "not_json_body"), "retried"),
    "bad_request": "refused_request",
    "bad_image": "bad_image",
    "blocked_prompt": "blocked_prompt",
    "blocked_answer": "blocked_answer",
    "recitation": "recitation",
    "max_tokens": "truncated",
    "max_tokens_thinking": "truncated",
    "empty": "empty",
    **dict.fromkeys(("cut_json", "prose", "string_score"), "malformed"),
    **dict.fromkeys(("missing_answer", "extra_answer", "missing_score"), "missing_scores"),
    **dict.fromkeys(("out_of_range", "float_score"), "out_of_range"),
    **dict.fromkeys(("fenced", "constant", "thoughts", "reversed"), "ok"),
}


def scores_of(row):
    return [[completion[name] for name in ATTRIBUTES] for completion in row["completions"]]


@pytest.mark.parametrize("sdk", SDKS)
def test_the_order_is_shuffled_recorded_and_undone(completions, annotate, tmp_path, sdk):
    seen = []

    def judge(question, images, answers):
        seen.append((question, images, answers))
        return hash_judge(question, images, answers)

    with GeminiDouble(judge) as double:
        code, rows, _, _ = annotate(double, completions(), "--sdk", sdk)
    assert code == 0
    assert [row["question_id"] for row in rows] == [f"q{number}" for number in range(6)]
    for number, row in enumerate(rows):
        texts = [completion["text"] for completion in row["completions"]]
        assert texts == [f"It is {number}, I say {sample}." for sample in range(4)]
        picture = (tmp_path / row["images"][0]).read_bytes()
        assert scores_of(row) == [list(scores) for scores in hash_judge(row["question"], [picture], texts)]
        [call] = row["calls"]
        assert (row["question"], [picture], [texts[index] for index in call["order"]]) in seen
        assert call["scores"] == [scores_of(row)[index] for index in call["order"]]
        assert row["completions"][call["order"][0]]["reason"] == "scripted assessment of answer 1"
        assert (row["status"], row["model_version"], row["sdk"]) == ("ok", "gemini-double-001", sdk)
    assert any(row["calls"][0]["order"] != [0, 1, 2, 3] for row in rows)


@pytest.mark.parametrize("sdk", SDKS)
def test_every_fault_ends_annotated_or_with_its_typed_failure_and_a_rerun_calls_nothing(
    completions, annotate, sdk
):
    shares = dict.fromkeys(ENDS_WITH, 1 / len(ENDS_WITH))
    with GeminiDouble(faults=FaultMix(shares), timeout_s=3, retry_delay_s=0.02) as double:
        path = completions(120)
        code, rows, stdout, _ = annotate(double, path, "--sdk", sdk, "--timeout", "0.5", "--in-flight", "12")
        assert code == 3
        assert len(rows) == 120
        expected = Counter()
        for fault, count in double.outcomes.items():
            name = ENDS_WITH.get(fault, "ok")
            expected[name] += count if name != "retried" else 0
        assert Counter(row["status"] for row in rows) == expected
        assert len(double.outcomes) > 20
        assert set(double.billed().values()) == {1}
        for row in rows:
            assert (row["status"] == "ok") == ("helpfulness" in row["completions"][0])
            assert row["status"] == "ok" or row["detail"]
        calls = len(double.calls)
        again = annotate(double, path, "--sdk", sdk)
        assert (again[0], again[1], len(double.calls)) == (3, rows, calls)
        assert "this run: 0 replies, 0 calls without reply" in again[2]


def test_transient_failures_are_tried_again_by_a_rerun_and_others_on_demand(completions, annotate):
    state = {"bad": True}

    def faults(key, attempt):
        if not state["bad"]:
            return None
        return ("server_error", "blocked_answer", "not_json_body")[int(key, 16) % 3]

    with GeminiDouble(faults=faults) as double:
        path = completions(30)
        code, rows, _, _ = annotate(double, path, "--attempts", "2")
        first = Counter(row["status"] for row in rows)
        assert set(first) == {"server_error", "blocked_answer"}
        state["bad"] = False
        calls = len(double.calls)
        _, rows, _, _ = annotate(double, path)
        assert Counter(row["status"] for row in rows) == {
            "ok": first["server_error"],
            "blocked_answer": first["blocked_answer"],
        }
        assert len(double.calls) - calls == first["server_error"]
        code, rows, _, _ = annotate(double, path, "--retry", "blocked_answer")
        assert (code, Counter(row["status"] for row in rows)) == (0, {"ok": 30})


@pytest.mark.parametrize("sdk", SDKS)
def test_a_daily_quota_stops_cleanly_and_the_next_run_goes_on(completions, annotate, sdk):
    served = []

    def faults(key, attempt):
        served.append(key)
        return "daily_quota" if len(served) > 20 and not renewed else None

    renewed = []
    with GeminiDouble(faults=faults) as double:
        path = completions(60)
        code, rows, _, stderr = annotate(double, path, "--sdk", sdk, "--in-flight", "4")
        assert code == 3
        assert "stopped early: 429" in stderr
        assert Counter(row["status"] for row in rows) == {"ok": 20, "quota": 40}
        assert len(double.calls) < 30
        renewed.append(True)
        code, rows, _, _ = annotate(double, path, "--sdk", sdk)
        assert (code, Counter(row["status"] for row in rows)) == (0, {"ok": 60})
        assert set(double.billed().values()) == {1}


@pytest.mark.parametrize("sdk", SDKS)
@pytest.mark.parametrize("fault", ["bad_key", "forbidden", "not_found"])
def test_a_wrong_key_or_model_ends_the_run_at_once_and_the_key_is_not_shown(
    completions, annotate, tmp_path, sdk, fault
):
    with GeminiDouble(faults=lambda key, attempt: fault, api_key="SECRET-KEY-123") as double:
        code, rows, stdout, stderr = annotate(double, completions(40), "--sdk", sdk, "--in-flight", "2")
        assert (code, rows) == (2, [])
        assert len(double.calls) <= 4
        assert stderr.startswith("fasttrain-data: the server refuses: 40")
        assert stderr.count("\n") == 1
        written = "".join(path.read_text() for path in tmp_path.glob("annotations*"))
        assert "SECRET-KEY-123" not in stdout + stderr + written
        assert not list(tmp_path.glob("annotations*"))


def test_a_missing_key_or_a_bad_address_is_a_mistake_of_the_user(completions, command, tmp_path, monkeypatch):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    arguments = ("annotate", completions(1), "-o", tmp_path / "a.jsonl", "--model", "m")
    assert command(*arguments)[::2] == (
        2,
        "fasttrain-data: wanted an API key in the environment variable GEMINI_API_KEY or GOOGLE_API_KEY, got none\n",
    )
    monkeypatch.setenv("GOOGLE_API_KEY", "k")
    assert command(*arguments, "--base-url", "localhost:1")[0] == 2


def test_bad_images_are_typed_without_a_call(completions, annotate, tmp_path):
    path = completions(6)
    (tmp_path / "img" / "0.png").write_bytes(b"no image")
    (tmp_path / "img" / "1.png").unlink()
    with GeminiDouble() as double:
        code, rows, _, _ = annotate(double, path)
        assert code == 3
        assert Counter(row["status"] for row in rows) == {"bad_image": 4, "ok": 2}
        assert len(double.calls) == 2
        assert "not a file of type PNG" in rows[0]["detail"]
        assert "no such file" in rows[1]["detail"]


def test_images_outside_the_root_are_refused(completions, annotate, tmp_path, write_rows, draw):
    draw(tmp_path.parent / "outside.png")
    row = {"id": "1", "question_id": "1", "image": "../outside.png", "question": "Why?", "text": "So."}
    with GeminiDouble() as double:
        _, [made], _, _ = annotate(double, write_rows(tmp_path / "c.jsonl", [row]))
        assert made["status"] == "bad_image"
        assert "outside the image root" in made["detail"]
        assert not double.calls


def test_votes_differ_in_order_and_give_the_median(completions, annotate):
    number = iter(range(10_000))

    def judge(question, images, answers):
        base = next(number)
        return [((base + len(answer)) % 5,) * 5 for answer in answers]

    with GeminiDouble(judge) as double:
        _, rows, _, _ = annotate(double, completions(8), "--votes", "3", "--recheck", "0.5")
    rechecked = 0
    for row in rows:
        votes = [call for call in row["calls"] if not call["recheck"]]
        rechecked += len(row["calls"]) - len(votes)
        assert len(votes) == 3
        assert len({tuple(call["order"]) for call in row["calls"]}) == len(row["calls"])
        for index, scores in enumerate(scores_of(row)):
            given = [call["scores"][call["order"].index(index)] for call in votes]
            assert scores == [int(statistics.median(column)) for column in zip(*given, strict=True)]
    assert 1 <= rechecked <= 7


def test_a_minority_of_failed_votes_does_not_spoil_a_prompt(completions, annotate):
    failing = set()

    def faults(key, attempt):
        failing.add(key)
        return "cut_json" if sorted(failing).index(key) % 3 == 0 else None

    with GeminiDouble(faults=faults) as double:
        _, rows, _, _ = annotate(double, completions(20), "--votes", "3", "--in-flight", "1")
    for row in rows:
        ok = sum(call["status"] == "ok" for call in row["calls"])
        assert row["status"] == ("ok" if ok >= 2 else "malformed")
        assert ("partial_votes" in row.get("flags", [])) == (ok == 2)
    assert {row["status"] for row in rows} == {"ok", "malformed"}


def test_single_mode_asks_one_answer_per_call(completions, annotate):
    with GeminiDouble() as double:
        _, rows, _, _ = annotate(double, completions(3), "--mode", "single")
        assert [call.answers for call in double.calls] == [1] * 12
    assert all(row["status"] == "ok" for row in rows)
    assert [[call["order"] for call in row["calls"]] for row in rows] == [[[0], [1], [2], [3]]] * 3


def test_completions_of_one_question_belong_together_wherever_they_stand(tmp_path, write_rows):
    rows = [
        {
            "id": f"{question}{sample}",
            "question_id": question,
            "question": f"{question}?",
            "text": f"{question}{sample}",
        }
        for sample in range(3)
        for question in "ba"
    ]
    rows.append({"id": "x", "question_id": "b", "question": "another?", "text": "b0"})
    rows.append({"id": "y", "question_id": "a", "question": "a?", "text": "a1", "count": 2})
    prompts = list(Prompts(write_rows(tmp_path / "c.jsonl", rows)))
    assert [prompt.question for prompt in prompts] == ["b?", "a?", "another?"]
    assert [[(c.text, c.count) for c in prompt.completions] for prompt in prompts] == [
        [("b0", 1), ("b1", 1), ("b2", 1)],
        [("a0", 1), ("a1", 3), ("a2", 1)],
        [("b0", 1)],
    ]


def test_orders_run_through_all_permutations_before_one_repeats():
    texts = [Completion(id=text, question_id="q", question="q", text=text) for text in "abc"]
    prompt = Prompt("q", (), (), "q", tuple(texts))
    drawn = [order for _, (order, _) in zip(range(12), orders(prompt, 0))]
    assert set(drawn[:6]) == set(drawn[6:]) == set(permutations(range(3)))
    one = Prompt("q", (), (), "q", tuple(texts[:1]))
    assert [order for _, (order, _) in zip(range(3), orders(one, 0))] == [(0,)] * 3


def test_equal_questions_under_two_ids_are_paid_once(tmp_path, write_rows, annotate):
    rows = [
        {"id": f"{q}{t}", "question_id": q, "question": "Why?", "text": t} for q in "ab" for t in ("only",)
    ]
    with GeminiDouble() as double:
        code, made, _, _ = annotate(double, write_rows(tmp_path / "c.jsonl", rows))
        assert (code, len(made), len(double.calls)) == (0, 2, 1)


def test_mixed_model_versions_are_refused_without_a_flag(completions, annotate, tmp_path):
    version = ["v1"]
    with GeminiDouble(model_version=lambda: version[0]) as double:
        path = completions(10)
        annotate(double, path)
        (tmp_path / "annotations.jsonl").unlink()
        rows = path.read_text()
        path.write_text(rows + rows.replace("It is", "That is").replace('_id": "q', '_id": "r'))
        version[0] = "v2"
        calls = len(double.calls)
        code, made, _, stderr = annotate(double, path, "--in-flight", "2")
        assert (code, made) == (2, [])
        assert "wanted replies of one model version, got v1, v2" in stderr
        assert len(double.calls) - calls <= 4
        spent = len(double.calls)
        assert annotate(double, path)[0] == 2  # still refused, and nothing more is paid for
        assert len(double.calls) == spent
        code, made, _, _ = annotate(double, path, "--allow-mixed-versions")
        assert code == 0
        assert {row["model_version"] for row in made} == {"v1", "v2"}
        assert set(double.billed().values()) == {1}


def test_a_dry_run_counts_and_calls_nothing_and_leaves_nothing(completions, annotate, tmp_path, read_rows):
    with GeminiDouble() as double:
        path = completions(10)
        code, rows, stdout, _ = annotate(double, path, "--dry-run", "--votes", "2")
        assert (code, rows, len(double.calls)) == (0, [], 0)
        assert "calls to make                20" in stdout
        assert "USD at 0.75 / 3.75 per million" in stdout
        assert not list(tmp_path.glob("annotations*"))
        annotate(double, path)
        _, _, stdout, _ = annotate(double, path, "--dry-run", "--votes", "2")
        assert "calls to make                10" in stdout
        assert "calls in journal             10" in stdout
        assert "mean of the replies in the journal" in stdout
        assert "unknown" in annotate(double, path, "--dry-run", model="some-model")[2]
    assert len(read_rows(tmp_path / "annotations.journal.jsonl")) == 10


PRICES = "prices:\n- {model: dear, from: 2020-01-01, input: 0, output: 1000}\n"


def test_the_cost_cap_is_never_passed_and_counts_earlier_runs(completions, annotate, tmp_path):
    table = tmp_path / "prices.yaml"
    table.write_text(PRICES)
    path = completions(30)
    with GeminiDouble() as double:
        # a reply costs about 0.15 USD, and 0.40 USD are set aside for each call in flight
        arguments = ("--prices", table, "--max-output-tokens", "400", "--in-flight", "6")
        code, rows, _, stderr = annotate(double, path, *arguments, "--max-cost", "2", model="dear")
        spent = sum(call["cost_usd"] for row in rows for call in row["calls"] if "cost_usd" in call)
        assert code == 3
        assert "--max-cost 2.0 USD is reached" in stderr
        assert 1.5 < spent <= 2
        assert Counter(row["status"] for row in rows).keys() == {"ok", "quota"}
        calls = len(double.calls)
        code, _, _, _ = annotate(double, path, *arguments, "--max-cost", "2", model="dear")
        assert (code, len(double.calls)) == (3, calls)
        code, rows, _, _ = annotate(double, path, *arguments, "--max-cost", "100", model="dear")
        assert code == 0
        assert annotate(double, path, "--max-cost", "1", model="unpriced")[0] == 2


def test_replies_that_had_no_price_cost_unknown_money_and_count_at_todays_price(
    completions, annotate, tmp_path
):
    table = tmp_path / "prices.yaml"
    table.write_text(PRICES)
    path = completions(30)
    with GeminiDouble(faults=lambda key, attempt: "float_score") as double:
        _, _, stdout, _ = annotate(double, path, model="dear")
        assert "output tokens, cost unknown (no price for this model today: --prices FILE)" in stdout
        calls = len(double.calls)
        capped = ("--prices", table, "--max-cost", "2", "--max-output-tokens", "400")
        code, _, _, stderr = annotate(double, path, *capped, "--retry", "out_of_range", model="dear")
        assert (code, len(double.calls)) == (3, calls), stderr  # what the first run took is more than the cap
        assert "--max-cost 2.0 USD is reached" in stderr


def test_a_price_may_begin_at_a_moment_of_a_day(tmp_path):
    table = tmp_path / "prices.yaml"
    row = "{model: x, from: 2026-01-02 10:00:00, to: 2026-02-01T00:00:00Z, input: 1, output: 2}"
    table.write_text(f"prices:\n- {row}\n")
    days = (date(2026, 1, 1), date(2026, 1, 2), date(2026, 2, 1), date(2026, 2, 2))
    assert [price_of("x", table, day) is not None for day in days] == [False, True, True, False]


def test_a_broken_price_table_is_named(completions, annotate, tmp_path):
    table = tmp_path / "prices.yaml"
    table.write_text("prices:\n- {model: x, input: 1}\n")
    with GeminiDouble() as double:
        code, _, _, stderr = annotate(double, completions(1), "--prices", table)
    assert code == 2
    assert f"{table}: wanted prices:" in stderr


def test_constant_scores_are_flagged(completions, annotate):
    with GeminiDouble(faults=lambda key, attempt: "constant") as double:
        code, rows, stdout, _ = annotate(double, completions(3))
    assert code == 0
    assert [row["flags"] for row in rows] == [["constant_scores"]] * 3
    assert "flagged        3  constant_scores" in stdout


def test_no_minute_limit_of_the_server_is_run_into(completions, annotate, monkeypatch):
    starts, start = [], Limiter.start

    def noted(self, now_s, tokens=0):
        starts.append(now_s)
        start(self, now_s, tokens)

    monkeypatch.setattr(Limiter, "start", noted)  # how late a call reaches the server is not ours
    with GeminiDouble() as double:
        annotate(double, completions(12), "--rpm", "3000", "--in-flight", "12")
    assert len(starts) == len(double.calls) == 12
    assert starts[-1] - starts[0] >= 11 * 60 / 3000


def test_both_path_versions_are_spoken(completions, annotate):
    with GeminiDouble() as double:
        path = completions(1)
        annotate(double, path, out="a.jsonl")
        annotate(double, path, "--api-version", "v1beta", out="b.jsonl")
        annotate(double, path, "--sdk", "google-generativeai", out="c.jsonl")
        assert [call.version for call in double.calls] == ["v1", "v1beta", "v1beta"]
        assert len({call.key for call in double.calls[:2]}) == 1


def test_gif_images_are_sent_as_png(annotate, tmp_path, write_rows):
    from PIL import Image

    Image.new("RGB", (4, 3), (1, 2, 3)).save(tmp_path / "a.gif")
    row = {"id": "1", "question_id": "1", "image": "a.gif", "question": "Why?", "text": "So."}
    sent = []

    def judge(question, images, answers):
        sent.extend(images)
        return [(1, 1, 1, 1, 1)]

    with GeminiDouble(judge) as double:
        assert annotate(double, write_rows(tmp_path / "c.jsonl", [row]))[0] == 0
    assert sent[0].startswith(b"\x89PNG")


def test_the_judge_sees_photos_upright_and_greys_of_16_bits_as_greys(
    annotate, tmp_path, write_rows, read_rows
):
    import io

    import numpy as np
    from PIL import Image

    photo = Image.fromarray(np.full((2, 3, 3), (200, 10, 10), np.uint8))
    turned = Image.Exif()
    turned[Image.ExifTags.Base.Orientation] = 6
    more = {"save_all": True, "append_images": [photo], "exif": turned}
    photo.save(tmp_path / "photo.jpg", "MPO", **more)
    photo.save(tmp_path / "plain.jpg", exif=turned)
    grey = np.array([[0, 256, 30000], [256 * 129, 65000, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.save(tmp_path / "same.png")
    photo.save(tmp_path / "clear.png", transparency=(200, 10, 10))
    photo.quantize(2).save(tmp_path / "clear.gif", transparency=0)
    Image.fromarray(np.full((2, 2), -1.5, np.float32)).save(tmp_path / "depth.tif")
    rows = [
        {"id": name, "question_id": name, "image": name, "question": name, "text": "So."}
        for name in ("photo.jpg", "grey.tif", "depth.tif", "plain.jpg", "grey.png", "cmyk.jpg", "same.png", "clear.png", "clear.gif")
    ]  # fmt: skip
    sent, came = {}, {}

    def judge(question, images, answers):
        sent[question], came[question] = Image.open(io.BytesIO(images[0])), images[0]
        return [(1, 1, 1, 1, 1)]

    with GeminiDouble(judge) as double:
        _, found, _, _ = annotate(double, write_rows(tmp_path / "c.jsonl", rows))
    assert [row["status"] for row in found] == ["ok", "ok", "bad_image"] + 6 * ["ok"]
    assert sent["photo.jpg"].size == sent["plain.jpg"].size == (2, 3)
    for name in ("grey.tif", "grey.png"):
        assert np.asarray(sent[name])[..., 1].tolist() == (grey // 256).tolist()
    assert sent["cmyk.jpg"].mode == "RGB"
    for name in ("clear.png", "clear.gif"):
        assert sent[name].convert("RGBA").getpixel((0, 0)) == (200, 10, 10, 255)
    assert came["same.png"] == (tmp_path / "same.png").read_bytes()


def test_thinking_that_the_older_sdk_does_not_name_is_paid_for(completions, annotate, tmp_path):
    costs = {}
    for sdk in SDKS:
        with GeminiDouble(faults=FaultMix({"max_tokens_thinking": 1.0})) as double:
            _, [row], _, _ = annotate(double, completions(1), "--sdk", sdk, out=f"{sdk}.jsonl")
        [entry] = [json.loads(line) for line in (tmp_path / f"{sdk}.journal.jsonl").read_text().splitlines()]
        assert (row["status"], entry["usage"]["thoughts"], entry["usage"]["output"]) == ("truncated", 8000, 0)
        costs[sdk] = entry["cost_usd"]
    assert len(set(costs.values())) == 1 and None not in costs.values()


def test_annotating_imports_no_torch(tmp_path):
    import subprocess
    import sys

    from PIL import Image

    Image.new("RGB", (4, 3)).save(tmp_path / "a.gif")
    code = (
        "import sys, fasttrain_data.annotations.run, fasttrain_data.commands.group, fasttrain_data.gemini_double, "
        "fasttrain_data.pairs.build, fasttrain_data.questions.build\n"
        "assert not {'torch', 'transformers', 'fasttrain', 'google.genai', 'matplotlib'} & set(sys.modules)\n"
        "from pathlib import Path\n"
        "from fasttrain_data.annotations.prompts import ImageReader\n"
        f"assert ImageReader(Path({str(tmp_path)!r}))(('a.gif',))[0].mime_type == 'image/png'\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_why_prompts_failed_is_said_by_status(completions, annotate):
    with GeminiDouble(faults=lambda key, attempt: "forbidden" if attempt else "bad_request") as double:
        code, rows, stdout, _ = annotate(double, completions(prompts=3))
    assert (code, {row["status"] for row in rows}) == (3, {"refused_request"})
    assert "3  refused_request, the first: 400: Request contains an invalid argument." in stdout


@pytest.mark.parametrize("option", ["--max-cost", "--rpm", "--timeout", "--temperature"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none_is_refused(completions, annotate, option, value):
    """`--max-cost nan` was no cap at all."""
    with GeminiDouble() as double:
        code, _, _, stderr = annotate(double, completions(prompts=1), option, value)
    assert (code, double.calls) == (2, [])
    assert f"Invalid value for '{option}': wanted a finite number, got {value}" in stderr


def test_a_timeout_longer_than_sockets_can_wait_is_refused(completions, annotate):
    with GeminiDouble() as double:
        code, _, _, stderr = annotate(double, completions(prompts=1), "--timeout", "1e12")
    assert (code, double.calls) == (2, [])
    assert "Invalid value for '--timeout': 1000000000000.0 is not in the range 0<x<=1000000" in stderr
