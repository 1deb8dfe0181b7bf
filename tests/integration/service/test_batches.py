"""Batches over HTTP: models times recipes, reuse, progress, cancel, retry, the table, and making outdated work anew."""

import json
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from duquant.config import preset
from infra.jobs import Job
from service import submit
from service.submit import work_fingerprint

pytestmark = pytest.mark.integration

DEMO = {"source": "demo", "name": "smollm2-135m"}


def post(service: Any, body: dict[str, Any], path: str = "/v1/batches", key: str | None = None) -> httpx.Response:
    return service.http.post(path, json=body, headers={"Idempotency-Key": key or uuid.uuid4().hex})


def batch_of(service: Any, **body: Any) -> dict[str, Any]:
    answer = post(service, body)
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == f"/v1/batches/{answer.json()['id']}"
    return answer.json()


def table(service: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
    return service.http.get(f"/v1/batches/{batch['id']}/table").json()["rows"]


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].removeprefix("urn:duquant:problem:")


def shelve(service: Any, *names: str) -> None:
    """Put models under the service's model root; only their names are looked at here."""
    for name in names:
        folder = Path(service.settings.model_roots[0]) / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (folder / "model.safetensors").write_bytes(name.encode())


def succeed(service: Any) -> Job:
    """Do the next job as a worker would."""
    claim = service.claim()
    if claim.job.kind == "evaluate":
        perplexity = 20.0 if claim.job.spec["artifact_job_id"] is None else 25.0
        metrics = {"perplexity": perplexity, "windows": 2, "seq_len": 64, "tokens_per_second": 9.0, "model_bytes": 5}
        result = {"artifact_job_id": claim.job.spec["artifact_job_id"], "metrics": metrics, "seconds": 1.0}
        return service.jobs.complete(claim, result)
    service.do_layers(claim, 1)
    return service.finish(claim)


def test_every_model_meets_every_recipe(any_service: Any) -> None:
    service = any_service
    shelve(service, "a", "b")
    models = [{"source": "local", "name": name} for name in ("a", "b", "a")]
    batch = batch_of(service, name="zoo", models=models, recipes=["rtn", "duquant"], priority=7)
    assert (batch["name"], batch["state"]) == ("zoo", "running")
    nothing = dict.fromkeys(("running", "succeeded", "failed", "refused", "cancelled"), 0)
    assert batch["jobs"] == {"total": 4, "waiting": 4, **nothing}
    assert batch["request"]["models"] == models
    rows = table(service, batch)
    assert [(row["model_name"], row["recipe_name"], row["state"]) for row in rows] == [
        (model, recipe, "queued") for model in ("a", "b") for recipe in ("rtn", "duquant")
    ]
    listed = service.http.get(f"/v1/jobs?batch={batch['id']}").json()["items"]
    assert {job["id"] for job in listed} == {row["job_id"] for row in rows}
    assert {job["priority"] for job in listed} == {7}
    assert service.http.get(f"/v1/batches/{batch['id']}").json() == batch
    assert service.http.get("/v1/batches").json()["items"] == [batch]


def test_models_are_found_by_the_beginning_of_their_names_and_by_tags(service: Any) -> None:
    shelve(service, "llama/7b", "llama/13b", "qwen")
    batch = batch_of(service, models=[{"source": "local", "prefix": "llama/"}], recipes=["rtn"])
    assert [row["model_name"] for row in table(service, batch)] == ["llama/13b", "llama/7b"]
    everything = batch_of(service, models=[{"source": "local", "prefix": ""}, {"source": "demo", "prefix": "smol"}])
    assert everything["jobs"]["total"] == 4
    job = succeed(service)
    artifact = service.http.get(f"/v1/artifacts/{job.id}").json()
    service.http.put(f"/v1/artifacts/{artifact['id']}/tags/prod-1")
    tagged = batch_of(service, models=[{"tag": "prod-*"}], recipes=["smoothquant"])
    assert [row["model_name"] for row in table(service, tagged)] == [artifact["model_name"]]
    for selector, words in (
        ({"tag": "absent"}, "no artifact of this project has a tag 'absent'"),
        ({"tag": "absent-*"}, "no artifact of this project has a tag that begins with 'absent-'"),
        ({"source": "local", "prefix": "zzz"}, "no local model of this server has a name that begins with 'zzz'"),
    ):
        answer = post(service, {"models": [DEMO, selector]})
        assert problem(answer) == (422, "model-not-found")
        assert (answer.json()["errors"][0]["pointer"], answer.json()["detail"]) == ("/models/1", words)


def test_the_list_is_narrowed_and_its_cursors_lead_on_in_what_is_left(any_service: Any) -> None:
    service = any_service
    bodies = ({"name": "a", "recipes": ["rtn"]}, {"name": "b"}, {"name": "a", "recipes": ["rtn", "duquant"]})
    first, second, third = (batch_of(service, models=[DEMO], force=True, **body)["id"] for body in bodies)
    service.http.post(f"/v1/batches/{first}:cancel")
    expected = {
        "state=cancelled": [first],
        "state=running": [third, second],
        "state=running&state=cancelled": [third, second, first],
        "state=succeeded": [],
        "name=a": [third, first],
        "name=A": [],
        "model=smollm2-135m&recipe=rtn": [third, first],
        "model=other": [],
        "created_from=2090-01-01T00:00:00Z": [],
        "created_until=2090-01-01T00:00:00Z&name=b": [second],
    }
    found = {query: service.http.get(f"/v1/batches?{query}").json()["items"] for query in expected}
    assert {query: [batch["id"] for batch in items] for query, items in found.items()} == expected
    page = service.http.get("/v1/batches?name=a&limit=1").json()
    assert [each["id"] for each in page["items"]] == [third]
    last = service.http.get("/v1/batches", params={"name": "a", "limit": 1, "cursor": page["next_cursor"]}).json()
    assert ([each["id"] for each in last["items"]], last["next_cursor"]) == ([first], None)


@pytest.mark.parametrize("query", ["state=queued", "name=%00", "name=", "created_from=yesterday", "label=a=b"])
def test_a_filter_that_there_is_not_is_refused(service: Any, query: str) -> None:
    answer = service.http.get(f"/v1/batches?{query}")
    assert problem(answer) == (422, "validation-failed")
    assert answer.json()["errors"][0]["location"] == "query"


def test_what_is_there_is_reused_and_force_makes_it_again(service: Any) -> None:
    job = service.submit(force=False)
    batch = batch_of(service, models=[DEMO], recipes=["duquant", "rtn"])
    assert [(row["job_id"] == job["id"], row["reused"]) for row in table(service, batch)] == [
        (True, True),
        (False, False),
    ]
    assert batch["reused"] == 1
    forced = batch_of(service, models=[DEMO], recipes=["duquant"], force=True)
    assert forced["reused"] == 0
    assert table(service, forced)[0]["job_id"] != job["id"]
    for _ in range(3):
        succeed(service)
    whole = batch_of(service, models=[DEMO], recipes=["duquant", "rtn"])
    assert (whole["state"], whole["reused"]) == ("succeeded", 2)
    assert whole["finished_at"] is not None


def test_a_model_that_cannot_be_used_does_not_stop_the_rest(service: Any) -> None:
    models = [DEMO, {"source": "local", "name": "absent"}, {"source": "local", "name": "../x"}]
    batch = batch_of(service, models=models, recipes=["rtn"])
    assert (batch["state"], batch["jobs"]["failed"], batch["jobs"]["refused"]) == ("running", 2, 2)
    rows = table(service, batch)
    assert [row["state"] for row in rows] == ["queued", "refused", "refused"]
    assert [row["job_id"] is None for row in rows] == [False, True, True]
    assert "absent" in rows[1]["detail"]
    succeed(service)
    ended = service.http.get(f"/v1/batches/{batch['id']}").json()
    assert (ended["state"], ended["jobs"]["failed"], ended["jobs"]["refused"]) == ("partial", 2, 2)
    # There is nothing to try again, and nothing to cancel.
    for action in ("retry-failed", "cancel"):
        after = service.http.post(f"/v1/batches/{batch['id']}:{action}").json()
        assert (after["state"], after["jobs"], after["cancelled_at"]) == ("partial", ended["jobs"], None)


def test_the_table_holds_size_time_and_perplexity_beside_the_model(service: Any) -> None:
    evaluate = {"windows": 2, "seq_len": 64, "baseline": True}
    batch = batch_of(service, models=[DEMO], recipes=["rtn", "duquant"], evaluate=evaluate)
    assert (batch["jobs"]["total"], batch["evaluations"]["total"]) == (2, 3)
    for _ in range(4):
        succeed(service)
    service.jobs.fail(service.claim(), "bad_input", "the text is too short")
    batch = service.http.get(f"/v1/batches/{batch['id']}").json()
    assert (batch["state"], batch["evaluations"]["failed"]) == ("partial", 1)
    rtn, duquant, plain = table(service, batch)
    assert (rtn["perplexity"], rtn["perplexity_ratio"], rtn["tokens_per_second"]) == (25.0, 1.25, 9.0)
    assert (rtn["seconds"], rtn["size_bytes"] > 3_000_000, rtn["artifact_id"][:4]) == (3.0, True, "art_")
    assert (duquant["state"], duquant["perplexity"], duquant["evaluation_state"]) == ("succeeded", None, "failed")
    assert (duquant["evaluation_reason"], duquant["evaluation_detail"]) == ("bad_input", "the text is too short")
    measuring = service.http.get(f"/v1/jobs/{duquant['evaluation_job_id']}").json()
    assert (measuring["kind"], measuring["artifact_job_id"]) == ("evaluate", duquant["job_id"])
    assert (rtn["evaluation_reason"], plain["evaluation_job_id"]) == (None, plain["job_id"])
    assert (plain["recipe_name"], plain["perplexity"], plain["size_bytes"]) == ("unquantized", 20.0, 5)


def test_a_cancelled_batch_goes_on_when_it_is_asked_to(service: Any) -> None:
    batch = batch_of(service, models=[DEMO], recipes=["rtn", "duquant"], evaluate={"windows": 2})
    path = f"/v1/batches/{batch['id']}"
    cancelled = service.http.post(f"{path}:cancel")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    assert cancelled.json()["cancelled_at"] is not None
    assert cancelled.json()["evaluations"]["cancelled"] == 2
    again = service.http.post(f"{path}:retry-failed")
    assert (again.status_code, again.json()["state"], again.json()["cancelled_at"]) == (200, "running", None)
    for _ in range(4):
        succeed(service)
    assert service.http.get(path).json()["state"] == "succeeded"
    assert service.http.post(f"{path}:retry-failed").json()["state"] == "succeeded"
    late = service.http.post(f"{path}:cancel")
    assert (late.status_code, late.json()["state"], late.json()["cancelled_at"]) == (200, "succeeded", None)


def test_a_key_of_another_request_tries_nothing_again(service: Any) -> None:
    body = {"models": [DEMO], "recipes": ["rtn"]}
    batch = post(service, body, key="used").json()
    service.http.post(f"/v1/batches/{batch['id']}:cancel")
    again = service.http.post(f"/v1/batches/{batch['id']}:retry-failed", headers={"Idempotency-Key": "used"})
    assert problem(again) == (422, "idempotency-key-reused")
    assert service.http.get(f"/v1/batches/{batch['id']}").json()["state"] == "cancelled"


def test_a_batch_is_made_once_for_a_key_and_needs_one(service: Any) -> None:
    body = {"models": [DEMO], "recipes": ["rtn"], "force": True}
    assert problem(service.http.post("/v1/batches", json=body)) == (400, "idempotency-key-required")
    first = post(service, body, key="once")
    again = post(service, body, key="once")
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
    assert again.json() == first.json()
    assert problem(post(service, {**body, "force": False}, key="once")) == (422, "idempotency-key-reused")
    assert len(service.http.get("/v1/batches").json()["items"]) == 1


_REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    ({}, "validation-failed", "/models"),
    ({"models": []}, "validation-failed", "/models"),
    ({"models": [{}]}, "validation-failed", "/models/0/source"),
    ({"models": [{"source": "hub", "prefix": "a"}]}, "validation-failed", "/models/0/source"),
    ({"models": [{"tag": "a b"}]}, "validation-failed", "/models/0/tag"),
    ({"models": ["demo:smollm2-135m"]}, "validation-failed", "/models/0"),
    ({"models": [DEMO], "recipes": []}, "validation-failed", "/recipes"),
    ({"models": [DEMO], "recipes": ["absent"]}, "validation-failed", "/recipes/0/recipe"),
    ({"models": [DEMO], "calibration": {"samples": 0}}, "validation-failed", "/calibration/samples"),
    (
        {"models": [DEMO], "evaluate": {"text": {"kind": "file", "name": "x"}}},
        "text-not-found",
        "/evaluate/text/name",
    ),
    ({"models": [DEMO], "queue": "absent"}, "validation-failed", "/queue"),
    ({"models": [DEMO], "recipe": "rtn"}, "validation-failed", "/recipe"),
]


def test_a_refused_batch_points_at_what_is_wrong_and_leaves_nothing(service: Any) -> None:
    for body, name, pointer in _REFUSED:
        answer = post(service, body)
        assert problem(answer) == (422, name), (body, answer.text)
        assert answer.json()["errors"][0]["pointer"] == pointer, (body, answer.text)
    assert service.http.get("/v1/batches").json()["items"] == []
    assert service.jobs.list("default") == []


def test_a_batch_over_the_quota_leaves_nothing(service: Any) -> None:
    service.app.state.context.tenants.change("default", max_queued=1, actor="test")
    assert problem(post(service, {"models": [DEMO], "recipes": ["rtn", "duquant"]})) == (429, "quota-exceeded")
    assert service.http.get("/v1/batches").json()["items"] == []
    assert service.jobs.list("default") == []


def test_too_many_items_are_refused(service: Any) -> None:
    models = [{"source": "local", "name": f"m{n}"} for n in range(200)]
    answer = post(service, {"models": models, "recipes": ["rtn", "duquant", "smoothquant"]})
    assert problem(answer) == (422, "validation-failed")
    assert "500" in answer.json()["detail"]


def test_other_tenants_and_keys_without_the_scope_get_nothing(service: Any, other_tenant: str) -> None:
    batch = batch_of(service, models=[DEMO], recipes=["rtn"])
    path = f"/v1/batches/{batch['id']}"
    token = service.key("jobs:read", "batches:write", tenant=other_tenant)
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {token}"}) as http:
        calls = (("GET", path), ("GET", f"{path}/table"), ("POST", f"{path}:cancel"), ("POST", f"{path}:retry-failed"))
        for method, where in calls:
            assert problem(http.request(method, where)) == (404, "batch-not-found")
        assert http.get("/v1/batches").json()["items"] == []
    reader = service.key("jobs:read", "jobs:write")
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {reader}"}) as http:
        assert http.get(path).status_code == 200
        refused = http.post("/v1/batches", json={"models": [DEMO]}, headers={"Idempotency-Key": "k"})
        assert problem(refused) == (403, "missing-scope")
        assert problem(http.post(f"{path}:cancel")) == (403, "missing-scope")


def test_outdated_artifacts_are_made_again_with_todays_preset(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "ALGORITHM_VERSION", 0)
    service.submit(recipe="duquant", calibration={"samples": 5})
    monkeypatch.undo()
    older = preset("rtn").to_dict() | {"weight": {**preset("rtn").to_dict()["weight"], "bits": 8}}
    service.submit(recipe=older)
    service.submit(recipe="smoothquant")
    old, changed, _ = (succeed(service) for _ in range(3))
    listed = {item["job_id"]: item["outdated"] for item in service.http.get("/v1/artifacts").json()["items"]}
    assert [listed[old.id], listed[changed.id]] == ["algorithm", "recipe"]
    path = "/v1/batches:requantize"
    dry = post(service, {"dry_run": True}, path)
    assert (dry.status_code, dry.json()["batch"]) == (200, None)
    assert sorted((item["recipe_name"], item["reason"]) for item in dry.json()["items"]) == [
        ("duquant", "algorithm"),
        ("rtn", "recipe"),
    ]
    only = post(service, {"dry_run": True, "recipe": "rtn", "model": "smollm2-135m"}, path).json()
    assert [item["recipe_name"] for item in only["items"]] == ["rtn"]
    answer = post(service, {"name": "anew"}, path)
    assert answer.status_code == 201, answer.text
    batch = answer.json()["batch"]
    assert answer.headers["Location"] == f"/v1/batches/{batch['id']}"
    assert (batch["name"], batch["jobs"]["total"], batch["reused"]) == ("anew", 2, 0)
    jobs = {row["recipe_name"]: service.jobs.get(row["job_id"]) for row in table(service, batch)}
    assert jobs["rtn"].spec["recipe"]["weight"]["bits"] == 4
    assert jobs["duquant"].spec["recipe"]["calibration"]["samples"] == 5, "its calibration was the request's own"
    recipe = preset("rtn")
    assert jobs["rtn"].fingerprint == work_fingerprint("demo:smollm2-135m", recipe, None)
    assert post(service, {"tag": "absent"}, path).json() == {"items": [], "batch": None}


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("local:llama-a", '{"source": "local", "name": "llama-a"}'),
        ("local:llama*", '{"source": "local", "prefix": "llama"}'),
        ("tag:prod", '{"tag": "prod"}'),
    ],
)
def test_a_model_as_text_is_told_how_to_write_it(shared_service: Any, text: str, meant: str) -> None:
    answer = post(shared_service, {"models": [text]})
    assert answer.status_code == 422
    assert [(each["pointer"], meant in each["detail"]) for each in answer.json()["errors"]] == [("/models/0", True)]
    single = shared_service.http.post("/v1/jobs", json={"model": "local:llama-a"}).json()["errors"]
    assert [(each["pointer"], '{"source": "local", "name": "llama-a"}' in each["detail"]) for each in single] == [
        ("/model", True)
    ]
