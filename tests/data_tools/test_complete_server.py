"""Sampling from an OpenAI-compatible server: what it is asked, its faults, its odd replies."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fasttrain_data.completions.samples import SampleSettings
from fasttrain_data.errors import UserError


@pytest.fixture
def openai_server():
    """An OpenAI-compatible server; `plan(body, attempt)` returns (status, body or text)."""
    seen, lock, attempts = [], threading.Lock(), Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                key = json.dumps([body["messages"], body["seed"]])
                attempt = attempts[key]
                attempts[key] += 1
                seen.append((self.path, dict(self.headers), body))
            status, reply = server.plan(body, attempt)
            raw = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            if status == 429:
                self.send_header("Retry-After", "0.05")
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = seen
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.plan = lambda body, attempt: (200, said(body))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def said(body):
    text = f"answer with seed {body['seed']}"
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"completion_tokens": 5}, "model": "served-1"}


def test_a_server_gets_the_image_the_conversation_and_the_seed(
    questions, tmp_path, command, openai_server, read_rows, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "server-key")
    out = tmp_path / "c.jsonl"
    arguments = (
        "complete",
        questions,
        "-o",
        out,
        "-m",
        "served",
        "--server",
        openai_server.url + "/v1",
        "--samples",
        "2",
    )
    code, stdout, _ = command(*arguments)
    assert (code, "6 completions of 3 questions, 6 drawn now" in stdout) == (0, True)
    path, headers, body = next(item for item in openai_server.seen if len(item[2]["messages"]) == 3)
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer server-key"
    assert (body["model"], body["temperature"], body["max_tokens"], body["n"]) == ("served", 0.7, 1024, 1)
    first, second, third = body["messages"]
    assert first["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert (first["content"][1]["text"], second["content"]) == ("what is it?", "the chart")
    assert third["content"] == "and the left bar between the bars in this chart?"
    rows = read_rows(out)
    assert [row["text"] for row in rows] == [f"answer with seed {row['seed']}" for row in rows]
    assert {row["model_version"] for row in rows} == {"served-1"}
    assert command(*arguments)[0] == 0
    assert len(openai_server.seen) == 6
    assert "server-key" not in "".join(path.read_text() for path in tmp_path.glob("c.*"))


def test_a_server_sees_pictures_as_training_does(tmp_path, write_rows, read_rows, command, openai_server):
    import base64
    import io

    import numpy as np
    from PIL import Image

    turned = Image.Exif()
    turned[Image.ExifTags.Base.Orientation] = 6
    Image.new("RGB", (3, 2), (200, 10, 10)).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(np.full((2, 2), 256 * 129, np.uint16)).save(tmp_path / "grey.png")
    buffer = io.BytesIO()
    Image.new("RGBA", (64, 64), (5, 6, 7, 0)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:-40])
    names = ("turned.jpg", "grey.png", "cut.png")
    rows = [{"id": name, "images": [name], "question": name} for name in names]
    path, out = write_rows(tmp_path / "questions.jsonl", rows), tmp_path / "c.jsonl"
    code, stdout, _ = command(
        "complete", path, "-o", out, "-m", "served", "--server", openai_server.url, "--samples", 1
    )
    assert code == 0 and "1  bad image" in stdout
    seen = {}
    for _, _, body in openai_server.seen:
        url, question = (part.get("image_url", part) for part in body["messages"][0]["content"])
        kind, _, content = url["url"].partition(",")
        assert kind == "data:image/png;base64"
        seen[question["text"]] = Image.open(io.BytesIO(base64.b64decode(content)))
    assert set(seen) == {"turned.jpg", "grey.png"}
    assert seen["turned.jpg"].size == (2, 3)
    assert seen["grey.png"].getpixel((0, 0)) == (129, 129, 129)


def test_a_repeated_question_is_drawn_and_written_once(
    questions, tmp_path, command, openai_server, read_rows
):
    rows = questions.read_text().splitlines(keepends=True)
    questions.write_text("".join([*rows, rows[1]]))
    out = tmp_path / "c.jsonl"
    arguments = (questions, "-o", out, "-m", "served", "--server", openai_server.url, "--samples", "2")
    code, stdout, _ = command("complete", *arguments)
    assert code == 0
    assert len(openai_server.seen) == len(read_rows(out)) == 6
    assert "1  repeated question" in stdout
    [skipped] = read_rows(tmp_path / "c.skipped.jsonl")
    assert skipped["where"] == f"{questions} line 4"


def test_server_faults_are_retried_or_typed(questions, tmp_path, command, openai_server, read_rows):
    def plan(body, attempt):
        if attempt == 0:
            return [(429, {"error": {"message": "slow"}}), (503, "<html>"), (200, "no json"), (500, "")][
                body["seed"] % 4
            ]
        return (400, {"error": {"message": "too long"}}) if body["seed"] % 5 == 0 else (200, said(body))

    openai_server.plan = plan
    out = tmp_path / "c.jsonl"
    code, stdout, _ = command(
        "complete",
        questions,
        "-o",
        out,
        "-m",
        "served",
        "--server",
        openai_server.url,
        "--samples",
        "8",
        "--backoff",
        "0.01",
    )
    failed = sum(
        json.loads(line).get("status") == "refused_request"
        for line in (tmp_path / "c.journal.jsonl").read_text().splitlines()
    )
    assert failed > 0
    assert code == 3
    assert f"dropped {failed:>8,}  refused_request" in stdout
    assert sum(row["count"] for row in read_rows(out)) == 24 - failed


def test_a_wrong_server_is_a_mistake_of_the_user(questions, tmp_path, command, openai_server):
    openai_server.plan = lambda body, attempt: (404, {"error": {"message": "no such model"}})
    arguments = ("complete", questions, "-o", tmp_path / "c.jsonl", "-m", "served", "--server")
    code, _, stderr = command(*arguments, openai_server.url)
    assert (code, stderr) == (2, "fasttrain-data: the server refuses: 404: no such model\n")
    assert command(*arguments, "localhost:8000")[0] == 2
    with pytest.raises(UserError, match="--samples"):
        SampleSettings(model="m", samples=0)


ODD = {
    "parts": ({"content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}, {}, "a b"),
    "half a character": ({"content": "a \ud83d b"}, {}, "a \N{REPLACEMENT CHARACTER} b"),
    "nan": ({"content": "x"}, {"usage": {"completion_tokens": float("nan")}}, "x"),
    "no usage": ({"content": "x"}, {"usage": [5]}, "x"),
    "text for a count": (
        {"content": "x"},
        {"usage": {"completion_tokens": "7"}, "model": 5, "system_fingerprint": [1]},
        "x",
    ),
    "image part": ({"content": [{"type": "image_url", "image_url": {}}]}, {}, None),
    "number": ({"content": 5}, {}, None),
    "object": ({"content": {"text": "x"}}, {}, None),
    "list of text": ({"content": ["x"]}, {}, None),
    "digits": ({"content": "x"}, {"usage": {"completion_tokens": "DIGITS"}}, None),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_reply_is_read_as_text_or_is_a_malformed_sample(
    name, tmp_path, write_rows, command, openai_server, read_rows
):
    message, more, text = ODD[name]
    body = json.dumps({"choices": [{"message": message, "finish_reason": 3}], **more})
    body = body.replace('"DIGITS"', "9" * 5000)
    openai_server.plan = lambda asked, attempt: (
        (200, said(asked)) if asked["messages"][0]["content"] == "How?" else (200, body)
    )
    path = write_rows(tmp_path / "q.jsonl", [{"id": q, "question": q} for q in ("Why?", "How?")])
    options = ("-m", "served", "--samples", "1", "--attempts", "2", "--backoff", "0")
    out = tmp_path / "c.jsonl"
    code, stdout, _ = command("complete", path, "-o", out, "--server", openai_server.url, *options)
    rows = {row["question"]: row for row in read_rows(out)}
    assert code == (3 if text is None else 0)
    assert ("malformed" in stdout) == (text is None)
    assert rows["How?"]["tokens"] == 5
    if text is not None:
        assert (rows["Why?"]["text"], rows["Why?"].get("tokens")) == (text, None)


@pytest.mark.parametrize(
    ("status", "reply"),
    [
        (200, {"error": {"message": "no such key: server-key-of-mine"}}),
        (500, {"error": {"message": "x" * 290 + " server-key-of-mine"}}),
    ],
)
def test_an_error_that_repeats_the_key_is_told_and_kept_without_it(
    questions, tmp_path, command, openai_server, monkeypatch, status, reply
):
    monkeypatch.setenv("OPENAI_API_KEY", "server-key-of-mine")
    openai_server.plan = lambda body, attempt: (status, reply)
    arguments = ("--server", openai_server.url, "--attempts", "1", "--samples", "1")
    code, _, stderr = command("complete", questions, "-o", tmp_path / "c.jsonl", "-m", "served", *arguments)
    assert (code, "got none (3 " in stderr, "; the first: " in stderr) == (2, True, True)
    told = stderr + (tmp_path / "c.journal.jsonl").read_text()
    assert "[key]" in told or "xxx [" in told
    assert "server-k" not in told
