"""The REST API under load: submits at a steady rate and as fast as it goes, and lists among many jobs.

    python benchmarks/api.py                                  # writes benchmarks/results/api.json
    python benchmarks/api.py --seconds 3 --jobs 2000 --out -
    python benchmarks/api.py --processes 4 --out -            # several processes serve the port

The service runs as a process of its own on SQLite, with its defaults: one process, keys, rate limit. Each submit has a
key, an Idempotency-Key of its own and `force`, so each makes a job; no object store is touched by it. Load comes from
64 kept connections of this process, on the same cores. `cpu_ms` is what the service's processes used for one request:
unlike the latencies it hardly depends on what else the machine does.

Steady: requests are sent when their time has come, whether or not earlier ones are answered, and a latency counts from
that time: a server that falls behind shows. Fastest: each connection sends its next request when it has its answer.
Lists: one connection, one request after the other, among finished jobs of the same tenant.
"""

import argparse
import asyncio
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from machine import RESULTS, describe, load_average, loop_ms
from sqlalchemy import Engine, insert

from duquant.config import preset
from infra.database import make_engine, write
from infra.ids import new_id
from infra.keys import new_token
from infra.migrate import upgrade
from infra.schema import jobs

CONNECTIONS = 64
RATE = 150
BODY = json.dumps({"model": {"source": "demo", "name": "smollm2-135m"}, "recipe": "duquant", "force": True}).encode()
LISTS = {
    "newest": "/v1/jobs?limit=50",
    "succeeded": "/v1/jobs?limit=50&state=succeeded",
    "of_a_model": "/v1/jobs?limit=50&model=model-7",
    "of_a_recipe": "/v1/jobs?limit=50&recipe=rtn",
    "failed_of_a_model": "/v1/jobs?limit=50&state=failed&model=model-7",
}


def main() -> None:
    """Measure, print and write."""
    arguments = _parse()
    result: dict[str, Any] = {
        **describe(),
        "command": shlex.join(["python", "benchmarks/api.py", *sys.argv[1:]]),
        "load_at_start": load_average(),
        "loop_ms": loop_ms(),
        "stolen_share": None,
        "connections": CONNECTIONS,
        "processes": arguments.processes,
    }
    stolen = _stolen()
    with tempfile.TemporaryDirectory() as folder, _service(Path(folder), arguments.processes) as service:
        url, token, engine, process = service
        client = _Load(url, token)
        asyncio.run(client.steady(RATE, 2.0 * arguments.processes))  # the first requests fill caches
        with _cpu_of(process) as used:
            result["steady"] = {"rate": RATE, **asyncio.run(client.steady(RATE, arguments.seconds))}
        result["steady"]["cpu_ms"] = round(used[0] * 1000 / result["steady"]["requests"], 2)
        with _cpu_of(process) as used:
            result["fastest"] = asyncio.run(client.fastest(arguments.seconds))
        result["fastest"]["cpu_ms"] = round(used[0] * 1000 / result["fastest"]["requests"], 2)
        _fill(engine, arguments.jobs)
        result["lists"] = {"jobs": arguments.jobs, **_lists(url, token)}
    result["stolen_share"] = round(_stolen(stolen), 3)
    print(json.dumps({name: result[name] for name in ("steady", "fastest", "lists", "stolen_share")}, indent=2))
    if arguments.out != "-":
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"written: {arguments.out}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each of the two load phases")
    parser.add_argument("--jobs", type=int, default=100_000, help="finished jobs to list among")
    parser.add_argument("--processes", type=int, default=1, help="API processes that serve the port")
    parser.add_argument("--out", default=str(RESULTS / "api.json"), help="where to write; - is nowhere")
    return parser.parse_args()


def _stolen(since: tuple[int, int] | None = None) -> Any:
    """Return the CPU time that the host took for others, of all; a machine that is not its own measures others too."""
    fields = [int(each) for each in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    now = (fields[7], sum(fields))
    return now if since is None else (now[0] - since[0]) / max(now[1] - since[1], 1)


@contextmanager
def _cpu_of(process: psutil.Process) -> Iterator[list[float]]:
    """Measure the processor seconds of a process and its children: the one item of the list after the block."""
    family = [process, *process.children()]

    def total() -> float:
        return sum(sum(each.cpu_times()[:2]) for each in family)

    used: list[float] = []
    before = total()
    yield used
    used.append(total() - before)


@contextmanager
def _service(folder: Path, processes: int) -> Iterator[tuple[str, str, Engine, psutil.Process]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token, database = new_token(), f"sqlite:///{folder / 'duquant.db'}"
    upgrade(database)
    environment = {
        **os.environ,
        "DUQUANT_HOME": str(folder),
        "DUQUANT_DATABASE_URL": database,
        "DUQUANT_PORT": str(port),
        "DUQUANT_API_PROCESSES": str(processes),
        "DUQUANT_S3_ENDPOINT": "http://127.0.0.1:9",
        "DUQUANT_S3_BUCKET": "unused",
        "DUQUANT_S3_ACCESS_KEY": "unused",
        "DUQUANT_S3_SECRET_KEY": "unused",
        "DUQUANT_KEY_PEPPER": "pepper of the benchmark",
        "DUQUANT_BOOTSTRAP_KEY": token,
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "service"], env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    engine = make_engine(database)
    try:
        _await_key(url, token, process, folder / "log")
        yield url, token, engine, psutil.Process(process.pid)
    finally:
        engine.dispose()
        process.terminate()
        process.wait(30)


def _await_key(url: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/v1/recipes", headers={"Authorization": f"Bearer {token}"}).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the service did not start:\n{log.read_text(encoding='utf-8')[-3000:]}")


class _Load:
    """64 kept connections that submit jobs."""

    def __init__(self, url: str, token: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._head = (
            f"POST /v1/jobs HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\nIdempotency-Key: "
        ).encode()

    async def steady(self, rate: float, seconds: float) -> dict[str, Any]:
        """Send at a rate, whatever comes back when."""
        loop = asyncio.get_running_loop()
        count, start = int(rate * seconds), loop.time() + 0.1
        turns: asyncio.Queue[float] = asyncio.Queue()
        for number in range(count):
            turns.put_nowait(start + number / rate)
        latencies: list[float] = []
        statuses: Counter[int] = Counter()

        async def connection() -> None:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            while not turns.empty():
                due = turns.get_nowait()
                await asyncio.sleep(max(0.0, due - loop.time()))
                statuses[await self._submit(reader, writer)] += 1
                latencies.append(loop.time() - due)
            writer.close()

        await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
        return {"requests_per_second": round(count / (loop.time() - start), 1), **_summary(latencies, statuses)}

    async def fastest(self, seconds: float) -> dict[str, Any]:
        """Send as soon as the answer before is there."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        latencies: list[float] = []
        statuses: Counter[int] = Counter()

        async def connection() -> None:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            while (sent := loop.time()) < start + seconds:
                statuses[await self._submit(reader, writer)] += 1
                latencies.append(loop.time() - sent)
            writer.close()

        await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
        rate = len(latencies) / (loop.time() - start)
        return {"requests_per_second": round(rate, 1), **_summary(latencies, statuses)}

    async def _submit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        writer.write(self._head + uuid.uuid4().hex.encode() + b"\r\n\r\n" + BODY)
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        length = next(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length"))
        await reader.readexactly(length)
        return int(lines[0].split(b" ")[1])


def _summary(latencies: list[float], statuses: Counter[int]) -> dict[str, Any]:
    errors = sum(count for status, count in statuses.items() if status != 201)
    return {"requests": len(latencies), "errors": errors, **_quantiles(latencies)}


def _quantiles(seconds: list[float]) -> dict[str, float]:
    marks = statistics.quantiles(seconds, n=100)
    values = {"p50": marks[49], "p95": marks[94], "p99": marks[98], "max": max(seconds)}
    return {f"{name}_ms": round(value * 1000, 2) for name, value in values.items()}


def _fill(engine: Engine, count: int) -> None:
    """Insert finished jobs as the service would have left them, one in fifty failed, of fifty models."""
    spec = {
        "kind": "quantize",
        "model": {"source": "local", "name": "model", "revision": None},
        "model_identity": "local:" + "0" * 64,
        "recipe": preset("duquant").to_dict(),
    }
    now = int(time.time() * 1000)
    for first in range(0, count, 5000):
        rows = [_row(number, now - 1000 * number, spec) for number in range(first, min(first + 5000, count))]
        with write(engine) as connection:
            connection.execute(insert(jobs), rows)


def _row(number: int, at: int, spec: dict[str, Any]) -> dict[str, Any]:
    is_failed = number % 50 == 0
    return {
        "id": new_id("job"),
        "tenant_id": "default",
        "kind": "quantize",
        "state": "failed" if is_failed else "succeeded",
        "reason": "error" if is_failed else None,
        "detail": "out of memory" if is_failed else None,
        "result": None if is_failed else {"artifact": {"manifest_key": "m", "size_bytes": 1}, "seconds": 60.0},
        "spec": spec,
        "fingerprint": uuid.uuid4().hex * 2,
        "forced": 0,
        "priority": 100,
        "created_at": at,
        "run_at": at,
        "started_at": at,
        "finished_at": at,
        "attempt": 1,
        "max_attempts": 10,
        "lease_losses": 0,
        "max_lease_losses": 5,
        "fence": 1,
        "phase": "",
        "progress_done": 30,
        "progress_total": 30,
        "version": 40,
        "model_name": f"model-{number % 50}",
        "recipe_name": "duquant" if number % 1000 else "rtn",
    }


def _lists(url: str, token: str) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60) as http:
        for name, path in LISTS.items():
            latencies = []
            for _ in range(100):
                began = time.perf_counter()
                answer = http.get(path)
                latencies.append(time.perf_counter() - began)
                assert answer.status_code == 200, answer.text
            measured[name] = {"items": len(answer.json()["items"]), **_quantiles(latencies)}
        began = time.perf_counter()
        cursor, pages = "", 0
        while cursor is not None and pages < 200:  # deep pages cost what the first does
            page = http.get(f"/v1/jobs?limit=50{cursor and f'&cursor={cursor}'}").json()
            cursor, pages = page["next_cursor"], pages + 1
        measured["page_after_page"] = {
            "pages": pages,
            "mean_ms": round((time.perf_counter() - began) / pages * 1000, 2),
        }
    return measured


if __name__ == "__main__":
    main()
