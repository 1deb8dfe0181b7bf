"""The jobs' life over HTTP, on both databases."""

import base64
import json
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.integration
SUBMIT = {"model": {"source": "demo", "name": "smollm2-135m"}, "recipe": "duquant"}


def test_submitting_makes_a_queued_job_and_names_it(any_service: Any) -> None:
    answer = any_service.http.post("/v1/jobs", json=SUBMIT)
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["reused"], job["queue_position"]) == ("queued", False, 1)
    assert job["recipe"]["transform"]["smooth_alpha"] == 0.6
    stored = any_service.jobs.get(job["id"])
    assert stored.spec["model_identity"] == "demo:smollm2-135m"
    assert stored.spec["kind"] == "quantize"


def test_the_same_work_again_gives_the_same_job_back(any_service: Any) -> None:
    first = any_service.http.post("/v1/jobs", json=SUBMIT).json()
    again = any_service.http.post("/v1/jobs", json=SUBMIT)
    assert again.status_code == 200
    assert again.json()["id"] == first["id"]
    assert again.json()["reused"] is True


def test_a_recipes_name_does_not_make_it_other_work(service: Any) -> None:
    recipe = {**service.submit(force=False)["recipe"], "name": "mine"}
    assert service.http.post("/v1/jobs", json={**SUBMIT, "recipe": recipe}).json()["reused"] is True


def test_force_makes_a_new_job(any_service: Any) -> None:
    first = any_service.http.post("/v1/jobs", json=SUBMIT).json()
    again = any_service.http.post("/v1/jobs", json={**SUBMIT, "force": True})
    assert again.status_code == 201
    assert again.json()["id"] != first["id"]


def test_calibration_overrides_change_only_what_they_name(service: Any) -> None:
    job = service.submit(calibration={"samples": 7})
    assert job["recipe"]["calibration"]["samples"] == 7
    assert job["recipe"]["calibration"]["seq_len"] == 2048


def test_a_text_file_that_changes_is_other_work(service: Any) -> None:
    text = service.settings.text_roots[0] / "english.txt"
    request = {**SUBMIT, "calibration": {"source": {"kind": "file", "name": "english.txt"}}}
    text.write_text("one")
    first = service.http.post("/v1/jobs", json=request).json()
    assert service.http.post("/v1/jobs", json=request).json()["id"] == first["id"]
    text.write_text("another")
    assert service.http.post("/v1/jobs", json=request).json()["id"] != first["id"]


def test_lists_are_paged_newest_first_without_gap_or_repeat(any_service: Any) -> None:
    made = [any_service.submit()["id"] for _ in range(5)]
    seen: list[str] = []
    cursor = None
    while True:
        page = any_service.http.get("/v1/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        seen += [job["id"] for job in page["items"]]
        any_service.submit()  # newer than every page to come
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == made[::-1]


def test_lists_can_be_of_one_state(service: Any) -> None:
    first, second = service.submit()["id"], service.submit()["id"]
    service.http.post(f"/v1/jobs/{first}:cancel")
    states = {
        state: [job["id"] for job in service.http.get("/v1/jobs", params={"state": state}).json()["items"]]
        for state in ("queued", "cancelled", "failed")
    }
    assert states == {"queued": [second], "cancelled": [first], "failed": []}


@pytest.mark.parametrize(
    "cursor",
    [
        "x",
        "%00",
        base64.urlsafe_b64encode(b'["a", "b"]').decode(),
        base64.urlsafe_b64encode(b"[1]").decode(),
        base64.urlsafe_b64encode(b"7").decode(),
        base64.urlsafe_b64encode(json.dumps([2**70, "job"]).encode()).decode(),
        base64.urlsafe_b64encode(json.dumps([1, "a\0b"]).encode()).decode(),
    ],
)
def test_a_forged_cursor_is_refused(service: Any, cursor: str) -> None:
    answer = service.http.get("/v1/jobs", params={"cursor": cursor})
    assert answer.status_code == 422
    assert answer.json()["errors"][0] == {
        "location": "query",
        "pointer": "/cursor",
        "detail": "cursor must be the next_cursor of the page before, of this list",
    }


def test_an_unchanged_job_is_not_sent_again(any_service: Any) -> None:
    job_id = any_service.submit()["id"]
    first = any_service.http.get(f"/v1/jobs/{job_id}")
    etag = first.headers["ETag"]
    again = any_service.http.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": etag})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag)
    any_service.claim()
    changed = any_service.http.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": f'"other", W/{etag}'})
    assert changed.status_code == 200
    assert changed.json()["state"] == "running"
    assert changed.headers["ETag"] != etag


def test_a_running_job_shows_layers_progress_and_time_left(any_service: Any) -> None:
    job_id = any_service.submit()["id"]
    claim = any_service.claim()
    any_service.do_layers(claim, 3, upto=1)
    job = any_service.http.get(f"/v1/jobs/{job_id}").json()
    assert job["layers"] == {"total": 4, "pending": 2, "running": 0, "done": 2, "failed": 0}
    assert job["progress"] == {"phase": "layers", "done": 2, "total": 4}
    assert job["eta_seconds"] >= 0
    layers = any_service.http.get(f"/v1/jobs/{job_id}/layers").json()["items"]
    assert [layer["layer"] for layer in layers] == [-1, 0, 1, 2]
    assert layers[1]["metrics"] == {"mlp_in": {"output_nmse": 0.01}}
    assert "key" not in layers[1]


def test_the_place_in_the_queue_follows_the_priority(service: Any) -> None:
    slow, urgent = service.submit(priority=200)["id"], service.submit(priority=1)["id"]
    places = {job: service.http.get(f"/v1/jobs/{job}").json()["queue_position"] for job in (slow, urgent)}
    assert places == {slow: 2, urgent: 1}


def test_cancelling_a_queued_job_ends_it_at_once(any_service: Any) -> None:
    job_id = any_service.submit()["id"]
    answer = any_service.http.post(f"/v1/jobs/{job_id}:cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    again = any_service.http.post(f"/v1/jobs/{job_id}:cancel")
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")


def test_cancelling_a_running_job_asks_its_worker(any_service: Any) -> None:
    job_id = any_service.submit()["id"]
    claim = any_service.claim()
    answer = any_service.http.post(f"/v1/jobs/{job_id}:cancel")
    assert (answer.status_code, answer.json()["state"]) == (202, "cancelling")
    assert any_service.jobs.heartbeat(claim, lease_seconds=60) == "cancel"
    assert any_service.http.post(f"/v1/jobs/{job_id}:cancel").status_code == 202


def test_a_finished_job_cannot_be_cancelled(service: Any) -> None:
    job = service.finished_job()
    answer = service.http.post(f"/v1/jobs/{job.id}:cancel")
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:duquant:problem:job-conflict")


def test_a_failed_job_says_why(any_service: Any) -> None:
    job_id = any_service.submit()["id"]
    any_service.jobs.fail(any_service.claim(), "bad_input", "model.safetensors is truncated")
    job = any_service.http.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["reason"], job["detail"]) == ("failed", "bad_input", "model.safetensors is truncated")


def test_an_artifact_lists_every_file_with_a_link_that_works_without_the_key(any_service: Any) -> None:
    job = any_service.finished_job()
    answer = any_service.http.get(f"/v1/jobs/{job.id}/artifact")
    assert answer.status_code == 200
    files = {file["name"]: file for file in answer.json()["files"]}
    assert list(files)[-1] == "manifest.json"
    assert answer.json()["size_bytes"] == sum(file["size_bytes"] for file in files.values())
    for file in files.values():
        content = httpx.get(file["url"])
        assert content.status_code == 200
        assert len(content.content) == file["size_bytes"]
    assert "config.json" in httpx.get(files["config.json"]["url"]).headers["Content-Disposition"]


def test_an_unfinished_job_has_no_artifact(service: Any) -> None:
    job_id = service.submit()["id"]
    answer = service.http.get(f"/v1/jobs/{job_id}/artifact")
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:duquant:problem:artifact-not-ready")


def test_an_artifact_that_was_deleted_is_a_clear_problem(service: Any) -> None:
    job = service.finished_job()
    service.storage.delete(job.result["artifact"]["manifest_key"])
    answer = service.http.get(f"/v1/jobs/{job.id}/artifact")
    assert answer.status_code == 409
    assert "force" in answer.json()["detail"]


def test_no_link_is_signed_for_a_key_of_another_job(service: Any) -> None:
    service.enqueue()
    claim = service.claim()
    service.do_layers(claim, 1)
    stolen = {"name": "a", "sha256": "0" * 64, "size_bytes": 1, "key": "artifacts/other/job_1/manifest.json"}
    job = service.finish(claim, extra_files=(stolen,))
    answer = service.http.get(f"/v1/jobs/{job.id}/artifact")
    assert answer.status_code == 500
    assert "X-Amz" not in answer.text


def test_recipes_list_every_preset_with_its_fields(service: Any) -> None:
    items = service.http.get("/v1/recipes").json()["items"]
    assert {item["name"] for item in items} >= {"rtn", "smoothquant", "duquant", "duquant-fast"}
    assert [item["name"] for item in items if item["is_default"]] == ["duquant-fast"]
    for item in items:  # what is listed can be sent back
        assert service.http.post("/v1/jobs", json={**SUBMIT, "recipe": item["recipe"]}).status_code in (200, 201)


def test_without_a_recipe_the_default_is_used(service: Any) -> None:
    answer = service.http.post("/v1/jobs", json={"model": SUBMIT["model"]})
    assert answer.json()["recipe_name"] == "duquant-fast"
