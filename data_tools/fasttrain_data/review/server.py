"""The review page: shows pairs, takes judgements. Serves this machine only, or, under a token, others too."""

from __future__ import annotations

import hmac
import json
import socket
import sys
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from fasttrain_data.errors import UserError
from fasttrain_data.image_files import BadImage, mime_type
from fasttrain_data.review.images import image_bytes
from fasttrain_data.review.judgements import VERDICTS
from fasttrain_data.review.session import Review, check_name

LOOPBACK = ("127.0.0.1", "localhost")
_COOKIE = "fasttrain_review"
_ASSETS = {
    "/": ("review.html", "text/html; charset=utf-8"),
    "/review.css": ("review.css", "text/css; charset=utf-8"),
    "/review.js": ("review.js", "text/javascript; charset=utf-8"),
}


class ReviewServer(ThreadingHTTPServer):
    """Serves one review; `url` is its address. UserError for a host beyond this machine without a token."""

    daemon_threads = True

    def __init__(
        self, review: Review, image_root: Path, port: int = 0, *, rater: str = "", host: str = "127.0.0.1",
        token: str | None = None,
    ) -> None:  # fmt: skip
        if host not in LOOPBACK and not token:
            raise UserError(
                f"--host: wanted 127.0.0.1, or a token in $FASTTRAIN_REVIEW_TOKEN as well, got {host}"
            )
        self.review, self.image_root, self.rater, self.host, self.token = (
            review,
            image_root,
            rater,
            host,
            token,
        )
        assets = files("fasttrain_data") / "assets"
        self.assets = {path: ((assets / name).read_bytes(), kind) for path, (name, kind) in _ASSETS.items()}
        try:
            super().__init__((host, port), _Handler)
        except (OSError, socket.gaierror) as error:
            raise UserError(f"--host, --port: cannot listen on {host}:{port}: {error.strerror}") from None

    @property
    def url(self) -> str:
        shown = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{shown}:{self.server_port}/" + (
            f"?token={quote(self.token, safe='')}" if self.token else ""
        )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """No traceback for a browser that went away; it may have while it was told of another mistake."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Refused(Exception):
    """A request that gets a code and a line of text."""

    def __init__(self, code: int, text: str) -> None:
        self.code, self.text = code, text


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    timeout = 60

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        routes: dict[str, Callable[[dict[str, str]], None]] = {
            "/next": self._next, "/image": self._image, "/agreement": self._agreement
        }  # fmt: skip
        self._answer(path, {name: values[0] for name, values in parse_qs(query).items()}, routes)

    def do_POST(self) -> None:
        routes: dict[str, Callable[[dict[str, str]], None]] = {"/judge": self._judge, "/undo": self._undo}
        self._answer(self.path, {}, routes)

    def _answer(
        self, path: str, values: dict[str, str], routes: dict[str, Callable[[dict[str, str]], None]]
    ) -> None:
        try:
            self._check_origin()
            if self.command == "GET" and path == "/" and self._signs_in(values.get("token")):
                self._send(303, b"", "text/plain", {"Location": "/", "Set-Cookie": self._cookie()})
                return
            self._check_token()
            if self.command == "GET" and path in self.server.assets:
                self._send(200, *self.server.assets[path])
            elif path in routes:
                routes[path](values)
            else:
                raise _Refused(404, "not found")
        except _Refused as refused:
            self._send(refused.code, refused.text.encode(), "text/plain; charset=utf-8")
        except UserError as mistake:
            self._send(400, str(mistake).encode(), "text/plain; charset=utf-8")
        except (ConnectionError, TimeoutError):  # of the connection
            raise
        except OSError as error:  # a full disk: images that cannot be read are refused
            told = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
            self._send(500, f"not kept: {told}".encode(), "text/plain; charset=utf-8")

    def _next(self, values: dict[str, str]) -> None:
        rater = values.get("rater", "")
        if not rater:  # before a name is given: only whom to greet
            self._json({"rater": self.server.rater, "known": self.server.review.judgements.raters()})
            return
        self._json(self.server.review.shown(check_name(rater)))

    def _image(self, values: dict[str, str]) -> None:
        item = self.server.review.find(values.get("id", ""))
        number = values.get("n", "")
        if item is None or not number.isdecimal():
            raise _Refused(404, "not found")
        try:
            content = image_bytes(item, int(number), self.server.image_root)
        except BadImage as problem:
            raise _Refused(404, str(problem)) from None
        self._send(200, content, mime_type(content))

    def _agreement(self, values: dict[str, str]) -> None:
        self._json(self.server.review.agreement())

    def _judge(self, values: dict[str, str]) -> None:
        body = self._body()
        item, verdict = self.server.review.find(str(body.get("id"))), body.get("verdict")
        rater = check_name(body.get("rater"))
        if item is None or verdict not in VERDICTS:
            raise _Refused(400, "unknown pair or verdict")
        self.server.review.judge(rater, item, verdict)
        self._json(self.server.review.shown(rater))

    def _undo(self, values: dict[str, str]) -> None:
        rater = check_name(self._body().get("rater"))
        self.server.review.undo(rater)
        self._json(self.server.review.shown(rater))

    def _body(self) -> dict[str, Any]:
        try:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(min(max(length, 0), 10_000)))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise _Refused(400, "wanted a JSON object")
        return body

    def _check_origin(self) -> None:
        """Refuse what another site's page could send: foreign names for this address, foreign origins."""
        host, origin = self.headers.get("Host") or "", self.headers.get("Origin")
        own = {f"{name}:{self.server.server_port}" for name in LOOPBACK}
        if self.server.host not in LOOPBACK:
            own.add(host)  # any name may be this machine's; what counts there is the token
        if host not in own or (origin is not None and origin not in {f"http://{name}" for name in own}):
            raise _Refused(403, "open the page under the address that was printed")

    def _check_token(self) -> None:
        if self.server.token is None:
            return
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(self.headers.get("Cookie") or "")
        except CookieError:
            cookies.clear()
        held = unquote(cookies[_COOKIE].value) if _COOKIE in cookies else ""
        bearer = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not any(
            hmac.compare_digest(given.encode(), self.server.token.encode()) for given in (held, bearer)
        ):
            raise _Refused(401, "open the page under the address with the token that was printed")

    def _signs_in(self, given: str | None) -> bool:
        token = self.server.token
        return token is not None and given is not None and hmac.compare_digest(given.encode(), token.encode())

    def _cookie(self) -> str:
        return f"{_COOKIE}={quote(self.server.token or '', safe='')}; HttpOnly; SameSite=Strict; Path=/"

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), "application/json")

    def _send(self, code: int, content: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
        }
        for name, value in (headers | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """No line per image on the user's terminal."""
