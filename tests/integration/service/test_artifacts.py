"""Artifacts and evaluations over HTTP."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from infra.jobs import Job

pytestmark = pytest.mark.integration


def made(service: Any, layers: int = 1, **changes: Any) -> dict[str, Any]:
    """Finish a job; return its artifact as it is shown."""
    service.enqueue(**changes)
    claim = service.claim()
    service.do_layers(claim, layers)
    job = service.finish(claim)
    return get(service, f"/v1/artifacts/{job.id}")


def get(service: Any, path: str, status: int = 200, **options: Any) -> Any:
    answer = service.http.get(path, **options)
    assert answer.status_code == status, answer.text
    return answer.json()


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].removeprefix("urn:duquant:problem:")


def measure(service: Any, artifact: dict[str, Any] | None, perplexity: float = 20.0) -> Job:
    """Submit an evaluation and end it as a worker would."""
    body: dict[str, Any] = {"force": True, "windows": 2, "seq_len": 64}
    body |= {"artifact": artifact["id"]} if artifact else {"model": {"source": "demo", "name": "smollm2-135m"}}
    answer = service.http.post("/v1/evaluations", json=body)
    assert answer.status_code == 201, answer.text
    claim = service.claim()
    assert claim.job.id == answer.json()["id"]
    metrics = {"perplexity": perplexity, "windows": 2, "seq_len": 64, "tokens_per_second": 9.0, "model_bytes": 5}
    result = {"artifact_job_id": claim.job.spec["artifact_job_id"], "metrics": metrics, "seconds": 1.0}
    return service.jobs.complete(claim, result)


def test_an_artifact_is_read_by_its_id_and_by_its_jobs(any_service: Any) -> None:
    service = any_service
    artifact = made(service)
    assert get(service, f"/v1/artifacts/{artifact['id']}") == artifact
    assert (artifact["model_name"], artifact["recipe_name"]) == ("smollm2-135m", "duquant")
    assert (artifact["tags"], artifact["evaluations"], artifact["expires_at"]) == ([], [], None)
    files = get(service, f"/v1/artifacts/{artifact['id']}/files")
    assert [file["name"] for file in files["files"]][-1] == "manifest.json"
    by_job = get(service, f"/v1/jobs/{artifact['job_id']}/artifact")
    assert [(file["name"], file["sha256"]) for file in by_job["files"]] == [
        (file["name"], file["sha256"]) for file in files["files"]
    ]
    assert httpx.get(files["files"][0]["url"]).status_code == 200


def test_artifacts_are_listed_by_filters_and_pages(service: Any) -> None:
    first = made(service)
    second = made(service, recipe_name="rtn", model_name="llama/7b")
    assert service.http.put(f"/v1/artifacts/{second['id']}/tags/prod-1").status_code == 200

    def found(query: str = "") -> list[str]:
        return [item["id"] for item in get(service, f"/v1/artifacts?{query}")["items"]]

    assert found() == [second["id"], first["id"]]
    assert found("recipe=rtn") == found("model=llama/7b") == found("tag=prod-1") == found("tag=prod*") == [second["id"]]
    assert found("tag=prod") == found("recipe=absent") == []
    assert found(f"created_until={datetime(2020, 1, 1, tzinfo=UTC).strftime('%Y-%m-%dT%H:%M:%SZ')}") == []
    page = get(service, "/v1/artifacts?limit=1")
    rest = get(service, f"/v1/artifacts?limit=1&cursor={page['next_cursor']}")
    assert [page["items"][0]["id"], rest["items"][0]["id"], rest["next_cursor"]] == [second["id"], first["id"], None]


def test_a_tag_moves_and_is_taken_away(service: Any) -> None:
    a, b = made(service), made(service)
    for artifact in (a, b):
        shown = service.http.put(f"/v1/artifacts/{artifact['id']}/tags/best").json()
        assert shown["tags"] == ["best"]
    assert get(service, f"/v1/artifacts/{a['id']}")["tags"] == []
    for _ in range(2):
        assert service.http.delete(f"/v1/artifacts/{b['id']}/tags/best").json()["tags"] == []
    for tag in ("-x", "a*", "x" * 101, "a b"):
        assert problem(service.http.put(f"/v1/artifacts/{a['id']}/tags/{tag}")) == (422, "validation-failed")
    # No path has control characters.
    assert problem(service.http.put(f"/v1/artifacts/{a['id']}/tags/%00")) == (404, "not-found")


def test_a_deleted_artifact_is_gone_and_can_be_made_anew(service: Any) -> None:
    artifact = made(service)
    path = f"/v1/artifacts/{artifact['id']}"
    service.http.put(f"{path}/tags/prod")
    assert problem(service.http.delete(path)) == (409, "artifact-conflict")
    answer = service.http.delete(f"{path}?force=true")
    assert (answer.status_code, answer.content) == (204, b"")
    assert problem(service.http.get(path)) == (404, "artifact-not-found")
    assert problem(service.http.get(f"{path}/files")) == (404, "artifact-not-found")
    assert problem(service.http.get(f"/v1/jobs/{artifact['job_id']}/artifact")) == (409, "artifact-not-ready")
    assert problem(service.http.delete(path)) == (404, "artifact-not-found")


def test_an_artifact_that_is_being_measured_is_not_deleted(service: Any) -> None:
    artifact = made(service)
    service.http.post("/v1/evaluations", json={"artifact": artifact["id"]})
    assert problem(service.http.delete(f"/v1/artifacts/{artifact['id']}?force=true")) == (409, "artifact-conflict")


def test_an_artifact_is_kept_until_a_time(service: Any) -> None:
    path = f"/v1/artifacts/{made(service)['id']}"
    until = "2036-01-05T09:30:00Z"
    assert service.http.patch(path, json={"expires_at": until}).json()["expires_at"].startswith("2036-01-05T09:30")
    assert service.http.patch(path, json={"expires_at": None}).json()["expires_at"] is None
    now = datetime.now(UTC)
    assert service.http.patch(path, json={"expires_at": (now - timedelta(seconds=10)).isoformat()}).status_code == 200
    past = (now - timedelta(seconds=70)).isoformat()
    noted = [entry["data"] for entry in get(service, "/v1/audit")["items"] if entry["action"] == "artifact.changed"]
    assert noted[1:] == [{"expires_at": None}, {"expires_at": "2036-01-05T09:30:00.000Z"}]
    for body in (
        {},
        {"expires_at": 5},
        {"expires_at": past},
        {"expires_at": "2036-01-05"},
        {"expires_at": until, "tags": []},
    ):
        assert problem(service.http.patch(path, json=body)) == (422, "validation-failed")


def test_two_artifacts_are_compared(service: Any) -> None:
    a, b = made(service, layers=2), made(service, layers=1)
    measure(service, a, 20.0)
    measure(service, b, 25.0)
    difference = get(service, f"/v1/artifacts/{a['id']}/comparison?with={b['id']}")
    assert (difference["a"]["id"], difference["b"]["id"]) == (a["id"], b["id"])
    assert difference["recipe"] == []
    measures = {each["field"]: (each["a"], each["b"]) for each in difference["measures"]}
    assert measures == {
        "size_bytes": (a["size_bytes"], b["size_bytes"]),
        "perplexity (2 windows of 64)": (20.0, 25.0),
    }
    assert difference["files"] == {
        "same": 3,
        "changed": [],
        "only_a": ["model-layer-0001.safetensors"],
        "only_b": [],
    }
    assert problem(service.http.get(f"/v1/artifacts/{a['id']}/comparison")) == (422, "validation-failed")
    absent = service.http.get(f"/v1/artifacts/{a['id']}/comparison?with=art_absent")
    assert problem(absent) == (404, "artifact-not-found")


def test_what_was_measured_is_at_the_artifact_and_listed(service: Any) -> None:
    artifact = made(service)
    job = measure(service, artifact, 18.5)
    plain = measure(service, None, 17.0)
    shown = get(service, f"/v1/artifacts/{artifact['id']}")["evaluations"]
    assert [(each["job_id"], each["metrics"]["perplexity"]) for each in shown] == [(job.id, 18.5)]
    assert get(service, f"/v1/artifacts/{artifact['id']}/files")["evaluation"]["perplexity"] == 18.5
    assert get(service, f"/v1/evaluations/{shown[0]['id']}") == get(service, f"/v1/evaluations/{job.id}") == shown[0]
    listed = get(service, "/v1/evaluations")["items"]
    assert [each["job_id"] for each in listed] == [plain.id, job.id]
    assert listed[0]["artifact_id"] is None
    assert get(service, f"/v1/evaluations?artifact={artifact['id']}")["items"] == shown
    assert len(get(service, "/v1/evaluations?model=smollm2-135m")["items"]) == 2


def test_the_same_evaluation_is_made_once(service: Any) -> None:
    artifact = made(service)
    body = {"artifact": artifact["job_id"], "windows": 3}
    first = service.http.post("/v1/evaluations", json=body)
    again = service.http.post("/v1/evaluations", json={**body, "artifact": artifact["id"]})
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() | {"reused": False} == first.json()
    assert first.json()["kind"] == "evaluate"
    assert first.headers["Location"] == f"/v1/jobs/{first.json()['id']}"
    other = service.http.post("/v1/evaluations", json={**body, "windows": None})
    assert other.json()["id"] != first.json()["id"]
    assert service.jobs.get(other.json()["id"]).spec["evaluation"]["windows"] is None


_REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    ({}, (422, "validation-failed"), ""),
    ({"artifact": "art_absent"}, (404, "artifact-not-found"), "/artifact"),
    ({"artifact": "../x"}, (422, "validation-failed"), "/artifact"),
    ({"model": {"source": "demo", "name": "absent"}}, (422, "model-not-found"), "/model/name"),
    ({"model": {"source": "local", "name": "../x"}}, (422, "model-forbidden"), "/model/name"),
    (
        {"model": {"source": "demo", "name": "smollm2-135m"}, "artifact": "art_x"},
        (422, "validation-failed"),
        "",
    ),
    (
        {"artifact": "art_absent", "text": {"kind": "file", "name": "/etc/passwd"}},
        (422, "text-forbidden"),
        "/text/name",
    ),
    ({"artifact": "art_absent", "text": {"kind": "file", "name": "absent"}}, (422, "text-not-found"), "/text/name"),
    ({"artifact": "art_absent", "text": {"kind": "random"}}, (422, "validation-failed"), "/text"),
    ({"artifact": "art_absent", "seq_len": 4}, (422, "validation-failed"), "/seq_len"),
    ({"artifact": "art_absent", "windows": "2"}, (422, "validation-failed"), "/windows"),
    ({"artifact": "art_absent", "lenght": 4}, (422, "validation-failed"), "/lenght"),
]


def test_a_refused_evaluation_points_at_what_is_wrong(service: Any) -> None:
    for body, expected, pointer in _REFUSED:
        answer = service.http.post("/v1/evaluations", json=body)
        assert problem(answer) == expected, (body, answer.text)
        assert [each["pointer"] for each in answer.json()["errors"]] == [pointer], (body, answer.text)


def test_a_job_brings_its_evaluation_along(service: Any) -> None:
    body = {
        "model": {"source": "demo", "name": "smollm2-135m"},
        "recipe": "rtn",
        "evaluate": {"windows": 2, "seq_len": 64},
    }
    job = service.http.post("/v1/jobs", json=body).json()
    evaluation = service.jobs.get(job["evaluation_job_id"])
    assert (evaluation.state, evaluation.spec["artifact_job_id"]) == ("blocked", job["id"])
    again = service.http.post("/v1/jobs", json=body).json()
    assert (again["reused"], again["evaluation_job_id"]) == (True, evaluation.id)
    claim = service.claim()
    service.do_layers(claim, 1)
    service.finish(claim)
    assert service.jobs.get(evaluation.id).state == "queued"
    more = service.http.post("/v1/jobs", json={**body, "evaluate": {"windows": 3}}).json()
    assert more["id"] == job["id"]
    assert service.jobs.get(more["evaluation_job_id"]).state == "queued"
    without = service.http.post("/v1/jobs", json={**body, "evaluate": None}).json()
    assert without["evaluation_job_id"] is None
    bad = service.http.post("/v1/jobs", json={**body, "evaluate": {"text": {"kind": "file", "name": "absent"}}})
    assert bad.json()["errors"][0]["pointer"] == "/evaluate/text/name"


def test_other_tenants_see_nothing(service: Any, other_tenant: str) -> None:
    artifact = made(service)
    measured = measure(service, artifact)
    token = service.key("artifacts:read", "artifacts:write", "jobs:read", "jobs:write", tenant=other_tenant)
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {token}"}) as http:
        path = f"/v1/artifacts/{artifact['id']}"
        for answer in (
            http.get(path),
            http.get(f"{path}/files"),
            http.get(f"{path}/comparison?with={artifact['id']}"),
            http.patch(path, json={"expires_at": None}),
            http.delete(path),
            http.put(f"{path}/tags/x"),
            http.delete(f"{path}/tags/x"),
            http.get(f"/v1/evaluations?artifact={artifact['id']}"),
            http.post("/v1/evaluations", json={"artifact": artifact["id"]}),
        ):
            assert problem(answer) == (404, "artifact-not-found"), answer.request
        assert problem(http.get(f"/v1/evaluations/{measured.id}")) == (404, "evaluation-not-found")
        assert http.get("/v1/artifacts").json()["items"] == http.get("/v1/evaluations").json()["items"] == []


def test_an_artifact_made_by_an_older_algorithm_says_so(service: Any) -> None:
    assert made(service)["outdated"] == "algorithm"  # the harness's fingerprint is none of ours
    job = service.submit(recipe="rtn")
    claim = service.claim()
    service.do_layers(claim, 1)
    service.finish(claim)
    assert get(service, f"/v1/artifacts/{job['id']}")["outdated"] is None


def test_the_audit_log_tells_who_changed_what(service: Any) -> None:
    artifact = made(service)
    service.http.put(f"/v1/artifacts/{artifact['id']}/tags/best")
    entry = json.loads(service.http.get("/v1/audit").text)["items"][0]
    assert (entry["action"], entry["target"]) == ("artifact.tagged", artifact["id"])
    assert entry["actor"].startswith("key:")


def test_the_dashboard_shows_evaluations(service: Any) -> None:
    artifact = made(service)
    done = measure(service, artifact, 18.5)
    waiting = service.http.post("/v1/evaluations", json={"model": {"source": "demo", "name": "smollm2-135m"}}).json()
    with httpx.Client(base_url=service.url, follow_redirects=True) as http:
        http.post("/login", data={"key": service.token}, headers={"Sec-Fetch-Site": "same-origin"})
        pages = {job_id: http.get(f"/jobs/{job_id}") for job_id in (done.id, waiting["id"], artifact["job_id"])}
        assert all(page.status_code == 200 for page in pages.values()), pages
        assert "18.5" in pages[done.id].text
        assert "18.5" in pages[artifact["job_id"]].text
        assert "as it is, measured" in pages[waiting["id"]].text
        assert "layers-title" in pages[artifact["job_id"]].text
        assert "layers-title" not in pages[done.id].text
        assert "measured" in http.get("/").text
