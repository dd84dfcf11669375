"""Blind review: the page's server, what it reveals, what it keeps, how agreement is counted."""

import json
import threading
import urllib.error
import urllib.request

import pytest

from fasttrain_data.errors import UserError
from fasttrain_data.review.server import ReviewServer
from fasttrain_data.review.session import Session, agreement_lines, wilson


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
        }
        for n in range(40)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def serve():
    servers = []

    def start(session, root):
        server = ReviewServer(session, root)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def fetch(url, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_a_reviewer_who_knows_the_good_answers_agrees_with_all(pairs, serve):
    session = Session(pairs, 25, 0, "anna")
    server = serve(session, pairs.parent)
    sides = []
    while (item := json.loads(fetch(server.url + "next")[1]))["left_over"]:
        assert set(item) == {
            "id",
            "messages",
            "images",
            "left",
            "right",
            "left_over",
        }  # nothing tells the chosen one
        sides.append("left" if item["left"].startswith("good") else "right")
        assert fetch(server.url + "judge", {"id": item["id"], "verdict": sides[-1]})[0] == 200
    assert len(sides) == 25
    assert 6 <= sides.count("left") <= 19
    lines = list(agreement_lines(pairs))
    assert lines[1].startswith("all: 25 of 25 agree with the annotator (100.0%")
    assert sum("margin" in line for line in lines) == 2


def test_a_stopped_review_goes_on_and_raters_are_apart(pairs):
    session = Session(pairs, 10, 0, "anna")
    first = session.open[0]
    session.judge(first, "left" if first.chosen_left else "right")
    session.judge(session.open[0], "tie")
    session.judge(session.open[0], "skip")
    wrong = session.open[0]
    session.judge(wrong, "right" if wrong.chosen_left else "left")
    assert len(Session(pairs, 10, 0, "anna").open) == 6
    assert len(Session(pairs, 10, 0, "ben").open) == 10
    assert "all: 1 of 2 agree with the annotator (50.0%" in "\n".join(agreement_lines(pairs))


def test_images_are_served_and_nothing_beside_them(pairs, serve, tmp_path, write_rows):
    server = serve(Session(pairs, 5, 0, "anna"), pairs.parent)
    item = json.loads(fetch(server.url + "next")[1])
    code, content = fetch(f"{server.url}image?id={item['id']}&n=0")
    assert (code, content) == (200, (tmp_path / "a.png").read_bytes())
    for query in (f"id={item['id']}&n=1", f"id={item['id']}&n=-1", "id=x&n=0", "", "id=../a.png&n=0"):
        assert fetch(f"{server.url}image?{query}")[0] == 404
    assert fetch(server.url + "../pairs.jsonl")[0] == 404
    outside = write_rows(
        tmp_path / "sub" / "p.jsonl", [{"image": "../a.png", "prompt": "x", "chosen": "a", "rejected": "b"}]
    )
    server = serve(Session(outside, 5, 0, "anna"), outside.parent)
    item = json.loads(fetch(server.url + "next")[1])
    assert fetch(f"{server.url}image?id={item['id']}&n=0")[0] == 404


def test_other_sites_are_kept_out(pairs, serve, tmp_path):
    server = serve(Session(pairs, 5, 0, "anna"), pairs.parent)
    assert fetch(server.url + "next", Host="evil.example:80")[0] == 403
    judgement = {"id": "p0", "verdict": "left"}
    assert fetch(server.url + "judge", judgement, Origin="http://evil.example")[0] == 403
    assert fetch(server.url + "judge", {"id": "p0", "verdict": "best"})[0] == 400
    assert fetch(server.url + "judge", ["x"])[0] == 400
    assert not (tmp_path / "pairs.reviews.jsonl").exists()
    page = fetch(server.url)[1].decode()
    assert "innerHTML" not in page and "http://" not in page and "https://" not in page


def test_the_report_alone_needs_reviews(pairs, command):
    code, _, stderr = command("review", pairs, "--report")
    assert (code, "run the review first" in stderr) == (2, True)
    session = Session(pairs, 3, 0, "anna")
    session.judge(session.open[0], "tie")
    code, stdout, _ = command("review", pairs, "--report")
    assert (code, "no preference, 1 ties" in stdout) == (0, True)


def test_the_interval_is_wilsons(tmp_path, write_rows):
    # Newcombe 1998, table I: 81 of 263 by the score method without continuity correction
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    with pytest.raises(UserError):
        Session(write_rows(tmp_path / "empty.jsonl", []), 5, 0, "anna")
