"""Webhooks over HTTP, sent by the running service to a real receiver."""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import pytest
from standardwebhooks.webhooks import Webhook as Verifier
from support.receiver import Receiver, Reply, receiving, wait_until

from service.auth import SCOPES

pytestmark = pytest.mark.integration


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def test_a_job_is_told_to_its_webhook_from_start_to_end(any_service: Any, receiver: Receiver) -> None:
    service = any_service
    made = service.http.post("/v1/webhooks", json={"url": f"{receiver.url}/hook", "events": ["job.succeeded"]})
    assert made.status_code == 201
    webhook = made.json()
    assert made.headers["Location"] == f"/v1/webhooks/{webhook['id']}"
    job = service.finished_job(layers=1)
    (message,) = receiver.wait_for(1)
    verified = Verifier(webhook["secret"]).verify(message.body, dict(message.headers))
    assert (verified["type"], verified["data"]["job_id"]) == ("job.succeeded", job.id)

    def delivered() -> bool:
        items = service.http.get(f"/v1/webhooks/{webhook['id']}/deliveries").json()["items"]
        return [each["state"] for each in items] == ["delivered"]

    wait_until(delivered)


def test_the_end_of_a_batch_is_told_by_the_running_service(service: Any, receiver: Receiver) -> None:
    service.http.post("/v1/webhooks", json={"url": receiver.url, "events": ["batch.finished"]})
    models = [{"source": "demo", "name": "smollm2-135m"}, {"source": "local", "name": "absent"}]
    body = {"models": models, "recipes": ["rtn"]}
    batch = service.http.post("/v1/batches", json=body, headers={"Idempotency-Key": "zoo"}).json()
    assert batch["finished_at"] is None
    service.jobs.fail(service.claim(), "bad_input", "on purpose")
    (message,) = receiver.wait_for(1)
    data = json.loads(message.body)["data"]
    assert (data["batch_id"], data["state"], data["jobs"]["failed"]) == (batch["id"], "failed", 2)
    shown = service.http.get(f"/v1/batches/{batch['id']}").json()["finished_at"]
    assert datetime.fromisoformat(shown) == datetime.fromisoformat(data["finished_at"])


def test_a_failed_delivery_is_shown_and_can_be_sent_again(service: Any, receiver: Receiver) -> None:
    webhook = service.http.post("/v1/webhooks", json={"url": receiver.url}).json()
    path = f"/v1/webhooks/{webhook['id']}"
    receiver.reply = Reply(status=410)
    sent = service.http.post(f"{path}:test")
    assert (sent.status_code, sent.json()["event"]) == (202, "webhook.test")
    wait_until(lambda: not service.http.get(path).json()["enabled"])
    (delivery,) = service.http.get(f"{path}/deliveries").json()["items"]
    assert (delivery["state"], delivery["attempts"], delivery["last_status"]) == ("failed", 1, 410)
    receiver.reply = Reply(status=200)
    assert service.http.patch(path, json={"enabled": True, "events": ["job.failed"]}).json()["events"] == ["job.failed"]
    again = service.http.post(f"{path}/deliveries/{delivery['id']}:redeliver")
    assert (again.status_code, again.json()["state"]) == (202, "pending")
    first, second = receiver.wait_for(2)
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == delivery["id"]
    assert json.loads(second.body)["data"] == {"webhook_id": webhook["id"]}
    assert service.http.delete(path).status_code == 204
    assert service.http.get(path).json()["type"] == "urn:duquant:problem:webhook-not-found"
    actions = [each["action"] for each in service.http.get("/v1/audit").json()["items"]]
    assert actions[:4] == ["webhook.deleted", "webhook.changed", "webhook.disabled", "webhook.created"]


def test_the_secret_is_shown_once(service: Any) -> None:
    headers = {"Idempotency-Key": "once"}
    body = {"url": "https://example.com/"}
    made = service.http.post("/v1/webhooks", json=body, headers=headers).json()
    again = service.http.post("/v1/webhooks", json=body, headers=headers).json()
    assert (again["id"], again["secret"]) == (made["id"], None)
    path = f"/v1/webhooks/{made['id']}"
    new = service.http.post(f"{path}:rotate-secret").json()["secret"]
    assert new.startswith("whsec_")
    assert new != made["secret"]
    shown = service.http.get(path).text + service.http.get("/v1/webhooks").text + service.http.get("/v1/audit").text
    for secret in (made["secret"], new):
        assert secret.removeprefix("whsec_") not in shown


def test_addresses_inside_are_refused(service: Any) -> None:
    webhook = service.http.post("/v1/webhooks", json={"url": "https://example.com/"}).json()
    for url in (
        "https://169.254.169.254/latest/meta-data/",
        "https://10.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "http://93.184.215.14/",
        "ftp://example.com/",
        "https://user:password@example.com/",
        "https://example.com/#x",
        "nonsense",
    ):
        for method, path in (("POST", "/v1/webhooks"), ("PATCH", f"/v1/webhooks/{webhook['id']}")):
            answer = service.http.request(method, path, json={"url": url})
            assert (answer.status_code, answer.json()["type"]) == (422, "urn:duquant:problem:webhook-forbidden"), url
            assert answer.json()["errors"][0]["pointer"] == "/url"
    for body in ({}, {"url": ""}, {"url": "https://e.com", "events": ["job.lost"]}, {"url": "https://e.com", "x": 1}):
        assert service.http.post("/v1/webhooks", json=body).json()["type"] == "urn:duquant:problem:validation-failed"
    assert [each["id"] for each in service.http.get("/v1/webhooks").json()["items"]] == [webhook["id"]]


def test_another_tenants_webhooks_do_not_exist(service: Any, other_tenant: str) -> None:
    webhook = service.http.post("/v1/webhooks", json={"url": "https://example.com/"}).json()
    delivery = service.http.post(f"/v1/webhooks/{webhook['id']}:test").json()
    token = service.key(*SCOPES, tenant=other_tenant)
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {token}"}, timeout=20) as http:
        path = f"/v1/webhooks/{webhook['id']}"
        for method, where in (
            ("GET", path),
            ("PATCH", path),
            ("DELETE", path),
            ("POST", f"{path}:rotate-secret"),
            ("POST", f"{path}:test"),
            ("GET", f"{path}/deliveries"),
            ("POST", f"{path}/deliveries/{delivery['id']}:redeliver"),
        ):
            answer = http.request(method, where, json={} if method == "PATCH" else None)
            assert (answer.status_code, answer.json()["type"]) == (404, "urn:duquant:problem:webhook-not-found")
        assert http.get("/v1/webhooks").json()["items"] == []
    assert service.http.get(path).json()["enabled"]
