"""Queues, dispatchers, the bill, quotas, models and estimates over HTTP."""

import json
from typing import Any

import pytest

pytestmark = pytest.mark.integration
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
LINEAR_PARAMS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)


def make_model(service: Any, name: str) -> None:
    folder = service.settings.model_roots[0] / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"x" * 1000)


def test_a_paused_queue_starts_nothing(any_service: Any) -> None:
    any_service.submit()
    for _ in range(2):  # doing it twice is fine
        paused = any_service.http.post("/v1/queues/default:pause")
        assert (paused.status_code, paused.json()["paused"], paused.json()["waiting"]) == (200, True, 1)
    assert any_service.jobs.claim("d", lease_seconds=60) is None
    assert any_service.http.post("/v1/queues/default:resume").json()["paused"] is False
    any_service.claim()
    queue = any_service.http.get("/v1/queues/default").json()
    assert (queue["waiting"], queue["running"], queue["oldest_wait_seconds"]) == (0, 1, None)
    assert [each["name"] for each in any_service.http.get("/v1/queues").json()["items"]] == ["default"]
    actions = [entry["action"] for entry in any_service.http.get("/v1/audit").json()["items"]]
    assert [each for each in actions if each.startswith("queue")] in ([], ["queue.resumed", "queue.paused"])


def test_a_queue_shows_only_ones_own_jobs(service: Any, other_tenant: str) -> None:
    service.submit()
    stranger = {"Authorization": f"Bearer {service.key('jobs:read', tenant=other_tenant)}"}
    assert service.http.get("/v1/queues/default", headers=stranger).json()["waiting"] == 0
    assert service.http.get("/v1/queues/express").json()["type"] == "urn:duquant:problem:queue-not-found"


def test_dispatchers_are_listed_with_what_they_hold(any_service: Any) -> None:
    any_service.jobs.worker_beat("dispatcher-1", {"slots": 4, "executor": "local", "device": "cpu"})
    any_service.submit()
    any_service.claim()
    worker = any_service.http.get("/v1/workers").json()["items"][0]
    assert (worker["name"], worker["slots"], worker["running"]) == ("dispatcher-1", 4, 1)
    assert (worker["executor"], worker["device"]) == ("local", "cpu")


def test_the_bill_adds_up_by_what_is_asked(any_service: Any) -> None:
    job = any_service.finished_job(2)  # layers of 0.5, 1.5 and 2.5 s
    bills = {
        by: any_service.http.get("/v1/usage", params={"by": by}).json()
        for by in ("day", "model", "recipe", "device", "job")
    }
    assert {bill["gpu_seconds"] for bill in bills.values()} == {4.5}
    keys = {by: [item["key"] for item in bill["items"]] for by, bill in bills.items()}
    assert (keys["model"], keys["recipe"], keys["job"]) == (["smollm2-135m"], ["duquant"], [job.id])
    assert len(keys["day"][0]) == len("2026-01-05")
    assert any_service.http.get("/v1/jobs").json()["items"][0]["gpu_seconds"] == 4.5
    empty = {"since": "2001-01-01T00:00:00Z", "until": "2002-01-01T00:00:00Z"}
    assert any_service.http.get("/v1/usage", params=empty).json()["items"] == []
    turned = {"since": "2002-01-01T00:00:00Z", "until": "2001-01-01T00:00:00Z"}
    assert any_service.http.get("/v1/usage", params=turned).status_code == 422


def test_a_full_quota_is_told_and_counted(any_service: Any) -> None:
    tenants = any_service.app.state.context.tenants
    tenants.change("default", actor="test", max_queued=1, max_bytes=1_000_000_000)
    any_service.submit()
    refused = any_service.http.post("/v1/jobs", json={"model": {"source": "demo", "name": "smollm2-135m"}})
    assert (refused.status_code, refused.json()["type"]) == (429, "urn:duquant:problem:quota-exceeded")
    assert int(refused.headers["Retry-After"]) > 0
    quota = any_service.http.get("/v1/quota").json()
    assert quota["queued"] == {"used": 1, "limit": 1}
    assert quota["running"] == {"used": 0, "limit": None}
    assert quota["bytes"] == {"used": 0, "limit": 1_000_000_000}


def test_models_at_hand_are_listed_with_their_shape(service: Any) -> None:
    make_model(service, "llama/tiny")
    broken = service.settings.model_roots[0] / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    listed = service.http.get("/v1/models").json()
    assert listed["allows_hub"] is False
    assert [(each["source"], each["name"]) for each in listed["items"]] == [
        ("demo", "gemma3-270m"),
        ("demo", "smollm2-135m"),
        ("local", "llama/tiny"),
    ]
    tiny = listed["items"][2]
    assert (tiny["architecture"], tiny["layers"], tiny["hidden_size"], tiny["size_bytes"]) == ("llama", 2, 64, 1000)


def test_an_estimate_says_what_it_rests_on(any_service: Any) -> None:
    make_model(any_service, "tiny")
    tiny = {"model": {"source": "local", "name": "tiny"}, "recipe": "duquant"}
    demo = {"model": {"source": "demo", "name": "smollm2-135m"}, "recipe": "duquant"}

    def estimate(body: dict[str, Any]) -> dict[str, Any]:
        answer = any_service.http.post("/v1/estimates", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    nothing = estimate(demo)
    assert (nothing["time"]["seconds"], nothing["time"]["basis"]) == (None, "none")
    assert (nothing["size"]["bytes"], nothing["layers"], nothing["reuses"]) == (None, None, None)
    shaped = estimate(tiny)
    assert (shaped["time"]["basis"], shaped["size"]["basis"], shaped["layers"]) == ("none", "shape", 2)
    assert shaped["size"]["bytes"] == LINEAR_PARAMS // 2 + 2 * 2 * 64 * 100

    done = any_service.finished_job(2)
    known = estimate(demo)
    assert (known["time"]["basis"], known["time"]["jobs"], known["time"]["gpu_seconds"]) == ("same_work", 1, 4.5)
    assert known["time"]["seconds"] >= 0
    assert known["size"]["bytes"] == any_service.http.get("/v1/artifacts").json()["items"][0]["size_bytes"]
    assert estimate({**demo, "recipe": "rtn"})["time"]["basis"] == "same_model"
    assert any_service.jobs.get(done.id).state == "succeeded"
    assert len(any_service.http.get("/v1/jobs").json()["items"]) == 1  # nothing was queued


def test_an_estimate_names_the_job_that_would_be_returned(service: Any) -> None:
    job = service.submit(force=False)
    body = {"model": {"source": "demo", "name": "smollm2-135m"}, "recipe": "duquant"}
    assert service.http.post("/v1/estimates", json=body).json()["reuses"] == job["id"]
