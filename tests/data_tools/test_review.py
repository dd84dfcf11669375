"""Blind review: the page's server, what it reveals, what it keeps through crashes, agreement, Argilla's format."""

import errno
import json
import os
import random
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from fasttrain_data.errors import BadRow, UserError
from fasttrain_data.review.agreement import agreement, agreement_lines, wilson
from fasttrain_data.review.argilla import export_argilla, import_argilla, user_id
from fasttrain_data.review.judgements import Judgements, reviews_path
from fasttrain_data.review.server import ReviewServer
from fasttrain_data.review.session import Review, check_name
from fasttrain_data.stats.agreement import cohen_kappa


@pytest.fixture
def pairs(tmp_path, write_rows, draw):
    draw(tmp_path / "a.png")
    rows = [
        {
            "id": f"p{n}",
            "image": "a.png",
            "prompt": f"Why {n}?",
            "chosen": f"good {n}",
            "rejected": f"bad {n}",
            "margin": 2 + n % 2,
            "scores_chosen": {"helpfulness": 4, "verbosity": 1},
            "scores_rejected": {"helpfulness": 2, "verbosity": 1 if n % 2 else 3},
        }
        for n in range(40)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def serve():
    servers = []

    def start(review, root, **options):
        server = ReviewServer(review, root, **options)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None


def fetch(url, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(urllib.request.Request(url, data, headers), timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_a_reviewer_who_knows_the_good_answers_agrees_with_all(pairs, serve):
    server = serve(Review(pairs, 25, 0), pairs.parent)
    state = json.loads(fetch(server.url + "next?rater=anna")[1])
    sides = []
    while item := state["item"]:
        assert set(item) == {"id", "messages", "images", "left", "right"}  # nothing tells the chosen one
        sides.append("left" if item["left"].startswith("good") else "right")
        code, reply = fetch(server.url + "judge", {"rater": "anna", "id": item["id"], "verdict": sides[-1]})
        state = json.loads(reply)
        assert (code, state["done"], state["total"]) == (200, len(sides), 25)
    assert len(sides) == 25
    assert 6 <= sides.count("left") <= 19
    found = json.loads(fetch(server.url + "agreement")[1])
    assert (found["all"]["agree"], found["all"]["decided"], found["all"]["kappa"]) == (25, 25, 1.0)
    lines = list(agreement_lines(pairs))
    assert lines[1].startswith("all: 25 of 25 agree with the annotator (100.0%")
    assert sum(line.startswith("  margin") for line in lines) == 2


def test_a_stopped_review_goes_on_and_reviewers_are_apart(pairs):
    review = Review(pairs, 10, 0)
    for verdict in ("left", "tie", "skip", "right"):
        review.judge("anna", review.open("anna")[0], verdict)
    again = Review(pairs, 10, 0)
    assert (len(again.open("anna")), len(again.open("ben"))) == (6, 10)
    assert [item.id for item in again.items] == [item.id for item in review.items]
    sides = [[item.chosen_side(0, rater) for item in Review(pairs, 40, 0).items] for rater in ("anna", "ben")]
    assert sides[0] != sides[1]  # one careless side must not look like agreement between people


def test_undo_takes_back_the_newest_judgement_and_only_ones_own(pairs):
    review = Review(pairs, 5, 0)
    first, second, *_ = review.items
    review.judge("anna", first, "left")
    review.judge("ben", first, "tie")
    review.judge("anna", second, "right")
    assert review.undo("anna") is second
    assert Review(pairs, 5, 0).open("anna")[0] is not first
    assert review.undo("anna") is first
    assert review.undo("anna") is None
    assert Review(pairs, 5, 0).judgements.raters() == ["ben"]
    assert len(reviews_path(pairs).read_text().splitlines()) == 5  # nothing is rewritten


def test_every_cut_of_the_file_leaves_whole_judgements_and_the_next_one_stands(pairs):
    review = Review(pairs, 6, 0)
    for item in review.items[:3]:
        review.judge("anna", item, "left")
    path = reviews_path(pairs)
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for cut in random.Random(0).sample(range(1, len(whole)), 40):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut + 1 for end in ends)  # a line is whole without its line break too
        judgements = Judgements(path)
        assert len(judgements.of("anna")) == kept
        judgements.append({"id": "p9", "rater": "anna", "verdict": "tie", "chosen_side": "left"})
        assert len(Judgements(path).of("anna")) == kept + 1
    path.write_text("[1, 2]\n")
    with pytest.raises(BadRow, match="line 1: row: wanted a JSON object"):
        Judgements(path)


def test_several_reviewers_at_once_lose_nothing(pairs):
    review = Review(pairs, 40, 0)

    def work(rater):
        while waiting := review.open(rater):
            review.judge(rater, waiting[0], "left")

    threads = [threading.Thread(target=work, args=(f"r{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Review(pairs, 40, 0).judgements.standing()) == 160


def test_images_are_served_and_nothing_beside_them(pairs, serve, tmp_path, write_rows):
    server = serve(Review(pairs, 5, 0), pairs.parent)
    item = json.loads(fetch(server.url + "next?rater=anna")[1])["item"]
    code, content = fetch(f"{server.url}image?id={item['id']}&n=0")
    assert (code, content) == (200, (tmp_path / "a.png").read_bytes())
    for query in (f"id={item['id']}&n=1", f"id={item['id']}&n=-1", "id=x&n=0", "", "id=../a.png&n=0"):
        assert fetch(f"{server.url}image?{query}")[0] == 404
    assert fetch(server.url + "../pairs.jsonl")[0] == 404
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.svg").write_text("<svg onload='alert(1)'/>")
    for name in ("../a.png", "x.svg"):
        row = {"image": name, "prompt": "x", "chosen": "a", "rejected": "b"}
        outside = write_rows(tmp_path / "sub" / "p.jsonl", [row])
        server = serve(Review(outside, 5, 0), outside.parent)
        item = json.loads(fetch(server.url + "next?rater=anna")[1])["item"]
        assert fetch(f"{server.url}image?id={item['id']}&n=0")[0] == 404, name


def test_other_sites_are_kept_out(pairs, serve, tmp_path):
    server = serve(Review(pairs, 5, 0), pairs.parent)
    assert fetch(server.url + "next?rater=a", Host="evil.example:80")[0] == 403
    judgement = {"rater": "anna", "id": "p0", "verdict": "left"}
    assert fetch(server.url + "judge", judgement, Origin="http://evil.example")[0] == 403
    for wrong in (
        judgement | {"verdict": "best"},
        judgement | {"id": "x"},
        judgement | {"rater": ""},
        ["x"],
        "x",
    ):
        assert fetch(server.url + "judge", wrong)[0] == 400
    assert not (tmp_path / "pairs.reviews.jsonl").exists()
    for name in ("", "review.js"):
        text = fetch(server.url + name)[1].decode()
        assert "innerHTML" not in text and "http://" not in text and "https://" not in text


def test_beyond_this_machine_only_under_a_token(pairs, serve):
    review = Review(pairs, 5, 0)
    with pytest.raises(UserError, match=r"--host: wanted 127\.0\.0\.1, or a token"):
        ReviewServer(review, pairs.parent, host="0.0.0.0")
    server = serve(review, pairs.parent, host="0.0.0.0", token="sesame")
    url = f"http://127.0.0.1:{server.server_port}/"
    for given in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Cookie": "fasttrain_review=no; x"},
        {"Cookie": "\x01"},
    ):
        for path in ("next?rater=a", "", "review.js", "agreement", "image?id=p0&n=0"):
            assert fetch(url + path, **given)[0] == 401
    assert fetch(url + "judge", {"rater": "a", "id": "p0", "verdict": "left"})[0] == 401
    assert fetch(url + "?token=wrong")[0] == 401
    assert fetch(url + "?token=sesame")[0] == 303  # a cookie for the address without the token in it
    for given in ({"Authorization": "Bearer sesame"}, {"Cookie": "fasttrain_review=sesame"}):
        assert fetch(url + "next?rater=a", **given)[0] == 200
    assert fetch(url + "judge", {}, Cookie="fasttrain_review=sesame", Origin="http://evil.example")[0] == 403


def test_a_token_of_any_characters_signs_in_by_the_address_that_is_printed(pairs, serve):
    server = serve(Review(pairs, 5, 0), pairs.parent, token="q/3+Zk&;=ü ==")
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with opener.open(server.url, timeout=10) as page:  # redirected, with the cookie
        assert page.status == 200


def test_a_request_that_is_no_judgement_or_comes_from_nobody_leaves_no_traceback(pairs, serve, capsys):
    server = serve(Review(pairs, 5, 0), pairs.parent)
    for body, told in ((b"[" * 9_000, 9_000), (b"{}", -1)):
        head = (
            f"POST /judge HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Length: {told}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as client:
            client.sendall(head.encode() + body)
            assert client.recv(12) == b"HTTP/1.0 400"
    try:
        raise BrokenPipeError
    except BrokenPipeError:
        server.handle_error(None, ("127.0.0.1", 1))
    assert capsys.readouterr().err == ""


def test_kappa_is_cohens():
    # Cohen's kappa of Viera and Garrett 2005, table 2: 330 and 585 observations
    assert cohen_kappa(np.array([[15, 5], [10, 70]])) == pytest.approx(0.5714, abs=1e-4)
    assert cohen_kappa(np.eye(3)) == 1
    assert np.isnan(cohen_kappa(np.array([[5, 0], [0, 0]]))) and np.isnan(cohen_kappa(np.zeros((2, 2))))


def test_kappa_by_attribute_takes_the_higher_scored_answer_or_neither():
    """Helpfulness always says chosen; verbosity says rejected, or neither."""

    def row(n, verdict, side, verbosity):
        return {
            "id": f"p{n}", "rater": "anna", "verdict": verdict, "chosen_side": side, "margin": 2.0,
            "differences": {"helpfulness": 2, "verbosity": verbosity},
        }  # fmt: skip

    rows = [
        row(0, "left", "left", -1),
        row(1, "right", "left", -1),
        row(2, "tie", "right", 0),
        row(3, "skip", "left", 0),
    ]
    found = agreement(rows)["by_attribute"]
    assert (found["helpfulness"]["agree"], found["helpfulness"]["n"]) == (1, 3)
    assert (found["verbosity"]["agree"], found["verbosity"]["n"]) == (2, 3)  # the second and the tie
    assert found["verbosity"]["kappa"] == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))


def test_reviewers_are_compared_by_answer_not_by_side(pairs):
    review = Review(pairs, 40, 0)
    for item in review.items:
        for rater, right in (("anna", True), ("ben", True), ("cid", False)):
            side = item.chosen_side(0, rater)
            review.judge(rater, item, side if right else {"left": "right", "right": "left"}[side])
    between = review.agreement()["between_raters"]
    assert (between["pairs"]["anna and ben"]["same"], between["pairs"]["anna and cid"]["same"]) == (40, 0)
    assert between["alpha"] < 0
    by_rater = review.agreement()["by_rater"]
    assert (by_rater["anna"]["share"], by_rater["cid"]["share"]) == (1.0, 0.0)
    assert by_rater["cid"]["kappa"] < -0.8


def test_of_a_pair_with_swapped_labels_the_annotators_own_side_counts(tmp_path, write_rows):
    answers = {"chosen": "worse", "rejected": "better", "scores_chosen": {"helpfulness": 1}, "margin": -2.0}
    pair = {"id": "p", "prompt": "q", **answers, "scores_rejected": {"helpfulness": 3}, "flipped": True}
    [item] = Review(write_rows(tmp_path / "pairs.jsonl", [pair]), 1, 0).items
    assert (item.chosen, item.rejected) == ("better", "worse")
    assert (item.margin, item.differences) == (2.0, {"helpfulness": 2})


def test_argilla_records_hold_all_but_the_chosen_side_and_come_back(pairs, tmp_path, write_rows):
    review = Review(pairs, 12, 0)
    for rater, verdicts in (("anna", "left right tie skip"), ("ben", "right")):
        for verdict, item in zip(verdicts.split(), review.items, strict=False):
            review.judge(rater, item, verdict)
    path = tmp_path / "records.json"
    assert export_argilla(review, pairs.parent, path) == 12
    records = json.loads(path.read_text())
    first = records[0]
    assert set(first) == {"id", "fields", "metadata", "suggestions", "responses", "vectors"}
    assert first["fields"]["image_1"].startswith("data:image/png;base64,")
    assert {answer["user_id"] for answer in first["responses"]["preference"]} == {
        user_id("anna"),
        user_id("ben"),
    }
    assert "chosen" not in path.read_text() and "margin" not in path.read_text()
    assert import_argilla(review, path) == (0, 4)
    standing = {(row["rater"], row["id"]): row["verdict"] for row in review.judgements.standing()}
    reviews_path(pairs).unlink()
    fresh = Review(pairs, 12, 0)
    assert import_argilla(fresh, path) == (4, 0)
    came = {(row["rater"], row["id"]): row["verdict"] for row in fresh.judgements.standing()}
    assert came == {key: verdict for key, verdict in standing.items() if verdict != "skip"}
    left = records[5]["fields"]["left"].startswith("good")
    records[5]["responses"] = {"preference": [{"value": "left", "user_id": "1234"}]}
    path.write_text(json.dumps(records))
    import_argilla(fresh, path)
    (row,) = fresh.judgements.of("1234").values()
    assert (row["agrees"], row["id"]) == (left, records[5]["id"])


def test_argilla_records_of_another_review_are_refused(pairs, tmp_path):
    path = tmp_path / "records.json"
    review = Review(pairs, 12, 0)
    export_argilla(review, pairs.parent, path)
    records = json.loads(path.read_text())
    for change, message in (
        ({"id": "x"}, "row 1: id: wanted a pair of pairs.jsonl"),
        ({"fields": {"left": "a", "right": "b"}}, "row 1: fields: wanted this pair's answers"),
        (
            {"responses": {"preference": [{"value": "best"}]}},
            "row 1: responses.preference: wanted left, right or tie",
        ),
        (
            {"responses": {"preference": [{"value": ["left"]}]}},
            "row 1: responses.preference: wanted left, right or tie",
        ),
        ({"responses": [{"value": "left"}]}, "row 1: responses: wanted an object"),
        ({"metadata": "ann"}, "row 1: metadata: wanted an object"),
    ):
        path.write_text(json.dumps([records[0] | change]))
        with pytest.raises(BadRow, match=message):
            import_argilla(review, path)


def test_the_report_needs_reviews_and_is_also_a_file(pairs, command):
    code, _, stderr = command("review", pairs, "--report")
    assert (code, "run the review first" in stderr) == (2, True)
    review = Review(pairs, 3, 0)
    review.judge("anna", review.items[0], "tie")
    code, stdout, _ = command("review", pairs, "--report")
    assert (code, "no preference, 1 ties" in stdout) == (0, True)
    assert json.loads((pairs.parent / "pairs.agreement.json").read_text())["all"]["ties"] == 1
    code, stdout, _ = command("review", pairs, "--to-argilla", pairs.parent / "r.json", "--limit", "3")
    assert (code, "3 records" in stdout) == (0, True)
    code, stdout, _ = command("review", pairs, "--from-argilla", pairs.parent / "r.json", "--limit", "3")
    assert (code, "0 judgements taken over, 1 stood already" in stdout) == (0, True)


def test_mistakes_are_one_line(pairs, command, monkeypatch):
    monkeypatch.delenv("FASTTRAIN_REVIEW_TOKEN", raising=False)
    for options, wanted in (
        (("--host", "0.0.0.0"), "--host: wanted 127.0.0.1, or a token"),
        (("--host", "256.1.1.1.example.invalid"), "--host"),
        (("--rater", "\x07"), "reviewer's name: wanted"),
    ):
        code, _, stderr = command("review", pairs, *options)
        assert (code, wanted in stderr, stderr.count("\n")) == (2, True, 1), stderr
    assert check_name("  Anna  B ") == "Anna B"
    for wrong in ("", " ", "x" * 61, None, 3, "a\u202eb"):
        with pytest.raises(UserError):
            check_name(wrong)


def test_the_interval_is_wilsons(tmp_path, write_rows):
    # Newcombe 1998, table I: 81 of 263 by the score method without continuity correction
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    with pytest.raises(UserError):
        Review(write_rows(tmp_path / "empty.jsonl", []), 5, 0)


def test_judgements_are_synced_before_they_are_acknowledged(pairs, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (real(number), synced.append(number))[0])
    review = Review(pairs, 3, 0)
    review.judge("anna", review.items[0], "left")
    assert len(synced) == 1


def test_a_full_disk_is_told_to_the_page_and_what_is_told_as_lost_is_not_there_later(
    pairs, serve, monkeypatch
):
    review = Review(pairs, 3, 0)
    url = serve(review, pairs.parent).url

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    body = {"rater": "anna", "id": review.items[0].id, "verdict": "left"}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, told = fetch(f"{url}judge", body)
    assert code == 500 and told.decode() == f"not kept: No space left on device: {reviews_path(pairs)}"
    assert not Judgements(reviews_path(pairs)).standing() and not review.judgements.of("anna")
    assert fetch(f"{url}judge", body)[0] == 200
    assert len(Judgements(reviews_path(pairs)).standing()) == 1


def test_pairs_that_share_an_id_are_all_reviewed(tmp_path, write_rows):
    rows = [
        {"id": name, "prompt": f"Why {number}?", "chosen": "good", "rejected": "bad"}
        for number, name in enumerate(["q", "q", "r", "q", "q#2"])
    ]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    review = Review(path, 10, 0)
    asked = {item.id: item.messages[0][1] for item in review.items}
    assert asked == {"q": "Why 0?", "q#2": "Why 1?", "r": "Why 2?", "q#3": "Why 3?", "q#2#2": "Why 4?"}
    review.judge("anna", review.find("q#3"), "left")
    assert [item.id for item in Review(path, 10, 0).open("anna")] == [
        item.id for item in review.items if item.id != "q#3"
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("verdict", "up"),
        ("verdict", ["left"]),
        ("chosen_side", None),
        ("margin", "4"),
        ("differences", {"helpfulness": "3"}),
        ("id", None),
        ("rater", ""),
    ],
)
def test_a_judgement_that_nothing_can_be_reckoned_from_is_named(pairs, command, field, value):
    row = {
        "id": "p1",
        "rater": "anna",
        "verdict": "left",
        "chosen_side": "left",
        "margin": 2.0,
        "differences": {},
    }
    reviews_path(pairs).write_text(json.dumps(row | {field: value}) + "\n")
    code, _, stderr = command("review", pairs, "--report")
    assert code == 2 and f"line 1: {field}: wanted" in stderr and stderr.count("\n") == 1


def test_an_image_that_browsers_do_not_show_is_shown_as_png(tmp_path, write_rows, serve):
    from PIL import Image

    Image.new("RGB", (5, 3)).save(tmp_path / "scan.tiff")
    (tmp_path / "none.tiff").write_text("no image")
    rows = [
        {"id": name, "images": [name], "prompt": "q", "chosen": "a", "rejected": "b"}
        for name in ("scan.tiff", "none.tiff")
    ]
    review = Review(write_rows(tmp_path / "p.jsonl", rows[:1]), 9, 0)
    export_argilla(review, tmp_path, tmp_path / "argilla.json")
    [record] = json.loads((tmp_path / "argilla.json").read_text())
    assert record["fields"]["image_1"].startswith("data:image/png;base64,iVBOR")
    server = serve(Review(write_rows(tmp_path / "p.jsonl", rows), 9, 0), tmp_path)
    with urllib.request.urlopen(f"{server.url}image?id=scan.tiff&n=0") as reply:
        assert reply.headers["Content-Type"] == "image/png" and reply.read(4) == b"\x89PNG"
    assert fetch(f"{server.url}image?id=none.tiff&n=0")[0] == 404


def test_an_image_that_cannot_be_read_is_told_as_one(pairs, serve, monkeypatch):
    review = Review(pairs, 3, 0)
    url = serve(review, pairs.parent).url

    def locked(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", locked)
    code, told = fetch(f"{url}image?id={review.items[0].id}&n=0")
    assert (code, told.decode()) == (404, f"{pairs.parent / 'a.png'}: Permission denied")
    with pytest.raises(UserError, match=r"pair p.*: images: wanted an image, got .*: Permission denied"):
        export_argilla(review, pairs.parent, pairs.parent / "argilla.json")


def test_a_last_line_without_an_end_is_passed_over_whoever_wrote_the_lines(pairs, command):
    whole = '{"verdict":"left","chosen_side":"left","id":"p1","rater":"anna"}\n'
    reviews_path(pairs).write_text(whole + whole[:20])
    code, stdout, _ = command("review", pairs, "--report")
    assert code == 0 and "1 of 1 agree" in stdout


def test_a_margin_that_is_no_finite_number_is_none(tmp_path, write_rows):
    """Other projects' files hold anything: 400 digits, which no float can hold, NaN, true."""
    margins = {"big": 10**400, "nan": float("nan"), "true": True, "text": "2", "good": 2}
    rows = [
        {"id": name, "prompt": "q", "chosen": "a", "rejected": "b", "margin": margin}
        for name, margin in margins.items()
    ]
    review = Review(write_rows(tmp_path / "p.jsonl", rows), 9, 0)
    assert {item.id: item.margin for item in review.items} == dict.fromkeys(margins) | {"good": 2.0}


def test_agreement_by_margin_counts_margins_that_look_alike_together():
    rows = [
        {"id": f"p{n}", "rater": "anna", "verdict": "left", "chosen_side": side, "margin": 2.0 + n / 1e7}
        for n, side in enumerate(("left", "left", "right"))
    ]
    by_margin = agreement(rows)["by_margin"]
    assert {name: (part["agree"], part["decided"]) for name, part in by_margin.items()} == {"2": (2, 3)}
