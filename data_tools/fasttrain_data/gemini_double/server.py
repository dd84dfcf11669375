"""The double's HTTP server: routes, keys, faults, and a record of every call it saw."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from fasttrain_data.gemini_double.batches import BatchStore
from fasttrain_data.gemini_double.faults import TRANSPORT, Fault, Faults, fault_free
from fasttrain_data.gemini_double.judges import JudgeFunction, hash_judge
from fasttrain_data.gemini_double.replies import (
    AskedFor,
    Body,
    enums_as_ints,
    error_body,
    fault_error,
    judged,
)

_GENERATE = re.compile(r"/(v1|v1beta)/models/([^/:]+):(generateContent|countTokens)")


@dataclass(frozen=True)
class SeenCall:
    """One generateContent call: hash of its content, model, what went wrong, whether it is billed."""

    key: str
    model: str
    version: str
    fault: Fault | None
    billed: bool
    started_s: float
    answers: int


class GeminiDouble:
    """A server on 127.0.0.1; a context manager, or `start()` and `close()`.

    judge: (question, image bytes, answers) -> five scores per answer. faults: see FaultMix. delay_s: how long a
    reply takes. retry_delay_s: what a 429 tells the client. timeout_s: how long a hanging call hangs.
    model_version: what replies report. batch_polls: how often a batch is asked for before it is done.
    text: if given, replies are what it makes of the last text part, instead of the judge's grades.
    on_call: called with every SeenCall, in the thread that served it. Without `keep_calls` only counts are kept.
    """

    def __init__(
        self,
        judge: JudgeFunction = hash_judge,
        *,
        faults: Faults = fault_free,
        delay_s: float = 0.0,
        retry_delay_s: float = 0.05,
        timeout_s: float = 5.0,
        model_version: str | Callable[[], str] = "gemini-double-001",
        api_key: str = "double-key",
        batch_polls: int = 1,
        on_call: Callable[[SeenCall], None] | None = None,
        keep_calls: bool = True,
        text: Callable[[str], str] | None = None,
        port: int = 0,
    ) -> None:
        self.judge, self.faults, self.delay_s, self.text = judge, faults, delay_s, text
        self.retry_delay_s, self.timeout_s = retry_delay_s, timeout_s
        self.api_key, self.on_call, self.keep_calls = api_key, on_call, keep_calls
        self._version = model_version
        self.batches = BatchStore(self, batch_polls)
        self.calls: list[SeenCall] = []
        self.outcomes: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", port), _handler_for(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def model_version(self) -> str:
        return self._version() if callable(self._version) else self._version

    def start(self) -> GeminiDouble:
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop serving; hanging calls end at once."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> GeminiDouble:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def billed(self) -> Counter[str]:
        """How often each request content was answered with a reply that costs money."""
        return Counter(call.key for call in self.calls if call.billed)

    def answer(self, body: Body, model: str, version: str, linger: bool = True) -> tuple[int, Any] | None:
        """(HTTP status, body) of one generateContent call; None to hang up. linger: take time over it."""
        started_s = time.monotonic()
        key = request_key(body)
        with self._lock:
            attempt = self._attempts[key]
            self._attempts[key] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            fault = self.faults(key, attempt)
            asked = AskedFor(body)
            self._note(
                SeenCall(key, model, version, fault, fault not in TRANSPORT, started_s, len(asked.answers))
            )
            return self._reply(asked, fault, linger)
        finally:
            with self._lock:
                self.in_flight -= 1

    def wait(self, seconds: float) -> None:
        """Like sleep, but ends when the server closes."""
        self._closing.wait(seconds)

    def _reply(self, asked: AskedFor, fault: Fault | None, linger: bool) -> tuple[int, Any] | None:
        if fault in ("timeout", "disconnect"):
            self.wait(self.timeout_s if fault == "timeout" and linger else 0)
            return None
        if self.delay_s and linger:
            self.wait(self.delay_s)
        if fault == "html":
            return 502, "<html><body>Bad Gateway</body></html>"
        if fault == "not_json_body":
            return 200, "upstream connect error"
        if fault in TRANSPORT:
            return fault_error(fault, self.retry_delay_s, self.api_key)  # type: ignore[arg-type]
        return 200, judged(asked, self.judge, fault, self.model_version, self.text)

    def _note(self, call: SeenCall) -> None:
        with self._lock:
            self.outcomes[call.fault or "ok"] += 1
            if self.keep_calls:
                self.calls.append(call)
        if self.on_call is not None:
            self.on_call(call)


def request_key(body: Body) -> str:
    """Equal for requests of equal content, whatever SDK wrote them."""
    asked = AskedFor(body)
    digest = hashlib.sha256(repr((asked.question, asked.answers)).encode("utf-8", "surrogatepass"))
    for image in asked.images:
        digest.update(image)
    config = body.get("generationConfig") or {}
    digest.update(repr(config.get("seed")).encode())
    return digest.hexdigest()[:24]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server; anything else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler_for(double: GeminiDouble) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            if len(raw) < length:  # the client died while it spoke
                self.close_connection = True
                return
            if not self._is_allowed():
                return
            path, _, query = self.path.partition("?")
            if match := _GENERATE.fullmatch(path):
                self._generate(match, json.loads(raw), query)
            elif (reply := double.batches.post(path, raw, self.headers)) is not None:
                self._send(*reply)
            else:
                self._send(404, error_body(404, "NOT_FOUND", f"no route {path}"))

        def do_GET(self) -> None:
            if not self._is_allowed():
                return
            reply = double.batches.get(*self.path.partition("?")[::2])
            self._send(*(reply or (404, error_body(404, "NOT_FOUND", f"no route {self.path}"))))

        def _generate(self, match: re.Match[str], body: Body, query: str) -> None:
            version, model, method = match.groups()
            if method == "countTokens":
                self._send(200, {"totalTokens": AskedFor(body).chars // 4})
                return
            reply = double.answer(body, model, version)
            if reply is None:
                self.close_connection = True
                return
            code, content = reply
            if code == 200 and "enum-encoding" in query and isinstance(content, dict):
                content = enums_as_ints(content)
            headers = {"Retry-After": f"{double.retry_delay_s:g}"} if code == 429 else {}
            self._send(code, content, headers)

        def _is_allowed(self) -> bool:
            if self.headers.get("x-goog-api-key") == double.api_key or self.path.startswith("/uploads/"):
                return True
            message = "API key not valid. Please pass a valid API key."
            reason = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
            self._send(400, error_body(400, "INVALID_ARGUMENT", message, reason))
            return False

        def _send(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
            raw = (
                content
                if isinstance(content, bytes)
                else (content if isinstance(content, str) else json.dumps(content)).encode(
                    "utf-8", "surrogatepass"
                )
            )
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json" if isinstance(content, dict) else "text/html")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: a thousand calls would drown the test's own words."""

    return Handler
