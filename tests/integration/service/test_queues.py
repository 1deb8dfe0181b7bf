"""Making, changing and deleting queues: over HTTP and on the command line."""

from typing import Any

import httpx
import pytest
from support.commands import data

from infra.jobs import NewJob

pytestmark = pytest.mark.integration

MODEL = {"source": "demo", "name": "smollm2-135m"}


def put(service: Any, name: str, body: Any, **headers: str) -> httpx.Response:
    return service.http.put(f"/v1/queues/{name}", json=body, headers=headers)


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].removeprefix("urn:duquant:problem:")


def submit(service: Any, **body: Any) -> httpx.Response:
    return service.http.post("/v1/jobs", json={"model": MODEL, "recipe": "rtn", **body})


def test_a_queue_is_made_used_bounded_and_deleted(any_service: Any) -> None:
    service = any_service
    assert submit(service, queue="express").json()["errors"][0]["pointer"] == "/queue"
    made = put(service, "express", {"max_running": 1})
    assert (made.status_code, made.headers["Location"]) == (201, "/v1/queues/express")
    assert made.json() == {
        "name": "express",
        "paused": False,
        "max_running": 1,
        "waiting": 0,
        "running": 0,
        "busy": 0,
        "oldest_wait_seconds": None,
    }
    first = submit(service, queue="express").json()
    second = submit(service, queue="express", force=True).json()
    service.claim()
    assert service.jobs.claim("another", lease_seconds=60) is None
    changed = put(service, "express", {"max_running": None})
    assert (changed.status_code, changed.json()["max_running"]) == (200, None)
    assert (changed.json()["waiting"], changed.json()["running"]) == (1, 1)
    assert service.jobs.claim("another", lease_seconds=60).job.id == second["id"]
    refused = service.http.delete("/v1/queues/express")
    assert problem(refused) == (409, "queue-conflict")
    assert "2 jobs" in refused.json()["detail"]
    for job in (first, second):
        claim = service.jobs.cancel(job["id"], tenant_id=None, actor="test")
        assert claim.state == "cancelling"
    service.jobs.sweep()
    assert problem(service.http.delete("/v1/queues/express")) == (409, "queue-conflict")  # they have yet to stop


def test_a_queue_whose_jobs_have_ended_goes_and_its_name_stays_with_them(any_service: Any) -> None:
    service = any_service
    put(service, "express", {})
    job = submit(service, queue="express").json()
    service.http.post(f"/v1/jobs/{job['id']}:cancel")
    gone = service.http.delete("/v1/queues/express")
    assert (gone.status_code, gone.content) == (204, b"")
    assert problem(service.http.get("/v1/queues/express")) == (404, "queue-not-found")
    assert problem(service.http.delete("/v1/queues/express")) == (404, "queue-not-found")
    assert service.http.get(f"/v1/jobs/{job['id']}").json()["queue"] == "express"
    assert [each["id"] for each in service.http.get("/v1/jobs?queue=express").json()["items"]] == [job["id"]]
    retried = service.http.post(f"/v1/jobs/{job['id']}:retry")
    assert problem(retried) == (404, "queue-not-found")
    assert "express, which is deleted" in retried.json()["detail"]
    assert submit(service).json()["queue"] == "default"


def test_only_administrators_of_queues_make_and_delete_them(service: Any) -> None:
    plain = {"Authorization": f"Bearer {service.key('jobs:read', 'jobs:write')}"}
    assert problem(put(service, "express", {}, **plain)) == (403, "missing-scope")
    assert problem(service.http.delete("/v1/queues/default", headers=plain)) == (403, "missing-scope")
    put(service, "express", {"max_running": 4})
    service.http.delete("/v1/queues/express")
    noted = service.http.get("/v1/audit").json()["items"]
    assert [(each["action"], each["target"], each["data"]) for each in noted if "queue" in each["action"]] == [
        ("queue.deleted", "express", {}),
        ("queue.created", "express", {"max_running": 4}),
    ]


@pytest.mark.parametrize("name", ["Express", "-x", "a b", "a" * 65, "%C3%BC", "_x"])
def test_a_name_that_no_job_could_give_is_refused(service: Any, name: str) -> None:
    answer = put(service, name, {})
    assert problem(answer) == (422, "validation-failed")
    assert answer.json()["errors"][0] | {"detail": ""} == {"location": "path", "pointer": "/queue", "detail": ""}


@pytest.mark.parametrize("name", ["0", "a" * 64, "a-b_c-9"])
def test_every_name_that_a_job_may_give_can_be_made(service: Any, name: str) -> None:
    assert put(service, name, {}).status_code == 201
    assert submit(service, queue=name, force=True).status_code == 201


@pytest.mark.parametrize("value", [0, -1, 1.0, "4", True, 2**31, [1]])
def test_a_bound_that_is_none_is_refused(service: Any, value: Any) -> None:
    answer = put(service, "express", {"max_running": value})
    assert problem(answer) == (422, "validation-failed")
    assert answer.json()["errors"][0]["pointer"] == "/max_running"
    assert problem(put(service, "express", {"max_runing": 1})) == (422, "validation-failed")
    assert problem(service.http.get("/v1/queues/express")) == (404, "queue-not-found")


def test_conditions_tell_making_from_changing(service: Any) -> None:
    new, old = {"If-None-Match": "*"}, {"If-Match": "*"}
    assert problem(put(service, "express", {}, **old)) == (412, "precondition-failed")
    assert put(service, "express", {"max_running": 2}, **new).status_code == 201
    again = put(service, "express", {}, **new)
    assert (problem(again), again.json()["detail"]) == (
        (412, "precondition-failed"),
        "there is a queue express already",
    )
    assert put(service, "express", {"max_running": 3}, **old).status_code == 200
    assert problem(put(service, "express", {}, **old, **new)) == (412, "precondition-failed")
    # There is no ETag that a queue could have or lack.
    assert problem(put(service, "express", {}, **{"If-Match": '"1-aa"'})) == (412, "precondition-failed")
    assert put(service, "express", {"max_running": 3}, **{"If-None-Match": '"1-aa"'}).status_code == 200
    assert service.http.get("/v1/queues/express").json()["max_running"] == 3


def test_the_default_queue_can_be_bounded_and_not_deleted(service: Any) -> None:
    assert put(service, "default", {"max_running": 2}).status_code == 200
    assert problem(service.http.delete("/v1/queues/default")) == (409, "queue-conflict")


def test_one_queue_too_many_is_refused(service: Any) -> None:
    answers = [put(service, f"q{number}", {}) for number in range(20)]
    assert [each.status_code for each in answers] == [201] * 19 + [429]
    assert problem(answers[-1]) == (429, "quota-exceeded")
    assert "20 queues" in answers[-1].json()["detail"]


def test_what_measures_a_job_that_was_there_waits_in_the_queue_that_was_asked_for(service: Any) -> None:
    put(service, "express", {})
    put(service, "other", {})
    done = submit(service, queue="express").json()
    claim = service.claim()
    service.do_layers(claim, 1)
    service.finish(claim)
    service.http.delete("/v1/queues/express")
    evaluate = {"windows": 2, "seq_len": 64}
    reused = submit(service, queue="other", evaluate=evaluate).json()
    assert (reused["id"], reused["reused"]) == (done["id"], True)
    evaluation = service.http.get(f"/v1/jobs/{reused['evaluation_job_id']}").json()
    assert evaluation["queue"] == "other"
    batch = {"models": [MODEL], "recipes": ["rtn"], "queue": "other", "evaluate": {"windows": 3}}
    answer = service.http.post("/v1/batches", json=batch, headers={"Idempotency-Key": "b"})
    assert (answer.status_code, answer.json()["reused"]) == (201, 1)
    listed = service.http.get(f"/v1/jobs?batch={answer.json()['id']}&kind=evaluate").json()["items"]
    assert [each["queue"] for each in listed] == ["other"]


def test_a_queue_says_how_full_it_is_with_the_jobs_of_all_projects(any_service: Any) -> None:
    service = any_service
    put(service, "express", {"max_running": 4})
    service.http.post("/v1/tenants", json={"id": "other", "name": "Other"})
    new = service.jobs.get(submit(service, queue="express").json()["id"])
    for tenant, gpus in (("other", 2), ("default", 1)):
        made = NewJob(tenant_id=tenant, kind="quantize", spec=new.spec, fingerprint="f", queue="express", gpus=gpus)
        service.jobs.enqueue(made, force=True, actor="test")
    for number in range(3):
        service.jobs.claim(f"worker {number}", lease_seconds=60)
    shown = service.http.get("/v1/queues/express").json()
    assert (shown["waiting"], shown["running"], shown["busy"]) == (0, 2, 4)
    by_name = {each["name"]: each for each in service.http.get("/v1/queues").json()["items"]}
    assert (by_name["express"]["busy"], by_name["default"]["busy"]) == (4, 0)


def test_work_that_waits_in_a_paused_queue_is_not_stuck_there(any_service: Any) -> None:
    service = any_service
    put(service, "slow", {})
    first = submit(service, queue="slow").json()
    service.http.post("/v1/queues/slow:pause")
    again = submit(service)
    assert (again.status_code, again.json()["reused"], again.json()["id"]) == (200, True, first["id"])
    assert again.json()["queue"] == "default"
    # And back by hand: whoever names a paused queue means it.
    path = f"/v1/jobs/{first['id']}"
    assert service.http.patch(path, json={"queue": "slow"}).json()["queue"] == "slow"
    refused = service.http.patch(path, json={"queue": "nowhere"})
    assert problem(refused) == (422, "validation-failed")
    assert refused.json()["errors"][0]["pointer"] == "/queue"
    assert service.jobs.claim("worker", lease_seconds=60) is None
    assert service.http.patch(path, json={"queue": None}).json()["queue"] == "default"
    assert service.jobs.claim("worker", lease_seconds=60).job.id == first["id"]
    assert problem(service.http.patch(path, json={"queue": "slow"})) == (409, "job-conflict")


def test_work_that_waits_in_a_full_queue_starts_in_the_one_that_is_named_now(any_service: Any) -> None:
    service = any_service
    put(service, "slow", {"max_running": 1})
    submit(service, queue="slow", recipe="duquant")
    assert service.jobs.claim("worker", lease_seconds=60) is not None
    job = submit(service, queue="slow").json()
    assert service.jobs.claim("worker", lease_seconds=60) is None
    again = submit(service).json()
    assert (again["reused"], again["id"], again["queue"]) == (True, job["id"], "default")
    assert service.jobs.claim("worker", lease_seconds=60).job.id == job["id"]


def test_the_command_line_puts_a_job_into_another_queue(service: Any, cli: Any) -> None:
    put(service, "slow", {})
    job = submit(service).json()
    assert data(cli("job", "change", job["id"], "--queue", "slow", "--json"))["queue"] == "slow"
    status, _, err = cli("job", "change", job["id"], "--queue", "nowhere")
    assert (status, "no queue nowhere" in err) == (2, True), err


def test_the_command_line_makes_shows_changes_and_deletes_queues(service: Any, cli: Any) -> None:
    assert data(cli("queue", "create", "express-1", "--max-running", "2", "--json"))["max_running"] == 2
    status, _, err = cli("queue", "create", "express-1")
    assert (status, "there is a queue express-1 already" in err) == (1, True)
    assert data(cli("queue", "get", "express-1", "--json"))["max_running"] == 2
    assert data(cli("queue", "change", "express-1", "--max-running", "-1", "--json"))["max_running"] is None
    status, _, err = cli("queue", "change", "absent", "--max-running", "1")
    assert (status, "there is no queue absent" in err) == (1, True)
    assert cli("queue", "change", "express-1", "--max-running", "0")[0] == 2
    assert "express-1" in cli("queue", "list")[1]
    job = submit(service, queue="express-1").json()
    status, _, err = cli("queue", "delete", "express-1")
    assert (status, "1 job that has not ended" in err) == (1, True)
    service.http.post(f"/v1/jobs/{job['id']}:cancel")
    assert "express-1 is deleted" in cli("queue", "delete", "express-1")[1]
    assert cli("queue", "get", "express-1")[0] == 4
    for words in (("create", "../x"), ("get", "../x"), ("delete", ""), ("create", "Express")):
        assert cli("queue", *words)[0] == 2, words
