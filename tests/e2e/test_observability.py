"""The real processes do one good and one bad job; then their logs, traces, metrics and tables are read."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.collector import Collector, collecting
from support.receiver import receiving, wait_until
from support.tiny_models import make_tiny_model, tiny_text

from infra.keys import new_token

pytestmark = pytest.mark.e2e

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
PEPPER = "canary-pepper-58c1e0"
URL_SECRET = "canary-in-a-url-91d7"
CALIBRATION = {"source": {"kind": "file", "name": "text.txt"}, "samples": 4, "seq_len": 32, "search_tokens": 32}
RECIPE = {"name": "tiny", "transform": {"block_size": 16, "greedy_steps": 4}, "calibration": CALIBRATION}


@dataclass
class Aftermath:
    """What is left to read when the processes have ended."""

    good: dict[str, Any]
    bad: dict[str, Any]
    request_id: str
    metrics: str
    answers: list[str]
    logs: dict[str, list[dict[str, Any]]]
    collector: Collector
    secrets: list[str]
    database: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def aftermath(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Aftermath:
    home = tmp_path_factory.mktemp("home")
    make_tiny_model(home / "models" / "tiny", num_hidden_layers=2)
    make_tiny_model(home / "models" / "broken", num_hidden_layers=2)
    (home / "models" / "text.txt").write_text(tiny_text(), encoding="utf-8")
    token, port = new_token(), free_port()
    with collecting() as collector, receiving() as receiver:
        values = {
            "HOME": home,
            "S3_ENDPOINT": s3.endpoint,
            "S3_ACCESS_KEY": s3.access_key,
            "S3_SECRET_KEY": s3.secret_key,
            "S3_BUCKET": "observability",
            "KEY_PEPPER": PEPPER,
            "BOOTSTRAP_KEY": token,
            "PORT": port,
            "MODEL_ROOTS": home / "models",
            "TEXT_ROOTS": home / "models",
            "WEBHOOK_NETWORKS": "127.0.0.0/8",
            "OTEL_ENDPOINT": collector.url,
            "LOG_LEVEL": "DEBUG",
            "DEVICE": "cpu",
            "BEAT_SECONDS": 1,
            "POLL_SECONDS": 0.1,
            "THREADS_PER_SLOT": 1,
        }
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("DUQUANT_", "OTEL_"))}
        env = plain | {f"DUQUANT_{name}": str(value) for name, value in values.items()}
        processes = {}
        for module in ("service", "workers"):
            with (home / f"{module}.log").open("w") as log:
                processes[module] = subprocess.Popen([sys.executable, "-m", module], env=env, stderr=log)
        try:
            wait_until(lambda: is_ready(port) or any(each.poll() is not None for each in processes.values()), 90)
            assert is_ready(port), "a process ended"
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
                http.headers["Authorization"] = f"Bearer {token}"
                seen = visit(http, f"{receiver.url}/hook?token={URL_SECRET}", home)
            receiver.wait_for(4)
        finally:
            for process in processes.values():
                process.send_signal(signal.SIGTERM)
            for process in processes.values():
                process.wait(30)
    logs = {
        module: [json.loads(line) for line in (home / f"{module}.log").read_text().splitlines()] for module in processes
    }
    secrets = [s3.secret_key, PEPPER, token, URL_SECRET, *seen.pop("secrets")]
    return Aftermath(**seen, logs=logs, collector=collector, secrets=secrets, database=home / "duquant.db")


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def visit(http: httpx.Client, receiver: str, home: Path) -> dict[str, Any]:
    """Be a user: make a webhook and a key, submit a good and a bad job, send nonsense."""
    webhook = http.post("/v1/webhooks", json={"url": receiver}).json()
    key = http.post("/v1/keys", json={"name": "second", "scopes": ["jobs:read", "jobs:write"]}).json()
    broken = home / "models" / "broken" / "model.safetensors"
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "the-good-one"}
    job = {"model": {"source": "local", "name": "tiny"}, "recipe": RECIPE}
    good = http.post("/v1/jobs", json=job, headers=headers)
    assert good.status_code == 201, good.text
    bad = http.post("/v1/jobs", json={**job, "model": {"source": "local", "name": "broken"}})
    # Same size and time of change, so that only reading it shows that it is damaged.
    facts = broken.stat()
    broken.write_bytes(b"\xff" * facts.st_size)
    os.utime(broken, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    refused = [
        http.post("/v1/webhooks", json={"url": f"https://user:{URL_SECRET}@example.com/"}),
        http.post("/v1/jobs", json={"model": {"source": "local", "name": f"../{URL_SECRET}\0"}}),
        http.get("/v1/jobs", headers={"Authorization": f"Bearer {key['token'][:-1]}?"}),
        http.get("/v1/jobs", headers={"Authorization": f"Bearer {new_token()}"}),
        http.get("/v1/jobs", params={"cursor": key["token"]}),
        http.get(f"/v1/jobs/{key['token']}"),
    ]
    assert all(400 <= answer.status_code < 500 for answer in refused)
    ended = [wait_for_end(http, each.json()["id"]) for each in (good, bad)]
    assert http.get(f"/v1/jobs/{ended[0]['id']}/artifact").status_code == 200

    # The others repeat what the caller sent wrong, and may.
    answers = [refused[0].text, *(http.get(f"/v1/jobs/{each['id']}").text for each in ended)]

    # Workers show their numbers with their next beat, and the outbox is emptied by its own clock.
    shown_last = ('duquant_claims_ended_total{outcome="failed"', 'duquant_webhook_attempts_total{outcome="delivered"')

    def all_is_shown() -> bool:
        metrics = http.get("/metrics").text
        return all(sample in metrics for sample in shown_last)

    wait_until(all_is_shown, 60)
    return {
        "good": ended[0],
        "bad": ended[1],
        "request_id": good.headers["X-Request-Id"],
        "metrics": http.get("/metrics").text,
        "answers": answers,
        "secrets": [webhook["secret"].removeprefix("whsec_"), key["token"]],
    }


def wait_for_end(http: httpx.Client, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while (job := http.get(f"/v1/jobs/{job_id}").json())["finished_at"] is None:
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    return job


def test_the_jobs_end_as_they_should(aftermath: Aftermath) -> None:
    assert aftermath.good["state"] == "succeeded", aftermath.good
    assert (aftermath.bad["state"], aftermath.bad["reason"]) == ("failed", "bad_input"), aftermath.bad


def test_no_secret_is_in_a_log_an_event_an_error_or_a_table(aftermath: Aftermath) -> None:
    tables = {}
    with sqlite3.connect(aftermath.database) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in names:
            tables[name] = str(connection.execute(f'SELECT * FROM "{name}"').fetchall())
    connection.close()
    assert len(tables) > 15
    # Where a webhook goes is its owner's to see, and to be shown in the audit log.
    url_at = {"webhooks", "audit_log"}
    places = {"logs": json.dumps(aftermath.logs), "answers": str(aftermath.answers), "metrics": aftermath.metrics}
    for place, text in {**places, **tables}.items():
        found = [secret for secret in aftermath.secrets if secret in text]
        assert not found or (place in url_at and found == [URL_SECRET]), (place, found)


def test_every_line_about_a_job_names_it(aftermath: Aftermath) -> None:
    for job in (aftermath.good, aftermath.bad):
        events = {line["event"] for line in aftermath.logs["workers"] if line.get("job_id") == job["id"]}
        assert "job_claimed" in events
    assert {"job_succeeded"} <= {
        line["event"] for line in aftermath.logs["workers"] if line.get("job_id") == aftermath.good["id"]
    }
    about_jobs = [line for line in aftermath.logs["workers"] if line["event"].startswith(("job_", "step_", "layer_"))]
    assert not [line for line in about_jobs if "job_id" not in line]
    assert not [line for line in about_jobs if line["event"] != "task_failed" and "fence" not in line]


def test_every_request_has_an_id_and_says_whose_it_was(aftermath: Aftermath) -> None:
    requests = [line for line in aftermath.logs["service"] if line["event"] == "http_request"]
    assert not [line for line in requests if not line["request_id"]]
    (submitted,) = [line for line in requests if line["request_id"] == "the-good-one"]
    assert aftermath.request_id == "the-good-one"
    assert (submitted["status"], submitted["tenant_id"]) == (201, "default")
    assert submitted["key_id"].startswith("key_")
    (enqueued,) = [
        line
        for line in aftermath.logs["service"]
        if line["event"] == "job_enqueued" and line["job_id"] == aftermath.good["id"]
    ]
    assert (enqueued["request_id"], enqueued["key_id"]) == ("the-good-one", submitted["key_id"])
    read = [line for line in requests if line.get("job_id") == aftermath.good["id"]]
    assert read


def test_one_trace_leads_from_the_request_to_the_layers(aftermath: Aftermath) -> None:
    spans = [span for span in aftermath.collector.spans if span.trace_id == TRACE]
    (request,) = [span for span in spans if span.name == "POST /v1/jobs"]
    assert (request.process, request.parent_id) == ("duquant-service", PARENT)
    assert request.attributes["http.response.status_code"] == 201
    assert request.attributes["duquant.request_id"] == "the-good-one"
    (job,) = [span for span in spans if span.name == "job quantize"]
    assert (job.process, job.parent_id) == ("duquant-workers", request.span_id)
    assert job.attributes["duquant.job_id"] == aftermath.good["id"]
    layers = [span for span in spans if span.name == "layer"]
    assert {span.parent_id for span in layers} == {job.span_id}
    assert {span.attributes["duquant.layer"] for span in layers} == {-1, 0, 1}
    assert all(0 < span.seconds < job.seconds for span in layers)
    others = {span.trace_id for span in aftermath.collector.spans if span.name == "job quantize"}
    assert len(others) == 2


def test_the_dispatchers_metrics_are_at_the_services_address(aftermath: Aftermath) -> None:
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(aftermath.metrics):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0) + sample.value
    assert values["duquant_layer_seconds_count"] == 3
    assert values["duquant_layer_seconds_sum"] > 0
    assert values["duquant_claim_seconds_count"] > 2
    assert values["duquant_job_wait_seconds_count"] == 2
    assert values["duquant_gpu_seconds_total"] > 0
    assert values["duquant_claims_ended_total"] == 2
    assert values["duquant_webhook_attempts_total"] >= 1
