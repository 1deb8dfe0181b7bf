"""Ten thousand requests that no client should send: each is refused as documented, and the service stays as it was."""

import gc
import json
import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from service.catalogue import CATALOGUE

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]
COUNT = 10_000
GROWTH_LIMIT = 30_000_000
BODY = {"model": {"source": "demo", "name": "smollm2-135m"}, "recipe": "duquant"}
JOB = "job_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"
NASTY = [
    "", " ", "\x00", "\u00a0", "..", "../..", "/etc/passwd", "//proc/self/root", "%2e%2e%2f", "#/../../etc", "a" * 5000,
        "\ud800", "\u202e", "{{7*7}}", "${jndi:ldap://x}", "'; DROP TABLE jobs; --", "<script>", "\r\nA: b", "NaN",
    "-1", "1e999", "0x10", "true", "null", "[]", "{}", "file:///etc/passwd", "http://169.254.169.254/", "\\\\host",
]  # fmt: skip
VALUES = [*NASTY, None, True, -1, 2**63, 2**2000, 1.5, float("nan"), float("inf"), [], {}, [[]], [BODY], {"a": {}}]


def mutated(value: Any, random_: random.Random) -> Any:
    """Return a copy with one thing in it put wrong."""
    if isinstance(value, dict) and value and random_.random() < 0.8:
        name = random_.choice(list(value))
        copy = dict(value)
        match random_.randrange(4):
            case 0:
                del copy[name]
            case 1:
                copy[random_.choice(NASTY)] = copy.pop(name)
            case _:
                copy[name] = mutated(copy[name], random_)
        return copy
    return random_.choice(VALUES)


def bodies(random_: random.Random) -> Iterator[bytes]:
    whole = {
        **BODY,
        "recipe": {"name": "r", "weight": {"bits": 4}, "transform": {"block_size": 128}, "seed": 1},
        "calibration": {"samples": 4, "source": {"kind": "file", "name": "a.txt"}},
        "priority": 1,
        "labels": {"a": "b"},
        "depends_on": [JOB],
        "run_at": "2090-01-01T00:00:00Z",
    }
    valid = json.dumps(BODY).encode()
    while True:
        match random_.randrange(8):
            case 0:
                yield valid[: random_.randrange(len(valid))]
            case 1:
                yield random_.randbytes(random_.randrange(200))
            case 2:
                yield b"[" * random_.randrange(1, 20_000)
            case 3:
                yield b'{"a":' * 3000 + b"1" + b"}" * random_.randrange(3001)
            case _:
                yield json.dumps(mutated({**whole, "force": "no"}, random_)).encode()


def clean(text: str) -> bytes:
    """Return a text as it may stand in a request line or a header: the parser refuses the rest by itself."""
    return text.encode("utf-8", "replace").translate(None, b"\x00\r\n \t")


def requests(service: Any, random_: random.Random) -> Iterator[bytes]:
    """Yield requests as bytes on the wire: a client library would refuse to write most of them."""
    good = f"Authorization: Bearer {service.token}\r\n".encode()
    json_type = b"Content-Type: application/json\r\n"
    source = bodies(random_)

    def request(method: str, path: bytes, headers: bytes = b"", body: bytes = b"") -> bytes:
        length = f"Content-Length: {len(body)}\r\n".encode()
        return b"%b %b HTTP/1.1\r\nHost: x\r\n%b%b\r\n%b" % (method.encode(), path, headers, length, body)

    while True:
        nasty = clean(random_.choice(NASTY)) or b"%00"
        match random_.randrange(8):
            case 0:
                yield request("GET", b"/v1/jobs?cursor=" + nasty, good)
            case 1:
                parameter = random_.choice([b"state", b"limit", b"created_from", b"label", b"kind"])
                yield request("GET", b"/v1/jobs?%b=%b%%00" % (parameter, nasty), good)
            case 2:
                yield request("GET", b"/v1/jobs/" + (nasty.replace(b"/", b"%2F") or b"x"), good)
            case 3:
                yield request("GET", b"/v1/jobs", b"Authorization: Bearer dq_live_" + nasty + b"\r\n")
            case 4:
                yield request(
                    "POST", b"/v1/jobs", good + b"Content-Type: " + nasty + b"\r\n", json.dumps(BODY).encode()
                )
            case 5:
                header = random_.choice([b"If-Match", b"Idempotency-Key"])
                value = b"\xff" + nasty * (300 // max(len(nasty), 1) + 1)
                path = f"/v1/jobs/{JOB}:retry".encode() if header != b"If-Match" else f"/v1/jobs/{JOB}".encode()
                method, body = ("POST", b"") if header != b"If-Match" else ("PATCH", b'{"priority": 1}')
                yield request(method, path, good + json_type + header + b": " + value[:1100] + b"\r\n", body)
            case _:
                yield request("POST", b"/v1/jobs", good + json_type, next(source))


class Wire:
    """A connection that is kept while the server keeps it."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self._address = (where.hostname, where.port)
        self._socket: socket.socket | None = None

    def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send bytes; return the answer's status and body."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=20)
        self._socket.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer:
            if not (part := self._socket.recv(65536)):
                raise AssertionError(f"no answer to {request[:300]!r}")
            answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        while len(body) < int(headers.get(b"content-length", 0)):
            body += self._socket.recv(65536)
        if headers.get(b"connection") == b"close":
            self.close()
        return int(head.split(b" ", 2)[1]), body

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def test_ten_thousand_malformed_requests_are_refused_as_documented(unlimited_service: Any) -> None:
    service, wire = unlimited_service, Wire(unlimited_service.url)
    statuses: Counter[int] = Counter()
    process = psutil.Process(os.getpid())  # the service runs in a thread of this one
    before = 0
    for number, request in enumerate(requests(service, random.Random(7))):
        if number == COUNT // 5:  # caches are full by then
            gc.collect()
            before = process.memory_info().rss
        if number == COUNT:
            break
        status, body = wire.ask(request)
        statuses[status] += 1
        if status in (400, 431) and not body.startswith(b"{"):
            wire.close()  # no request at all: the HTTP parser's own answer
            continue
        assert 400 <= status < 500, (status, request[:500], body)
        problem = json.loads(body)
        name = problem["type"].rpartition(":")[2]
        assert CATALOGUE[name].status == status, (request[:500], problem)
    gc.collect()
    wire.close()
    grown = process.memory_info().rss - before
    assert grown < GROWTH_LIMIT, f"{grown / 1e6:.0f} MB more"
    assert {400, 401, 404, 415, 422} <= statuses.keys(), statuses
    assert service.http.get("/v1/jobs").json()["items"] == []
    assert service.http.post("/v1/jobs", json=BODY).status_code == 201
