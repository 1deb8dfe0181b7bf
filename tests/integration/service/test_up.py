"""`duquant up`: starts everything, mends what dies, and leaves nothing behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.sdk import Client

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_of(home: Path) -> set[int]:
    """Return every process that was started for this home, by its environment."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"DUQUANT_HOME={home}".encode() in (entry / "environ").read_bytes().split(
                b"\0"
            ):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def command(home: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "client.main", "up", "--home", str(home), "--port", str(port), "--json"]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Any]:
    home = tmp_path / "home"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DUQUANT_")}
    errors = (tmp_path / "stderr").open("w")
    process = subprocess.Popen(
        command(home, free_port()), env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (tmp_path / "stderr").read_text()
    yield json.loads(line), process, home, tmp_path / "stderr"
    process.kill()
    process.wait()
    process.stdout.close()
    errors.close()
    for pid in processes_of(home):
        os.kill(pid, signal.SIGKILL)


def test_it_starts_mends_itself_and_stops_without_a_trace(up: Any) -> None:
    facts, process, home, stderr = up
    assert httpx.get(f"{facts['url']}/readyz").json()["ready"] is True
    with Client(facts["url"], facts["api_key"]) as client:
        assert client.list().items == ()
        os.kill(facts["pids"]["service"], signal.SIGKILL)
        assert until(lambda: "service is started again" in stderr.read_text(), 20), stderr.read_text()
        assert "service was killed by signal 9 (SIGKILL); starting" in stderr.read_text()
        assert until(lambda: is_healthy(facts["url"]), 30)
        assert client.list().items == ()
    collected = subprocess.run(
        [sys.executable, "-m", "client.main", "gc", "--dry-run", "--home", str(home), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert collected.returncode == 0, collected.stderr
    assert json.loads(collected.stdout)["dry_run"] is True
    open_to_others = [path for path in (*home.iterdir(), *(home / "logs").iterdir()) if path.stat().st_mode & 0o077]
    assert open_to_others == []
    assert "/readyz" not in (home / "logs" / "service.log").read_text()
    busy = subprocess.run(command(home, free_port()), capture_output=True, text=True, timeout=60)
    assert (busy.returncode, "another `duquant up`" in busy.stderr) == (2, True)
    assert len(processes_of(home)) >= 4  # storage and its server, service, workers
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert processes_of(home) == set()


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def test_everything_ends_when_it_is_killed(up: Any) -> None:
    _, process, home, _ = up
    process.kill()
    assert until(lambda: processes_of(home) == set(), 45), processes_of(home)


def test_a_taken_port_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = subprocess.run(
            command(tmp_path, taken.getsockname()[1]), capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--port" in done.stderr
    assert not (tmp_path / "logs").exists()


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a small file system of its own")
def test_a_full_disk_is_named_before_the_service_starts(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=1m tmpfs "$0" || exit 77; exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path)]
    done = subprocess.run(
        [*inside, *command(tmp_path, free_port())], capture_output=True, text=True, timeout=120, check=False
    )
    if "unshare" in done.stderr or done.returncode == 77:
        pytest.skip("this machine does not let its user mount a file system")
    errors = [line for line in done.stderr.splitlines() if line.startswith("duquant: error: ")]
    assert (done.returncode, done.stdout, len(errors)) == (1, "", 1), done.stderr
    assert "is full" in errors[0]
    assert "Traceback" not in done.stderr
