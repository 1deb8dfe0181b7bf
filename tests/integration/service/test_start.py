"""How the service starts, and what it says when a part is down."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event, text
from support.receiver import wait_until
from support.settings import service_environment as environment
from support.small_disk import SmallDisk, needs_mount

from client.main import run
from infra.database import write
from infra.keys import new_token

pytestmark = pytest.mark.integration
SUBMIT = {"model": {"source": "demo", "name": "smollm2-135m"}}
KEY = new_token()


def start(env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "service"], env=env, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"KEY_PEPPER": None}, "DUQUANT_KEY_PEPPER"),
        ({"PORT": "http"}, "DUQUANT_PORT"),
        ({"DATABASE_URL": "mysql://x"}, "DUQUANT_DATABASE_URL"),
        ({"S3_ENDPOINT": "not a url"}, "S3"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    process = start(environment(tmp_path, **change))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.strip().splitlines()) == 1, err
    assert words in err
    assert "canary" not in err


def test_a_taken_port_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(environment(tmp_path, PORT=port))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.strip().splitlines()) == 1, err
    assert f"127.0.0.1:{port}" in err


@pytest.fixture
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    port = free_port()
    log = (tmp_path / "log").open("w")
    wanted = dict(request.param)
    # The folder that the test and the disk's own side talk in is the same one.
    inside = SmallDisk(tmp_path, size).inside() if (size := wanted.pop("disk", None)) else []
    env = environment(tmp_path / "small" if inside else tmp_path, PORT=port, **wanted)
    process = subprocess.Popen([*inside, sys.executable, "-m", "service"], env=env, stderr=log, text=True)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{url}/healthz", timeout=5, verify=False)
            break
        except httpx.HTTPError:
            time.sleep(0.1)
    yield url, process
    process.kill()
    process.wait()
    log.close()


@pytest.mark.parametrize("running", [{}], indirect=True)
def test_it_starts_without_storage_and_says_what_is_down(running: Any, tmp_path: Path) -> None:
    url, process = running
    answer = httpx.get(f"{url}/readyz", timeout=30)
    checks = answer.json()["checks"]
    assert answer.status_code == 503
    assert {name: check["ok"] for name, check in checks.items()} == {
        "database": True,
        "storage": False,
        "dispatcher": False,
        "webhooks": True,
    }
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, -signal.SIGTERM)
    assert "canary" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("running", [{"BOOTSTRAP_KEY": KEY}], indirect=True)
def test_without_storage_a_text_object_is_a_503_and_other_jobs_are_accepted(running: Any) -> None:
    url, _ = running
    headers = {"Authorization": f"Bearer {KEY}"}
    source = {"kind": "object", "name": "texts/default/mine.txt"}
    answer = httpx.post(
        f"{url}/v1/jobs", json={**SUBMIT, "calibration": {"source": source}}, headers=headers, timeout=60
    )
    assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
    assert answer.json()["type"] == "urn:duquant:problem:service-unavailable"
    assert httpx.get(f"{url}/v1/jobs", headers=headers).json()["items"] == []
    assert httpx.post(f"{url}/v1/jobs", json=SUBMIT, headers=headers).status_code == 201


@pytest.mark.parametrize(
    "running", [{"DATABASE_URL": "postgresql://user:secret-canary-2@127.0.0.1:9/none"}], indirect=True
)
def test_it_starts_without_a_database_and_answers_503(
    running: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = running
    assert httpx.get(f"{url}/healthz").status_code == 200
    assert httpx.get(f"{url}/readyz", timeout=30).json()["checks"]["database"]["ok"] is False
    token = "Bearer dq_live_" + "0" * 49
    refused = httpx.get(f"{url}/v1/jobs", headers={"Authorization": token}, timeout=30)
    assert refused.status_code == 401  # its checksum is wrong; no database is asked
    from client.home import load_secrets

    good = load_secrets(tmp_path / "other").api_key
    answer = httpx.get(f"{url}/v1/jobs", headers={"Authorization": f"Bearer {good}"}, timeout=30)
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:duquant:problem:service-unavailable")
    assert "Retry-After" in answer.headers
    assert "127.0.0.1" not in answer.text
    assert "canary" not in (tmp_path / "log").read_text()
    capsys.readouterr()
    assert run(["job", "list", "--url", url, "--key", good, "--json"]) == 5
    said = capsys.readouterr()
    assert (said.out, len(said.err.strip().splitlines())) == ("", 1)
    assert "/readyz" in said.err


def test_a_full_disk_is_a_503_and_keeps_every_job(service: Any) -> None:
    kept = [service.submit()["id"] for _ in range(3)]
    engine = service.app.state.context.engine
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    # SQLite's own limit on its file gives the same error as a disk without room.
    limit = f"PRAGMA max_page_count = {pages}"
    event.listen(engine, "connect", lambda connection, _record: connection.execute(limit).close())
    engine.dispose()
    for _ in range(100):
        answer = service.http.post("/v1/jobs", json={**SUBMIT, "force": True})
        if answer.status_code != 201:
            break
        kept.append(answer.json()["id"])
    assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
    assert answer.json()["type"] == "urn:duquant:problem:service-unavailable"
    assert {item["id"] for item in service.http.get("/v1/jobs?limit=200").json()["items"]} == set(kept)


@needs_mount
@pytest.mark.parametrize("running", [{"disk": "40m"}], indirect=True)
def test_readiness_names_the_full_disk_of_the_database(running: Any, tmp_path: Path) -> None:
    url, _ = running
    disk = SmallDisk(tmp_path, "40m")

    def database() -> dict[str, Any]:
        return httpx.get(f"{url}/readyz", timeout=30).json()["checks"]["database"]

    try:
        assert database() == {"ok": True, "detail": "answers"}
        disk.fill()
        wait_until(lambda: not database()["ok"])
        assert database()["detail"].startswith("its disk is full")
        disk.free()
        wait_until(lambda: database()["ok"])
    finally:
        disk.fill()
        disk.free()


def test_readiness_tells_of_a_database_that_can_only_be_read(postgres_service: Any) -> None:
    database = postgres_service.app.state.context.engine.url.database
    assert postgres_service.http.get("/readyz").json()["checks"]["database"]["ok"] is True
    with write(postgres_service.app.state.context.engine) as connection:
        connection.execute(text(f'ALTER DATABASE "{database}" SET default_transaction_read_only = on'))
    postgres_service.app.state.context.engine.dispose()

    def database_check() -> dict[str, Any]:
        return postgres_service.http.get("/readyz").json()["checks"]["database"]

    wait_until(lambda: not database_check()["ok"], 10)
    check = database_check()
    assert (check["ok"], check["detail"].partition(";")[0]) == (False, "refuses to work")


def test_readiness_follows_the_dispatcher(service: Any) -> None:
    assert service.http.get("/readyz").status_code == 503
    service.jobs.worker_beat("dispatcher-1", {})
    # What was found is told for a second.
    wait_until(lambda: service.http.get("/readyz").status_code == 200, 5)
    assert service.http.get("/readyz").json()["ready"] is True
    service.jobs.worker_gone("dispatcher-1")
    wait_until(lambda: service.http.get("/readyz").status_code == 503, 5)
    assert service.http.get("/readyz").json()["checks"]["dispatcher"]["ok"] is False


def test_the_description_has_unique_names_examples_and_problems(service: Any) -> None:
    described = service.http.get("/openapi.json").json()
    names = [operation["operationId"] for methods in described["paths"].values() for operation in methods.values()]
    # That none is lost or renamed is checked against docs/reference/openapi.json.
    assert len(names) == len(set(names))
    operations = {
        operation["operationId"]: operation for methods in described["paths"].values() for operation in methods.values()
    }
    for name, operation in operations.items():
        assert operation["summary"], name
        assert operation["description"], name
        for status, answer in operation["responses"].items():
            for media_type, content in answer.get("content", {}).items():
                if int(status) >= 400 and name != "getReadiness":
                    assert media_type == "application/problem+json", (name, status)
                    assert content["examples"], (name, status)
    said = str(described)
    assert "Largest side of a rotation block" in said  # the recipe's own words
    assert "HTTPValidationError" not in said
