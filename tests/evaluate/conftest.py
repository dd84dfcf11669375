"""Fixtures of the evaluation tests: rows as files, and a double of an OpenAI-compatible judge."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fasttrain.evaluate.judging import JudgeOptions
from fasttrain_data.calls.dispatch import CallLimits

Row = dict[str, Any]


@pytest.fixture
def write_rows() -> Callable[[Path, Sequence[Row]], Path]:
    def write(path: Path, rows: Sequence[Row]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def rows_of() -> Callable[[Path], list[Row]]:
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]


@dataclass
class OpenAIDouble:
    """say: (request body) -> the judge's words. fault: (request body, how often it came before) -> what goes wrong.

    Faults: a status code, "blocked", "empty", "cut" (finish_reason length, half the text), "hang up", "not json".
    """

    url: str = ""
    say: Callable[[Row], str] = lambda body: "Rating: [[5]]"
    fault: Callable[[Row, int], Any] = lambda body, attempt: None
    version: Callable[[], str] = lambda: "judge-2026-01"
    bodies: list[Row] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    billed: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]

    def answer(self, body: Row, headers: dict[str, str]) -> tuple[int, Any] | None:
        name = json.dumps(body, sort_keys=True)
        with self.lock:
            attempt = self.attempts[name]
            self.attempts[name] += 1
            self.bodies.append(body)
            self.headers.append(headers)
        fault = self.fault(body, attempt)
        if fault == "hang up":
            return None
        if fault == "not json":
            return 200, "upstream connect error"
        if isinstance(fault, tuple):
            return fault
        if isinstance(fault, int):
            return fault, {"error": {"message": f"scripted {fault}", "code": None}}
        text: str | None = self.say(body)
        finish = "stop"
        if fault == "cut":
            text, finish = str(text)[: len(str(text)) // 2], "length"
        elif fault in ("blocked", "empty"):
            text, finish = None, "content_filter" if fault == "blocked" else "stop"
        with self.lock:
            self.billed[name] += 1
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return 200, {"model": self.version(), "choices": [choice], "usage": usage}


@pytest.fixture
def judge_double() -> Iterator[OpenAIDouble]:
    double = OpenAIDouble()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/v1/chat/completions":
                self._send(404, {"error": {"message": f"no route {self.path}"}})
                return
            reply = double.answer(json.loads(raw), dict(self.headers))
            if reply is None:
                self.close_connection = True
                return
            self._send(*reply)

        def _send(self, code: int, content: Any) -> None:
            raw = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(code)
            if code == 429:
                self.send_header("Retry-After", "0.05")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that was killed
    double.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield double
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def options() -> Callable[..., JudgeOptions]:
    """Options that ask a double, with two attempts and no waiting between them unless `limits` says otherwise."""

    def make(double: Any, **more: Any) -> JudgeOptions:
        limits = CallLimits(in_flight=4, attempts=2, backoff_s=0.0)
        given = {"model": "judge-1", "api": "openai", "base_url": double.url, "limits": limits, "quiet": True}
        return JudgeOptions(**given | more)

    return make


@pytest.fixture
def fasttrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command in this process; (exit code, stdout, stderr)."""
    from fasttrain import cli

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fasttrain", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run
