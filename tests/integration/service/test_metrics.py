"""What Prometheus gets to see, and who may look."""

from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from infra.errors import TransientError
from infra.metrics import snapshot
from service.auth import SCOPES

pytestmark = pytest.mark.integration


def metrics(service: Any, **headers: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    answer = httpx.get(f"{service.url}/metrics", headers=headers, timeout=20)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation, family.name
        for sample in family.samples:
            series = found.setdefault(sample.name, {})
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in series, (sample.name, labels)
            series[labels] = sample.value
    return found


def test_the_queue_the_bill_and_the_dispatchers_are_shown(any_service: Any) -> None:
    service = any_service
    service.finished_job(layers=2)
    for _ in range(3):
        service.enqueue()
    registry = CollectorRegistry()
    Histogram("duquant_layer_seconds", "Time to quantize a layer", registry=registry).observe(2.5)
    service.jobs.worker_beat("host-1", {"slots": 2, "metrics": snapshot(registry)})
    found = metrics(service)
    assert found["duquant_jobs"][(("state", "succeeded"),)] == 1
    assert found["duquant_jobs"][(("state", "queued"),)] == 3
    assert found["duquant_jobs"][(("state", "running"),)] == 0
    assert found["duquant_queue_depth"] == {(("queue", "default"),): 3}
    assert 0 <= found["duquant_queue_oldest_seconds"][(("queue", "default"),)] < 300
    # Two layers and the shard of the embeddings, at 1.5, 2.5 and 0.5 s by the harness.
    assert found["duquant_gpu_seconds_total"] == {(("tenant", "default"),): 4.5}
    assert found["duquant_workers"] == {(): 1}
    assert found["duquant_layer_seconds_sum"][("worker", "host-1"),] == 2.5
    assert found["duquant_database_up"] == {(): 1}


def test_requests_are_counted_by_route_and_never_by_id(service: Any) -> None:
    before = metrics(service)["duquant_http_requests_total"]
    for _ in range(3):
        service.http.get("/v1/jobs/job_none")
    service.http.get("/v1/no/such/path")
    service.http.request("PROPFIND", "/v1/jobs")
    found = metrics(service)
    after = found["duquant_http_requests_total"]
    route = (("method", "GET"), ("route", "/v1/jobs/{job_id}"), ("status", "404"))
    assert after[route] - before.get(route, 0) == 3
    assert (("method", "other"), ("route", "/v1/jobs"), ("status", "405")) in after
    assert not [labels for labels in after if "job_none" in str(labels) or "no/such" in str(labels)]
    assert found["duquant_http_request_seconds_count"][(("method", "GET"), ("route", "/v1/jobs/{job_id}"))] >= 3


def test_errors_of_the_object_store_are_counted(service: Any) -> None:
    unavailable = (("kind", "unavailable"),)
    before = metrics(service)["duquant_storage_errors_total"][unavailable]
    storage = service.app.state.context.storage
    broken = type(storage)(
        endpoint="http://127.0.0.1:9", region="us-east-1", bucket="b", access_key="a", secret_key="b" * 8
    )
    with broken, pytest.raises(TransientError):
        broken.check()
    assert metrics(service)["duquant_storage_errors_total"][unavailable] == before + 1


def test_metrics_are_shown_without_the_database_too(service: Any) -> None:
    unusable = (("kind", "unusable"),)
    before = metrics(service)["duquant_database_errors_total"][unusable]
    path = service.settings.database_url.removeprefix("sqlite:///")
    with open(path, "r+b") as file:  # noqa: PTH123  damaged in place
        file.write(b"no database at all" * 10)
    service.app.state.context.engine.dispose()
    found = metrics(service)
    assert found["duquant_database_up"] == {(): 0}
    assert found["duquant_database_errors_total"][unusable] > before
    assert "duquant_jobs" not in found


def test_only_this_machine_or_an_operators_key_may_look(service: Any) -> None:
    for headers in ({"X-Forwarded-For": "203.0.113.7"}, {"Forwarded": "for=203.0.113.7"}, {"Via": "1.1 proxy"}):
        answer = httpx.get(f"{service.url}/metrics", headers=headers, timeout=20)
        assert (answer.status_code, answer.json()["type"]) == (401, "urn:duquant:problem:unauthorized")
        key = service.key(*(set(SCOPES) - {"tenants:admin"}))
        answer = httpx.get(f"{service.url}/metrics", headers={**headers, "Authorization": f"Bearer {key}"}, timeout=20)
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:duquant:problem:missing-scope")
        assert "duquant_jobs" in metrics(service, **headers, Authorization=f"Bearer {service.token}")


@pytest.mark.parametrize(("access", "status"), [("open", 200), ("key", 401)])
def test_the_setting_decides(service: Any, access: str, status: int) -> None:
    context = service.app.state.context
    context.settings = context.settings.model_copy(update={"metrics_access": access})
    headers = {"X-Forwarded-For": "203.0.113.7"} if access == "open" else {}
    assert httpx.get(f"{service.url}/metrics", headers=headers, timeout=20).status_code == status
