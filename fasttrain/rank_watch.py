"""When one process of a run fails, all of them end, and one message says which failed and why.

Every rank holds a TCP connection to the first rank, served by a thread of its own, so that it works while the main thread waits in
a collective that will never finish. The kernel closes the connection of a process that is killed, and its keep-alive finds a
machine that is gone; a process that fails otherwise says so itself. No torch here: the command line asks before it is imported.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

_SETTLE_S = 1.5  # from the first sign of a failure to the verdict: consequences can arrive before their cause
_ANSWER_S = 20.0  # how long a failing rank waits for the verdict before it speaks for itself
_CONNECT_S = 60.0
_OWN, _LOST, _CONSEQUENCE = 0, 1, 2  # what decides among several failures, then time
_COLLECTIVE_WORDS = (
    "gloo",
    "nccl",
    "connection closed by peer",
    "connection reset by peer",
    "socket timeout",
)


@dataclass(frozen=True)
class Failure:
    """What happened to a rank; `code` is the exit code that all ranks take."""

    rank: int
    text: str
    code: int
    kind: int
    trace: str = ""


def is_consequence(error: BaseException) -> bool:
    """Whether an exception only says that another rank is gone."""
    from_torch = type(error) is RuntimeError or type(error).__name__.startswith("Dist")
    return from_torch and any(word in str(error).lower() for word in _COLLECTIVE_WORDS)


class Watch:
    """One rank's end of the watch. `exchange` gathers a JSON-like value of every rank, in order of rank, on all."""

    def __init__(self, rank: int, size: int, exchange: Callable[[Any], list[Any]]) -> None:
        self.rank, self.size = rank, size
        self._links: dict[int, socket.socket] = {}
        self._names: dict[int, str] = {rank: _own_name()}
        self._read: dict[int, bytes] = {}
        self._failures: list[Failure] = []
        self._since = 0.0
        self._lock = threading.Lock()
        self._wake, self._woken = socket.socketpair()
        self._connect(exchange)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        for other, link in self._links.items():
            _keep_alive(link)
            self._read[other] = b""
            self._selector.register(link, selectors.EVENT_READ, other)
        self._thread = threading.Thread(target=self._serve, name="fasttrain-watch", daemon=True)
        self._thread.start()

    def _connect(self, exchange: Callable[[Any], list[Any]]) -> None:
        master = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if self.rank != 0:
            port, token, self._names[0] = exchange(None)[0]
            self._links[0] = socket.create_connection((master, port), timeout=_CONNECT_S)
            self._links[0].settimeout(None)
            _send(self._links[0], {"token": token, "rank": self.rank, "name": self._names[self.rank]})
            return
        local = master in ("localhost", "127.0.0.1", "::1")
        with socket.create_server(("127.0.0.1" if local else "", 0), backlog=self.size) as server:
            token = secrets.token_hex(16)  # nobody else on the network may stop the run
            exchange((server.getsockname()[1], token, self._names[0]))
            server.settimeout(_CONNECT_S)
            while len(self._links) < self.size - 1:
                link, _ = server.accept()
                link.settimeout(_CONNECT_S)
                with link.makefile("rb") as lines:
                    hello = _parse(lines.readline(1024))
                if not secrets.compare_digest(str(hello.get("token")), token):
                    link.close()
                    continue
                link.settimeout(None)
                self._links[hello["rank"]], self._names[hello["rank"]] = link, hello["name"]

    def fail(self, failure: Failure) -> None:
        """Tell the first rank, let it speak, and end this process; does not return."""
        if self.rank == 0:
            self._note(failure)
            self._wake.send(b"!")
            self._thread.join(_ANSWER_S)
        elif (link := self._links.get(0)) or self._failures:  # else the first rank has done its part and left
            if link:
                _send(link, {"failed": asdict(failure)})
            self._thread.join(_ANSWER_S)
        self._end(failure, speak=True)  # nobody answered

    def leave(self) -> None:
        """End watching: this process has done its part."""
        for link in list(self._links.values()):
            _send(link, {"bye": True})
        self._wake.close()  # ends the thread

    def forget(self) -> None:
        """Close this process's copies of the connections."""
        for link in [*self._links.values(), self._wake, self._woken]:
            link.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select(0.2 if self._failures else None):
                if key.data is not None:
                    self._listen(key.data)
                elif not self._woken.recv(64):  # left
                    self._selector.close()
                    self.forget()
                    return
            due = time.monotonic() - self._since > _SETTLE_S or len(self._failures) == self.size
            if self._failures and due:
                self._end(min(self._failures, key=lambda f: f.kind), speak=True)

    def _listen(self, other: int) -> None:
        """Read what a rank says; its end without a goodbye is a failure."""
        try:
            data = self._links[other].recv(1 << 16)
        except OSError:
            data = b""
        *lines, self._read[other] = (self._read[other] + data).split(b"\n")
        for line in lines:
            said = _parse(line)
            if "failed" in said:
                self._note(Failure(**said["failed"]))
            elif "stop" in said:
                self._end(Failure(**said["stop"]), speak=False)
            elif "bye" in said:
                self._drop(other)
                return
        if not data:
            self._note(Failure(other, "ended without a word, as when it is killed (SIGKILL, or the machine out "
                               "of memory) or its machine is lost", 1, _LOST))  # fmt: skip
            self._drop(
                other
            )  # after the note: without both, `fail` in the main thread takes the rank for one that has left
            if self.rank > 1:  # the first rank is gone: the second speaks, the others end
                time.sleep(_SETTLE_S)
                self._end(self._failures[0], speak=False)

    def _drop(self, other: int) -> None:
        link = self._links.pop(other)
        self._selector.unregister(link)
        link.close()

    def _note(self, failure: Failure) -> None:
        with self._lock:
            self._since = self._since or time.monotonic()
            self._failures.append(failure)

    def _end(self, failure: Failure, speak: bool) -> None:
        if speak:
            name = self._names.get(failure.rank, "unknown process")
            where = f"rank {failure.rank} ({name}): " if self.size > 1 else ""
            kept = "" if failure.code == 2 else _how_to_go_on
            text = f"fasttrain: error: {where}{failure.text}; all {self.size} ranks stop{kept}\n"
            sys.stderr.write(failure.trace + ("\r\n" if sys.stderr.isatty() else "") + text)
            sys.stderr.flush()
            for link in self._links.values():
                _send(link, {"stop": asdict(failure)})
        sys.stdout.flush()
        os._exit(failure.code)  # the main thread may be inside a collective that never ends


def _own_name() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"


def _keep_alive(link: socket.socket) -> None:
    """Let the kernel notice within some 40 s that the other machine is gone, whatever Python is doing meanwhile."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 5)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def _send(link: socket.socket, said: dict[str, Any]) -> None:
    try:
        link.sendall(json.dumps(said).encode() + b"\n")
    except OSError:  # it is gone: the thread that reads notices
        return


def _parse(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line or b"{}")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


_watch: Watch | None = None
_how_to_go_on = "; what is done is kept, go on with --resume"


def tell_how_to_go_on(words: str) -> None:
    """What stands behind the message about a failure that is no user's mistake: a training run's own words, unless told."""
    global _how_to_go_on
    _how_to_go_on = words


def start_watch(rank: int, size: int, exchange: Callable[[Any], list[Any]]) -> None:
    """Begin to watch the other ranks; every rank calls."""
    global _watch
    _watch = Watch(rank, size, exchange)
    atexit.register(_leave_unless_failed)
    os.register_at_fork(after_in_child=_in_child)


def leave_watch() -> None:
    """This process has done its part: its end is no failure."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None


def watching() -> bool:
    return _watch is not None


def fail_all(text: str, code: int, *, consequence: bool = False, trace: str = "") -> None:
    """End all ranks with one message about this one; returns only where nothing is watched."""
    if _watch is not None:
        kind = _CONSEQUENCE if consequence else _OWN
        _watch.fail(Failure(_watch.rank, " ".join(text.split()), code, kind, trace))


def _leave_unless_failed() -> None:
    if getattr(sys, "last_value", None) is None:  # set by an exception that nobody caught
        leave_watch()


def _in_child() -> None:
    """A worker process must not keep the connections of a rank that is killed."""
    global _watch
    if _watch is not None:
        _watch.forget()
        _watch = None
