"""What holds for many calls: keys that make a POST safe to repeat, conditional requests, waiting, filters."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text
from support.tiny_models import make_tiny_model

from infra.database import write
from service.housekeeping import forget_answers

pytestmark = pytest.mark.integration
SUBMIT = {"model": {"source": "demo", "name": "smollm2-135m"}, "recipe": "duquant"}
FORCED = {**SUBMIT, "force": True}


def jobs_of(service: Any) -> list[str]:
    return [job["id"] for job in service.http.get("/v1/jobs").json()["items"]]


def submit(service: Any, key: str, body: Any = FORCED) -> Any:
    return service.http.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})


def test_a_request_that_is_sent_again_is_done_once(any_service: Any) -> None:
    first = submit(any_service, "k1")
    again = submit(any_service, "k1")
    assert (first.status_code, first.headers.get("Idempotent-Replayed")) == (201, None)
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
    assert again.json() == first.json()
    assert again.headers["Location"] == first.headers["Location"]
    assert jobs_of(any_service) == [first.json()["id"]]
    assert submit(any_service, "k2").json()["id"] != first.json()["id"]


def test_of_many_requests_with_one_key_at_once_one_makes_a_job(any_service: Any) -> None:
    start = threading.Barrier(8)

    def send() -> Any:
        start.wait()
        return submit(any_service, "same")

    with ThreadPoolExecutor(8) as pool:
        answers = [each.result() for each in [pool.submit(send) for _ in range(8)]]
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 7
    assert len(jobs_of(any_service)) == 1


def test_a_key_is_for_one_request_only(service: Any, other_tenant: str) -> None:
    first = submit(service, "k")
    refused = submit(service, "k", {**FORCED, "priority": 7})
    assert (refused.status_code, refused.json()["type"]) == (422, "urn:duquant:problem:idempotency-key-reused")
    elsewhere = service.http.post(f"/v1/jobs/{first.json()['id']}:retry", headers={"Idempotency-Key": "k"})
    assert elsewhere.status_code == 422
    stranger = {"Authorization": f"Bearer {service.key('jobs:write', tenant=other_tenant)}", "Idempotency-Key": "k"}
    assert service.http.post("/v1/jobs", json=FORCED, headers=stranger).json()["id"] != first.json()["id"]


def test_an_answer_outlives_what_it_needed(service: Any) -> None:
    body = {**FORCED, "model": {"source": "local", "name": "passing"}}
    assert submit(service, "k", body).status_code == 422
    folder = service.settings.model_roots[0] / "passing"
    make_tiny_model(folder)
    first = submit(service, "k", body)
    shutil.rmtree(folder)
    again = submit(service, "k", body)
    assert (first.status_code, again.status_code, again.headers["Idempotent-Replayed"]) == (201, 201, "true")
    assert again.json() == first.json()


def test_a_refused_request_leaves_its_key_free(service: Any) -> None:
    missing = {**FORCED, "model": {"source": "local", "name": "not-there-yet"}}
    assert submit(service, "k", missing).status_code == 422
    assert submit(service, "k").status_code == 201


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "naïve"])
def test_a_key_that_is_none_is_refused(service: Any, key: str) -> None:
    answer = service.http.post("/v1/jobs", json=FORCED, headers={"Idempotency-Key": key.encode("latin-1")})
    assert (answer.status_code, answer.json()["errors"][0]["location"]) == (422, "header")
    assert jobs_of(service) == []


def test_a_death_between_two_steps_leaves_no_half(service: Any) -> None:
    # The kept answer and the job are one transaction: when the answer cannot be kept, there is no job either.
    engine = service.app.state.context.engine
    with write(engine) as connection:
        connection.execute(
            text(
                "CREATE TRIGGER broken BEFORE UPDATE ON idempotency_keys WHEN NEW.state = 'done' "
                "BEGIN SELECT RAISE(ABORT, 'no'); END"
            )
        )
    assert submit(service, "k").status_code == 500
    assert jobs_of(service) == []
    with write(engine) as connection:
        connection.execute(text("DROP TRIGGER broken"))
    assert submit(service, "k").status_code == 201
    assert len(jobs_of(service)) == 1


def test_old_answers_are_tidied_away(service: Any) -> None:
    submit(service, "old")
    context = service.app.state.context
    with write(context.engine) as connection:
        connection.execute(text("UPDATE idempotency_keys SET created_at = 0"))
    submit(service, "young")
    forget_answers(context)
    with write(context.engine) as connection:
        assert connection.execute(text("SELECT key FROM idempotency_keys")).scalars().all() == ["young"]


def test_a_change_that_was_based_on_an_old_state_is_refused(any_service: Any) -> None:
    path = f"/v1/jobs/{any_service.submit()['id']}"
    seen = any_service.http.get(path).headers["ETag"]
    changed = any_service.http.patch(path, json={"priority": 5}, headers={"If-Match": seen})
    assert (changed.status_code, changed.json()["priority"]) == (200, 5)
    stale = any_service.http.patch(path, json={"priority": 6}, headers={"If-Match": seen})
    assert (stale.status_code, stale.json()["type"]) == (412, "urn:duquant:problem:precondition-failed")
    fresh = any_service.http.patch(path, json={"priority": 6}, headers={"If-Match": changed.headers["ETag"]})
    assert fresh.json()["priority"] == 6
    assert any_service.http.patch(path, json={"priority": 7}, headers={"If-Match": "*"}).json()["priority"] == 7
    assert any_service.http.patch(path, json={"priority": 8}, headers={"If-Match": '"another"'}).status_code == 412
    assert any_service.http.patch(path, json={"priority": 8}, headers={"If-Match": "x"}).status_code == 422


def test_somebody_elses_job_is_no_reason_to_refuse_a_change(service: Any) -> None:
    service.submit()
    path = f"/v1/jobs/{service.submit()['id']}"
    seen = service.http.get(path).headers["ETag"]
    service.claim()  # of the first: the second moves up
    assert service.http.get(path, headers={"If-None-Match": seen}).status_code == 200
    assert service.http.patch(path, json={"priority": 5}, headers={"If-Match": seen}).status_code == 200


def test_a_job_can_be_put_off_and_called_back(any_service: Any) -> None:
    path = f"/v1/jobs/{any_service.submit()['id']}"
    later = any_service.http.patch(
        path, json={"run_at": "2090-01-01T00:00:00Z", "deadline_at": "2091-01-01T00:00:00+01:00"}
    ).json()
    assert (later["state"], later["run_at"]) == ("scheduled", "2090-01-01T00:00:00Z")
    assert later["deadline_at"] == "2090-12-31T23:00:00Z"
    now = any_service.http.patch(path, json={"run_at": None, "deadline_at": None, "priority": None}).json()
    assert (now["state"], now["deadline_at"], now["priority"]) == ("queued", None, 100)


@pytest.mark.parametrize(
    "change",
    [
        {"deadline_at": "2001-01-01T00:00:00Z"},
        {"run_at": 1_767_600_000},
        {"run_at": "2090-01-01"},
        {"run_at": "2090-01-01T00:00:00"},
        {"run_at": "0001-01-01T00:00:00+23:59"},
        {"priority": 1001},
        {"state": "succeeded"},
        {"labels": {f"name-{number}": "x" for number in range(21)}},
    ],
)
def test_a_change_that_cannot_be_is_refused(service: Any, change: dict[str, Any]) -> None:
    job = service.submit()
    answer = service.http.patch(f"/v1/jobs/{job['id']}", json=change)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, f"/{next(iter(change))}")


def test_a_job_that_runs_keeps_its_place(service: Any) -> None:
    job = service.submit()
    service.claim()
    path = f"/v1/jobs/{job['id']}"
    assert service.http.patch(path, json={"priority": 1}).json()["type"] == "urn:duquant:problem:job-conflict"
    assert service.http.patch(path, json={"deadline_at": "2090-01-01T00:00:00Z"}).status_code == 200


def test_labels_are_replaced_also_when_the_job_has_ended(any_service: Any) -> None:
    job = any_service.submit(labels={"team": "search", "run": "7"})
    path = f"/v1/jobs/{job['id']}"
    changed = any_service.http.patch(path, json={"labels": {"run": "8", "owner": "me"}})
    assert (changed.status_code, changed.json()["labels"]) == (200, {"run": "8", "owner": "me"})
    any_service.http.post(f"{path}:cancel")
    assert any_service.http.patch(path, json={"labels": {"kept": "yes"}}).json()["labels"] == {"kept": "yes"}
    found = any_service.http.get("/v1/jobs?label=kept=yes").json()["items"]
    assert [each["id"] for each in found] == [job["id"]]
    assert any_service.http.get("/v1/jobs?label=run=8").json()["items"] == []
    refused = any_service.http.patch(path, json={"labels": {}, "priority": 5})
    assert refused.json()["type"] == "urn:duquant:problem:job-conflict"
    assert any_service.http.patch(path, json={"labels": None}).json()["labels"] == {}


@pytest.mark.parametrize("labels", [{"a b": "x"}, {"a": ""}, {"a": "x" * 201}, {"a": 1}, {"a": "\0"}, {"a": "\ud800"}])
def test_labels_of_a_change_follow_the_rules_of_a_submit(service: Any, labels: dict[str, Any]) -> None:
    job = service.submit(labels={"team": "search"})
    path = f"/v1/jobs/{job['id']}"
    body = json.dumps({"labels": labels})
    changed = service.http.patch(path, content=body, headers={"Content-Type": "application/json"})
    submitted = service.http.post(
        "/v1/jobs", content=json.dumps({**FORCED, "labels": labels}), headers={"Content-Type": "application/json"}
    )
    assert (changed.status_code, submitted.status_code) == (422, 422)
    assert changed.json()["errors"] == submitted.json()["errors"]
    assert service.http.get(path).json()["labels"] == {"team": "search"}


def test_a_failed_job_is_run_again(any_service: Any) -> None:
    job = any_service.submit()
    path = f"/v1/jobs/{job['id']}"
    assert any_service.http.post(f"{path}:retry").status_code == 409
    any_service.jobs.fail(any_service.claim(), "bad_input", "truncated")
    failures = any_service.http.get("/v1/failures").json()["items"]
    assert [(each["reason"], each["count"], each["latest_job_id"]) for each in failures] == [
        ("bad_input", 1, job["id"])
    ]
    retried = any_service.http.post(f"{path}:retry")
    assert (retried.status_code, retried.json()["state"], retried.json()["reason"]) == (200, "queued", None)
    assert any_service.http.get("/v1/failures").json()["items"] == []


def test_waiting_ends_when_the_job_does(service: Any) -> None:
    job = service.submit()
    path = f"/v1/jobs/{job['id']}"
    threading.Timer(0.5, lambda: service.http.post(f"{path}:cancel")).start()
    began = time.monotonic()
    answer = service.http.get(path, headers={"Prefer": "respond-async, wait=15"})
    assert (answer.json()["state"], answer.headers["Preference-Applied"]) == ("cancelled", "wait=15")
    assert 0.4 < time.monotonic() - began < 15


def test_waiting_ends_with_any_news_when_the_caller_says_what_it_knows(service: Any) -> None:
    path = f"/v1/jobs/{service.submit()['id']}"
    known = {"If-None-Match": service.http.get(path).headers["ETag"], "Prefer": "wait=1"}
    assert service.http.get(path, headers=known).status_code == 304
    threading.Timer(0.3, lambda: service.http.patch(path, json={"priority": 1})).start()
    answer = service.http.get(path, headers={**known, "Prefer": "wait=15"})
    assert (answer.status_code, answer.json()["priority"]) == (200, 1)


def test_a_preference_that_cannot_be_read_is_none(service: Any) -> None:
    path = f"/v1/jobs/{service.submit()['id']}"
    answer = service.http.get(path, headers={"Prefer": "wait=soon"})
    assert answer.status_code == 200
    assert "Preference-Applied" not in answer.headers


def test_lists_are_narrowed(any_service: Any) -> None:
    plain = any_service.submit()
    labelled = any_service.submit(recipe="rtn", labels={"team": "search", "run": "7"}, run_at="2090-01-01T00:00:00Z")
    expected = {
        "state=scheduled": [labelled],
        "state=scheduled&state=queued": [labelled, plain],
        "kind=quantize": [labelled, plain],
        "kind=evaluate": [],
        "model=smollm2-135m": [labelled, plain],
        "model=other": [],
        "recipe=rtn": [labelled],
        "queue=default&recipe=duquant": [plain],
        "label=team%3Dsearch&label=run%3D7": [labelled],
        "label=team%3Dads": [],
        "batch=batch_1": [],
        "reason=error": [],
        "created_from=2090-01-01T00:00:00Z": [],
        "created_until=2090-01-01T00:00:00Z": [labelled, plain],
    }
    found = {query: any_service.http.get(f"/v1/jobs?{query}").json()["items"] for query in expected}
    assert {query: [job["id"] for job in items] for query, items in found.items()} == {
        query: [job["id"] for job in jobs] for query, jobs in expected.items()
    }


@pytest.mark.parametrize(
    "query", ["state=asleep", "label=nothing", "model=%00", "created_from=yesterday", "limit=0", "limit=201", "kind="]
)
def test_a_filter_that_cannot_be_is_refused(service: Any, query: str) -> None:
    answer = service.http.get(f"/v1/jobs?{query}")
    assert (answer.status_code, answer.json()["errors"][0]["location"]) == (422, "query")


def test_a_job_waits_for_those_it_depends_on(service: Any) -> None:
    first = service.submit()
    second = service.submit(depends_on=[first["id"]])
    assert (second["state"], second["depends_on"]) == ("blocked", [first["id"]])
    service.http.post(f"/v1/jobs/{first['id']}:cancel")
    assert service.http.get(f"/v1/jobs/{second['id']}").json()["reason"] == "dependency_failed"
    again = service.http.post("/v1/jobs", json={**FORCED, "depends_on": [first["id"]]})
    assert again.json()["type"] == "urn:duquant:problem:dependency-failed"
    unknown = service.http.post("/v1/jobs", json={**FORCED, "depends_on": ["job_0"]})
    assert unknown.json()["type"] == "urn:duquant:problem:dependency-not-found"


def test_a_queue_that_is_not_there_is_a_wrong_field(service: Any) -> None:
    answer = service.http.post("/v1/jobs", json={**FORCED, "queue": "express"})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/queue")
