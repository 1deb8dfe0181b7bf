"""A real HTTP server that a test sends webhooks to."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.serving import serving


@dataclass(frozen=True)
class Message:
    """One request that arrived."""

    path: str
    headers: Mapping[str, str]
    body: str


@dataclass
class Reply:
    """How the receiver answers."""

    status: int = 204
    headers: tuple[tuple[str, str], ...] = ()
    after_s: float = 0.0
    endless: bool = False


class Receiver(ThreadingHTTPServer):
    """Listens on loopback, keeps what arrives, and answers as `reply` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.messages: list[Message] = []
        self.reply = Reply()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def wait_for(self, count: int, seconds: float = 20) -> list[Message]:
        wait_until(lambda: len(self.messages) >= count, seconds)
        return self.messages

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: senders that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.messages.append(Message(self.path, headers, body))
        reply = self.server.reply
        time.sleep(reply.after_s)
        self.send_response(reply.status)
        for name, value in reply.headers:
            self.send_header(name, value)
        if not reply.endless:
            self.send_header("Content-Length", "0")
        self.end_headers()
        while reply.endless:
            self.wfile.write(b"x" * 65536)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        """Say nothing."""


def receiving() -> AbstractContextManager[Receiver]:
    """Run a receiver."""
    return serving(Receiver())


def wait_until(is_done: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that happens in another thread or process."""
    deadline = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
