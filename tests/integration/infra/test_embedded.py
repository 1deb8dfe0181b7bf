"""The embedded S3 server: a real one, started and stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra.embedded import EmbeddedStorage
from infra.errors import StartupError
from infra.storage import ObjectStore

pytestmark = pytest.mark.integration

SECRET = "canary-secret-9a77"


def embedded(folder: Path, port: int = 0) -> EmbeddedStorage:
    return EmbeddedStorage(folder, access_key="key", secret_key=SECRET, port=port)


def connect(endpoint: str) -> ObjectStore:
    return ObjectStore(endpoint=endpoint, region="us-east-1", bucket="duquant", access_key="key", secret_key=SECRET)


def test_objects_survive_a_stop_and_a_kill(tmp_path: Path) -> None:
    with embedded(tmp_path) as server, connect(server.endpoint) as store:
        store.ensure_bucket()
        store.put_bytes("before-the-kill", b"1" * 100_000)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(StartupError, match="ended with status -9"):
            server.check()
    # Again, on other ports.
    with embedded(tmp_path) as server, connect(server.endpoint) as store:
        assert store.get_bytes("before-the-kill") == b"1" * 100_000
        pid = server.pid
    assert pid is not None
    assert not psutil.pid_exists(pid)


def test_it_listens_on_loopback_only_and_keeps_its_credentials_private(tmp_path: Path) -> None:
    with embedded(tmp_path) as server:
        assert (tmp_path / "s3.json").stat().st_mode & 0o777 == 0o600
        process = psutil.Process(server.pid)
        addresses = {item.laddr.ip for item in process.net_connections(kind="tcp") if item.status == "LISTEN"}
        assert addresses == {"127.0.0.1"}
        assert not any(SECRET in argument for argument in process.cmdline())
        assert SECRET not in server.log_path.read_text(errors="replace")
        # No gigabytes are set aside for an empty store.
        blocks = sum(file.stat().st_blocks for file in tmp_path.rglob("*") if file.is_file())
        assert blocks * 512 < 50 << 20


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port} on 127.0.0.1 is already taken"):
            embedded(tmp_path, port).start()


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    with embedded(tmp_path) as first:
        with pytest.raises(StartupError, match="in use by another object store"):
            embedded(tmp_path).start()
        first.check()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StartupError, match="cannot write to"):
        embedded(tmp_path / "file" / "objects").start()


def test_a_server_that_ends_early_shows_its_last_words(tmp_path: Path) -> None:
    # Its metadata folder cannot be made where a file is.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "filerldb2").write_text("in the way")
    with pytest.raises(StartupError, match="last words:\n") as caught:
        embedded(tmp_path).start()
    assert "filerldb2" in str(caught.value)


def _start_main(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "infra.embedded"],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def _until_ready(process: subprocess.Popen[str]) -> dict[str, object]:
    assert process.stderr is not None
    for line in process.stderr:
        event: dict[str, object] = json.loads(line)
        if event["event"] == "storage_ready":
            return event
    raise AssertionError("it ended before it was ready")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_command_takes_its_server_with_it(tmp_path: Path, number: signal.Signals) -> None:
    process = _start_main(
        {"DUQUANT_HOME": str(tmp_path), "DUQUANT_S3_ACCESS_KEY": "key", "DUQUANT_S3_SECRET_KEY": SECRET}
    )
    ready = _until_ready(process)
    with connect(str(ready["endpoint"])) as store:
        store.ensure_bucket()
    server = psutil.Process(int(str(ready["pid"])))
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    server.wait(30)
    assert SECRET not in errors
    assert process.returncode == (-number if number is signal.SIGKILL else 0)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "DUQUANT_S3_SECRET_KEY: Field required"),
        ({"DUQUANT_S3_SECRET_KEY": SECRET, "DUQUANT_S3_ENDPOINT": "https://s3.example.org"}, "DUQUANT_S3_ENDPOINT is"),
    ],
)
def test_bad_settings_are_one_clear_line(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    process = _start_main({"DUQUANT_HOME": str(tmp_path), "DUQUANT_S3_ACCESS_KEY": "key", **environment})
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
