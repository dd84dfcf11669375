"""`fasttrain answer --server`: an OpenAI-compatible server gets images, turns and seeds; its faults are retried or typed."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class Server(ThreadingHTTPServer):
    """`plan(body, attempt)` gives (status, reply); attempts are counted by conversation."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.lock, self.attempts = threading.Lock(), Counter[str]()
        self.plan: Any = lambda body, attempt: (200, said(body))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            key = json.dumps(body["messages"])
            attempt = self.server.attempts[key]
            self.server.attempts[key] += 1
            self.server.seen.append((self.path, dict(self.headers), body))
        status, reply = self.server.plan(body, attempt)
        raw = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        if status == 301:
            self.send_header("Location", "https://elsewhere.example/v1")
        if status == 429:
            self.send_header("Retry-After", "0.05")
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def said(body: dict[str, Any]) -> dict[str, Any]:
    last = body["messages"][-1]["content"]
    text = last if isinstance(last, str) else last[-1]["text"]
    choice = {"message": {"role": "assistant", "content": f" you said {text} "}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"completion_tokens": 5}, "model": "served-1"}


@pytest.fixture
def questions(tmp_path: Path, tiny_models: ModuleType) -> Path:
    tiny_models.draw_image(tmp_path / "a.png", seed=1)
    rows = [
        {"question_id": 1, "image": "a.png", "text": "what is it?"},
        {"question_id": 2, "turns": ["red?", "and blue?"]},
        {"question_id": 3, "text": "and the bars?"},
    ]
    return tiny_models.write_rows(tmp_path / "q.jsonl", rows)


@pytest.fixture
def answer(server: Server, questions: Path, tmp_path: Path, run_command: Callable[..., int]) -> Any:
    def run(*words: object) -> int:
        served = ("-m", "served", "--server", server.url)
        return run_command("answer", *served, questions, "-o", tmp_path / "a.jsonl", *words)

    return run


def test_images_turns_and_decoding_reach_the_server_and_its_words_the_file(
    server: Server, answer: Any, tmp_path: Path, tiny_models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    assert answer("--max-new-tokens", 9, "--temperature", 0.5) == 0
    first, second, third = tiny_models.read_rows(tmp_path / "a.jsonl")
    assert (first["text"], third["text"]) == ("you said what is it?", "you said and the bars?")
    assert second["choices"][0]["turns"] == ["you said red?", "you said and blue?"]
    assert first["model_id"] == "served"
    by_length = {len(body["messages"]): (path, headers, body) for path, headers, body in server.seen}
    path, headers, body = by_length[3]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret-key")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("served", 0.5, 9)
    assert [turn["content"] for turn in body["messages"]] == ["red?", "you said red?", "and blue?"]
    shown = next(body for _, _, body in server.seen if isinstance(body["messages"][0]["content"], list))
    url = shown["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/png;base64,")) == (tmp_path / "a.png").read_bytes()
    assert len({body["seed"] for _, _, body in server.seen}) == 4
    assert "secret-key" not in "".join(path.read_text() for path in tmp_path.glob("a*.jsonl"))
    assert answer("--max-new-tokens", 9, "--temperature", 0.5) == 0
    assert len(server.seen) == 4  # a rerun asks nothing


def test_a_photo_that_lies_on_its_side_reaches_the_server_upright(
    server: Server, run_command: Callable[..., int], tmp_path: Path, tiny_models: ModuleType
) -> None:
    from io import BytesIO

    from PIL import Image

    turned = Image.Exif()
    turned[Image.ExifTags.Base.Orientation] = 6
    Image.new("RGB", (3, 2)).save(tmp_path / "a.jpg", exif=turned)
    path = tiny_models.write_rows(
        tmp_path / "q.jsonl", [{"question_id": 1, "image": "a.jpg", "text": "what?"}]
    )
    assert (
        run_command("answer", "-m", "served", "--server", server.url, path, "-o", tmp_path / "a.jsonl") == 0
    )
    url = server.seen[0][2]["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))).size == (2, 3)


def test_faults_are_retried_and_what_stays_unanswered_is_named_with_exit_code_3(
    server: Server, answer: Any, tmp_path: Path, tiny_models: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(body: dict[str, Any], attempt: int) -> tuple[int, Any]:
        if body["messages"][-1]["content"] == "and the bars?":
            return 400, {"error": {"message": "too long"}}
        return (429, {"error": {"message": "slow down"}}) if attempt == 0 else (200, said(body))

    server.plan = plan
    assert answer() == 3
    assert [row["question_id"] for row in tiny_models.read_rows(tmp_path / "a.jsonl")] == [1, 2]
    err = capsys.readouterr().err
    assert (
        "no answer: 1 refused_request: 3" in err and "q.jsonl line 3: refused_request: 400: too long" in err
    )
    server.plan = lambda body, attempt: (200, said(body))
    assert answer() == 0
    assert [row["question_id"] for row in tiny_models.read_rows(tmp_path / "a.jsonl")] == [1, 2, 3]


def test_questions_left_by_a_spent_quota_are_counted(
    server: Server, answer: Any, questions: Path, tmp_path: Path, tiny_models: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = [{"question_id": n, "text": f"question {n}?"} for n in range(40)]
    tiny_models.write_rows(questions, rows)
    spent = (429, {"error": {"message": "pay first", "code": "insufficient_quota"}})
    server.plan = lambda body, attempt: (200, said(body)) if len(server.seen) <= 3 else spent
    assert answer("--in-flight", 1) == 3
    err = capsys.readouterr().err
    assert len(server.seen) == 4 and len(tiny_models.read_rows(tmp_path / "a.jsonl")) == 3
    assert "3 questions answered" in err and "36 questions were left" in err and "pay first" in err
    assert "no answer: 37 quota: 3, 4, 5, 6, 7 ..." in err
    assert len(err.splitlines()) == 4
    server.plan = lambda body, attempt: (200, said(body))
    assert answer("--in-flight", 1) == 0
    assert len(server.seen) == 4 + 37


def test_a_server_that_refuses_everything_is_a_mistake(
    server: Server, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plan = lambda body, attempt: (404, {"error": {"message": "no such model"}})
    assert answer() == 2
    assert (
        capsys.readouterr().err.splitlines()[-1] == "fasttrain: error: the server refuses: 404: no such model"
    )
    assert answer("-a", "runs/x") == 2
    assert "--adapter: wanted with a model in this process" in capsys.readouterr().err


def test_a_password_in_the_servers_address_is_sent_and_stands_in_no_file(
    server: Server, tmp_path: Path, tiny_models: ModuleType, run_command: Callable[..., int]
) -> None:
    data, out = tmp_path / "mt_bench", tmp_path / "eval"
    data.mkdir()
    rows = [{"question_id": 81, "category": "writing", "turns": ["why?", "so?"]}]
    tiny_models.write_rows(data / "question.jsonl", rows)
    address = server.url.replace("//", "//bob:hunter2@")
    assert run_command("eval", "mt-bench", "-m", "m", "--server", address, "--data", data, "-o", out) == 0
    assert server.seen[0][1]["Authorization"] == "Basic " + base64.b64encode(b"bob:hunter2").decode()
    assert json.loads((out / "eval.json").read_text())["server"] == server.url
    assert not [path for path in out.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


def test_an_address_that_leads_elsewhere_is_told_once_and_not_followed(
    server: Server, answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.plan = lambda body, attempt: (301, {})
    assert answer("--in-flight", 1) == 2
    assert (
        "the server's own address, got one that leads to https://elsewhere.example/v1"
        in capsys.readouterr().err
    )
    assert len(server.seen) == 1


def test_a_server_that_repeats_what_it_was_sent_brings_no_key_into_messages(
    server: Server, questions: Path, tmp_path: Path, run_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a/b+c==")
    basic = base64.b64encode(b"bob:hunter/2").decode()
    for address in (server.url, server.url.replace("//", "//bob:hunter%2F2@")):
        for repeat in (
            lambda sent: (400, {"error": {"message": f"bad: {sent}"}}),
            lambda sent: (200, {"no choices": sent.replace("/", r"\/").replace("+", r"\u002b")}),
            lambda sent: (400, {"error": f"{'x' * 280}{sent} is no hunter/2"}),
        ):
            server.plan = lambda body, attempt: repeat(server.seen[-1][1]["Authorization"])  # noqa: B023
            out = ("-o", tmp_path / "a.jsonl", "--attempts", 1, "--in-flight", 1)
            assert run_command("answer", "-m", "m", "--server", address, questions, *out) == 3
            err = capsys.readouterr().err
            assert "[key]" in err or "x" * 280 in err
            assert not any(part in err for part in ("sk-a", "b+c", "2b", basic[:6], "hunter"))


@pytest.mark.parametrize(
    ("how", "told"),
    [("bomb", "malformed: wanted a reply of at most 67,108,864 bytes"), ("drip", "timeout: no whole reply")],
)
def test_a_reply_without_end_is_cut_off(
    how: str, told: str, server: Server, questions: Path, tmp_path: Path, run_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import zlib

    def send(self: Handler) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip" if how == "bomb" else "identity")
        self.end_headers()
        pack = zlib.compressobj(9, zlib.DEFLATED, 31)
        with contextlib.suppress(OSError):
            for _ in range(5):
                self.wfile.write(pack.compress(bytes(1 << 24)) if how == "bomb" else b" ")
                self.wfile.write(pack.flush(zlib.Z_SYNC_FLUSH) if how == "bomb" else b" ")
            while how == "drip" and not over.wait(0.01):
                self.wfile.write(b" ")
        self.close_connection = True

    over = threading.Event()
    monkeypatch.setattr(Handler, "do_POST", send)
    options = (
        "--attempts",
        1,
        "--timeout",
        60 if how == "bomb" else 0.3,
        "--limit",
        1,
        "-o",
        tmp_path / "a.jsonl",
    )
    try:
        assert run_command("answer", "-m", "m", "--server", server.url, questions, *options) == 3
    finally:
        over.set()
    assert told in capsys.readouterr().err
