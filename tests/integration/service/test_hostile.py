"""What somebody who means harm would try, beyond what is merely malformed."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from sqlalchemy import select, update
from support.receiver import wait_until

from infra.database import read, write
from infra.errors import InfraError
from infra.schema import webhook_deliveries, webhooks
from service.artifact_views import artifact_view
from service.limits import OpenStreams

pytestmark = pytest.mark.integration

MODEL = {"source": "demo", "name": "smollm2-135m"}
SUBMIT = {"model": MODEL, "recipe": "rtn"}
PATHS = (
    "/v1/jobs/{}",
    "/v1/jobs/{}/layers",
    "/v1/jobs/{}/events",
    "/v1/jobs/{}/artifact",
    "/v1/queues/{}",
    "/v1/keys/{}",
    "/v1/tenants/{}",
    "/v1/webhooks/{}",
    "/v1/webhooks/{}/deliveries",
    "/v1/batches/{}",
    "/v1/texts/{}",
    "/v1/artifacts/{}",
    "/v1/evaluations/{}",
)


def name_of(answer: httpx.Response) -> str:
    return answer.json()["type"].rpartition(":")[2]


@contextmanager
def logged() -> Iterator[list[Any]]:
    """What is logged meanwhile, which these tests otherwise keep quiet."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.BoundLogger)
    try:
        with structlog.testing.capture_logs() as lines:
            yield lines
    finally:
        structlog.configure(**before)


def test_no_id_upsets_the_database(postgres_service: Any) -> None:
    for nasty in ("%00", "job_%00", "%1b[31m", "%0a", "a%ff", "%F0%9F%92%A9"):
        for path in PATHS:
            answer = postgres_service.http.get(path.format(nasty))
            assert answer.status_code in (404, 422), (path, answer.text)
        for path in ("/v1/jobs/{}:cancel", "/v1/jobs/{}:retry", "/v1/keys/{}:revoke", "/v1/webhooks/{}:test"):
            answer = postgres_service.http.post(path.format(nasty))
            assert answer.status_code in (404, 422), (path, answer.text)


def test_a_manifest_that_was_tampered_with_opens_no_other_project(service: Any) -> None:
    theirs = "artifacts/other/job_1/layers/0000/1-1.safetensors"
    for key in (theirs, "artifacts/default/../other/job_1/x", "artifacts/default/JOB/../../other/x"):
        service.enqueue()
        claim = service.claim()
        service.do_layers(claim, 1)
        named = {"name": "evil", "sha256": "0" * 64, "size_bytes": 1, "key": key.replace("JOB", claim.job.id)}
        job = service.finish(claim, extra_files=(named,))
        with pytest.raises(InfraError, match="outside"):
            artifact_view(service.app.state.context, job)
        answer = service.http.get(f"/v1/jobs/{job.id}/artifact")
        assert answer.status_code == 500
        assert "X-Amz" not in answer.text


def test_waiting_requests_count_as_streams_and_wait_no_longer_when_there_are_too_many(service: Any) -> None:
    service.app.state.context.streams = OpenStreams(2)
    path = f"/v1/jobs/{service.enqueue().id}"
    started = time.monotonic()

    def wait(_: int) -> tuple[int, str | None]:
        answer = service.http.get(path, headers={"Prefer": "wait=2"})
        return answer.status_code, answer.headers.get("Preference-Applied")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(wait, range(8)))
    assert {status for status, _ in answers} == {200}
    assert [applied for _, applied in answers].count("wait=2") == 2
    assert time.monotonic() - started < 15


def test_a_batch_of_many_wide_selectors_is_refused_before_it_is_worked_out(service: Any) -> None:
    root = service.settings.model_roots[0]
    for number in range(501):
        (root / f"m{number}").mkdir()
        (root / f"m{number}" / "config.json").write_text("{}")
        (root / f"m{number}" / "model.safetensors").write_bytes(b"")
    walks = []
    shelf = service.app.state.context.shelf
    walk = shelf.list
    shelf.list = lambda: walks.append(1) or walk()
    body = {"models": [{"source": "local", "prefix": "m" * (number % 2)} for number in range(500)], "recipes": ["rtn"]}
    answer = service.http.post("/v1/batches", json=body, headers={"Idempotency-Key": "wide"}, timeout=60)
    assert (answer.status_code, name_of(answer)) == (422, "validation-failed")
    assert "500" in answer.json()["detail"]
    assert len(walks) == 1


@pytest.mark.parametrize("set_service", [{"allow_hub": True}], indirect=True)
def test_a_hub_text_is_a_repository_and_never_a_folder(set_service: Any) -> None:
    for name in ("../../etc", "/etc", ".", "json", "o/../n", "~/texts", "hf://o/n", "https://x.org/a", "a b/c"):
        answer = set_service.http.post("/v1/jobs", json=on_text("hub", name))
        assert (answer.status_code, name_of(answer)) == (422, "text-forbidden"), answer.text
        assert answer.json()["errors"][0]["pointer"] == "/calibration/source/name"
    assert set_service.http.post("/v1/jobs", json=on_text("hub", "Salesforce/wikitext")).status_code == 201


def on_text(kind: str, name: str) -> dict[str, Any]:
    return {**SUBMIT, "calibration": {"source": {"kind": kind, "name": name}}}


def test_a_text_object_of_an_absurd_name_is_refused(service: Any) -> None:
    for name in ("texts/default/" + "x" * 5000, "texts/default/", "texts/default/a\nb", "texts/default/./a"):
        answer = service.http.post("/v1/jobs", json=on_text("object", name))
        assert answer.status_code == 422, (name[:40], answer.text)
        assert name_of(answer) in ("text-forbidden", "text-not-found")


def test_test_messages_cannot_be_piled_up_against_somebody(service: Any) -> None:
    made = service.http.post("/v1/webhooks", json={"url": "https://example.com/"}).json()
    engine = service.app.state.context.engine
    with write(engine) as connection:  # nothing is sent to the outside
        connection.execute(update(webhooks).values(url="https://127.0.0.1:9/"))
    answers = [service.http.post(f"/v1/webhooks/{made['id']}:test") for _ in range(40)]
    refused = [answer for answer in answers if answer.status_code != 202]
    assert {name_of(answer) for answer in refused} == {"quota-exceeded"}
    with read(engine) as connection:
        waiting = connection.execute(select(webhook_deliveries).where(webhook_deliveries.c.state == "pending")).all()
    assert len(waiting) <= 10


def test_a_project_cannot_make_keys_without_end(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.keys.MAX_KEYS", 3)
    body = {"name": "more", "scopes": ["jobs:read"]}
    statuses = [service.http.post("/v1/keys", json=body).status_code for _ in range(4)]
    assert statuses == [201, 201, 429, 429]
    key = service.http.get("/v1/keys").json()["items"][0]["id"]
    assert service.http.post(f"/v1/keys/{key}:rotate", json={"overlap_seconds": 0}).status_code == 201
    newest = service.http.get("/v1/keys").json()["items"][0]["id"]
    service.http.post(f"/v1/keys/{newest}:revoke")
    assert service.http.post("/v1/keys", json=body).status_code == 201


def test_metrics_stay_closed_behind_any_proxy(service: Any) -> None:
    with httpx.Client(base_url=service.url, verify=False) as http:
        assert http.get("/metrics").status_code == 200
        for header in ("X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"):
            assert http.get("/metrics", headers={header: "127.0.0.1"}).status_code == 401, header


def test_a_path_cannot_forge_a_line_of_the_log(service: Any) -> None:
    with logged() as lines:
        service.http.get("/v1/%0a%1b[2J2026-01-01 forged?key=%0a")
        # The line is written when the answer is out.
        wait_until(lambda: any(each["event"] == "http_request" for each in lines), 5)
    (line,) = [each for each in lines if each["event"] == "http_request"]
    assert line["path"] == "/v1/%0a%1b[2J2026-01-01%20forged"


def test_an_error_of_ours_is_in_the_log_with_its_cause(service: Any) -> None:
    service.enqueue()
    claim = service.claim()
    service.do_layers(claim, 1)
    named = {"name": "evil", "sha256": "0" * 64, "size_bytes": 1, "key": "texts/other/evil"}
    job = service.finish(claim, extra_files=(named,))
    with logged() as lines:
        answer = service.http.get(f"/v1/jobs/{job.id}/artifact")
    assert (answer.status_code, name_of(answer)) == (500, "internal-error")
    (said,) = [each for each in lines if each["log_level"] == "error"]
    assert "texts/other/evil" in said["error"]
    assert "texts/other/evil" not in answer.text


def test_readiness_asks_the_parts_once_for_many_who_ask(service: Any) -> None:
    asked = []
    storage = service.app.state.context.storage
    check = storage.check
    storage.check = lambda: asked.append(1) or check()
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: service.http.get("/readyz").status_code, range(50)))
    assert set(answers) == {503}
    assert len(asked) < 10


def test_uploads_leave_no_file_behind(service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    for content in (b"good", b"\xff", b""):
        service.http.post("/v1/texts?name=a", content=content, headers={"Content-Type": "text/plain"})
    assert list((tmp_path / "t").iterdir()) == []
