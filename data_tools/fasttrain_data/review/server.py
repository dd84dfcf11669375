"""The review page on 127.0.0.1: shows pairs, takes judgements. Nothing outside this machine is reached or let in."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from fasttrain_data.image_files import BadImage, find_image, mime_type
from fasttrain_data.review.session import VERDICTS, Item, Session, as_json


class ReviewServer(ThreadingHTTPServer):
    """Serves one session; `url` is its address."""

    daemon_threads = True

    def __init__(self, session: Session, image_root: Path, port: int = 0) -> None:
        self.session, self.image_root = session, image_root
        self.page = (files("fasttrain_data") / "assets" / "review.html").read_bytes()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def find(self, item_id: str) -> Item | None:
        return next((item for item in self.session.items if item.id == item_id), None)

    def image(self, item: Item, number: int) -> bytes:
        """BadImage if the item has no such image or its file cannot be read."""
        if not 0 <= number < len(item.images):
            raise BadImage("no such image")
        image = item.images[number]
        if isinstance(image, dict):
            content: bytes = image["bytes"]
            return content
        return find_image(self.image_root, image).read_bytes()


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer

    def do_GET(self) -> None:
        if not self._is_local():
            return
        path, _, query = self.path.partition("?")
        if path == "/":
            self._send(200, self.server.page, "text/html; charset=utf-8")
        elif path == "/next":
            waiting = self.server.session.open
            body = as_json(waiting[0], len(waiting)) if waiting else '{"left_over": 0}'
            self._send(200, body.encode(), "application/json")
        elif path == "/image":
            self._send_image(query)
        else:
            self._send(404, b"not found", "text/plain")

    def do_POST(self) -> None:
        if not self._is_local():
            return
        try:
            length = int(self.headers.get("Content-Length") or 0)
            body: Any = json.loads(self.rfile.read(min(length, 10_000)))
            item, verdict = self.server.find(str(body["id"])), body["verdict"]
        except (ValueError, KeyError, TypeError):
            self._send(400, b"wanted {id, verdict}", "text/plain")
            return
        if item is None or verdict not in VERDICTS:
            self._send(400, b"unknown pair or verdict", "text/plain")
            return
        self.server.session.judge(item, verdict)
        self._send(200, b"{}", "application/json")

    def _send_image(self, query: str) -> None:
        from urllib.parse import parse_qs

        values = parse_qs(query)
        item = self.server.find(values.get("id", [""])[0])
        number = values.get("n", [""])[0]
        if item is None or not number.isdigit():
            self._send(404, b"not found", "text/plain")
            return
        try:
            content = self.server.image(item, int(number))
        except BadImage as problem:
            self._send(404, str(problem).encode(), "text/plain")
            return
        self._send(200, content, mime_type(content))

    def _is_local(self) -> bool:
        """Refuse what another site's page could send: foreign names for this address, foreign origins."""
        own = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in own and (origin is None or origin.removeprefix("http://") in own):
            return True
        self._send(403, b"open the page under the address that was printed", "text/plain")
        return False

    def _send(self, code: int, content: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
        )
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """No line per image on the user's terminal."""
