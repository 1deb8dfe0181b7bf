"""The outbox and its sender, on SQLite and on PostgreSQL, against a real receiver."""

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, insert, select
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError
from support.receiver import Receiver, Reply, receiving

from infra import audit
from infra.database import read, write
from infra.errors import QuotaExceeded, WebhookNotFound
from infra.jobs import JobStore
from infra.schema import tenants, webhook_deliveries, webhooks
from infra.webhooks import sender as sending
from infra.webhooks.addresses import AddressPolicy, GuardedTransport
from infra.webhooks.sender import RETRY_SECONDS, WebhookSender
from infra.webhooks.store import MAX_TESTS, MAX_WEBHOOKS, Delivery, Webhook, WebhookStore

PEPPER = SecretStr("pepper")
DAY = 86_400


@pytest.fixture
def hooks(engine: Engine, clock: Any) -> WebhookStore:
    return WebhookStore(engine, PEPPER, clock)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def turn(hooks: WebhookStore, *, networks: tuple[str, ...] = ("127.0.0.0/8",), send_seconds: float = 5) -> int:
    async def send() -> int:
        async with GuardedTransport(AddressPolicy(networks)) as transport:
            return await WebhookSender(hooks, transport, send_seconds=send_seconds).turn()

    return asyncio.run(send())


def only(hooks: WebhookStore, webhook: Webhook) -> Delivery:
    (delivery,) = hooks.deliveries(webhook.id, webhook.tenant_id, limit=10)
    return delivery


def test_every_step_of_a_job_is_told_once_and_signed(
    hooks: WebhookStore, store: JobStore, desk: Any, receiver: Receiver
) -> None:
    _, secret = hooks.create("default", f"{receiver.url}/hook?a=b", [], actor="key:a")
    job = desk.add()
    assert turn(hooks) == 0
    store.complete(desk.claim(), {"artifact": {"manifest_key": "k", "size_bytes": 1, "summary": {}}})
    assert turn(hooks) == 2
    assert turn(hooks) == 0
    messages = {json.loads(message.body)["type"]: message for message in receiver.messages}
    assert messages.keys() == {"job.started", "job.succeeded"}
    message = messages["job.succeeded"]
    assert message.path == "/hook?a=b"
    verified = Verifier(secret.get_secret_value()).verify(message.body, dict(message.headers))
    assert verified["data"]["job_id"] == job.id
    assert verified["data"]["state"] == "succeeded"
    assert verified["timestamp"] == "2023-11-14T22:13:20.000Z"
    assert verified["data"]["finished_at"] == "2023-11-14T22:13:20.000Z"
    with pytest.raises(WebhookVerificationError):
        Verifier(secret.get_secret_value()).verify(message.body.replace("succeeded", "failed"), dict(message.headers))


def test_only_what_was_asked_for_and_only_the_own_tenants_jobs_are_told(
    hooks: WebhookStore, store: JobStore, desk: Any, engine: Engine, receiver: Receiver
) -> None:
    with write(engine) as connection:
        connection.execute(insert(tenants).values(id="other", name="other", created_at=0))
    hooks.create("default", f"{receiver.url}/failed", ["job.failed"], actor="key:a")
    hooks.create("other", f"{receiver.url}/other", [], actor="key:b")
    off, _ = hooks.create("default", f"{receiver.url}/off", [], actor="key:a")
    hooks.change(off.id, "default", actor="key:a", enabled=False)
    desk.add()
    store.fail(desk.claim(), "bad_input", "no")
    turn(hooks)
    assert [(message.path, json.loads(message.body)["type"]) for message in receiver.messages] == [
        ("/failed", "job.failed")
    ]


def test_a_transition_that_is_rolled_back_tells_nothing(hooks: WebhookStore, store: JobStore, desk: Any) -> None:
    webhook, _ = hooks.create("default", "http://127.0.0.1:9/", [], actor="key:a")
    desk.add()
    claim = desk.claim()
    before = len(hooks.deliveries(webhook.id, "default", limit=10))
    store.plan(claim, [0])
    with pytest.raises(Exception, match="cannot succeed"):
        store.complete(claim, {})
    assert len(hooks.deliveries(webhook.id, "default", limit=10)) == before == 1


def test_failures_are_tried_again_with_growing_pauses_and_given_up_at_last(
    hooks: WebhookStore, clock: Any, receiver: Receiver
) -> None:
    webhook, _ = hooks.create("default", receiver.url, [], actor="key:a")
    receiver.reply = Reply(status=500)
    hooks.post_test(webhook.id, "default")
    for attempt, pause in enumerate(RETRY_SECONDS, start=1):
        assert turn(hooks) == 1
        delivery = only(hooks, webhook)
        assert (delivery.state, delivery.attempt, delivery.last_status) == ("pending", attempt, 500)
        assert delivery.last_error == "answered 500"
        assert 0.8 * pause <= (delivery.next_at - clock.now) / 1000 <= 1.2 * pause
        assert turn(hooks) == 0
        clock.advance(1.2 * pause)
    assert turn(hooks) == 1
    assert only(hooks, webhook).state == "failed"
    clock.advance(DAY)
    assert turn(hooks) == 0
    assert len({message.headers["webhook-id"] for message in receiver.messages}) == 1
    assert hooks.get(webhook.id, "default").failing_since == 1_700_000_000_000


def test_a_receiver_can_ask_for_a_longer_pause(hooks: WebhookStore, clock: Any, receiver: Receiver) -> None:
    webhook, _ = hooks.create("default", receiver.url, [], actor="key:a")
    receiver.reply = Reply(status=503, headers=(("Retry-After", "120"),))
    hooks.post_test(webhook.id, "default")
    turn(hooks)
    assert only(hooks, webhook).next_at == clock.now + 120_000


def test_success_ends_the_failing(hooks: WebhookStore, clock: Any, receiver: Receiver) -> None:
    webhook, _ = hooks.create("default", receiver.url, [], actor="key:a")
    receiver.reply = Reply(status=500)
    hooks.post_test(webhook.id, "default")
    turn(hooks)
    receiver.reply = Reply(status=200)
    clock.advance(60)
    turn(hooks)
    delivery = only(hooks, webhook)
    assert (delivery.state, delivery.attempt, delivery.last_status, delivery.last_error) == ("delivered", 2, 200, None)
    assert hooks.get(webhook.id, "default").failing_since is None


def test_a_webhook_that_only_fails_for_days_is_switched_off(
    hooks: WebhookStore, clock: Any, engine: Engine, receiver: Receiver
) -> None:
    webhook, _ = hooks.create("default", receiver.url, [], actor="key:a")
    receiver.reply = Reply(status=500)
    for _ in range(2):
        hooks.post_test(webhook.id, "default")
        turn(hooks)
        clock.advance(2 * DAY)
    assert hooks.get(webhook.id, "default").enabled
    turn(hooks)
    assert not hooks.get(webhook.id, "default").enabled
    assert {each.state for each in hooks.deliveries(webhook.id, "default", limit=10)} == {"failed"}
    (entry,) = audit.entries(engine, tenant_id="default", limit=1)
    assert (entry.action, entry.actor, entry.target) == ("webhook.disabled", "service", webhook.id)
    hooks.change(webhook.id, "default", actor="key:a", enabled=True)
    assert hooks.get(webhook.id, "default").failing_since is None


def test_gone_means_gone(hooks: WebhookStore, receiver: Receiver) -> None:
    webhook, _ = hooks.create("default", receiver.url, [], actor="key:a")
    receiver.reply = Reply(status=410)
    hooks.post_test(webhook.id, "default")
    turn(hooks)
    assert not hooks.get(webhook.id, "default").enabled
    assert only(hooks, webhook).state == "failed"


def test_redirects_slow_and_endless_answers_do_no_harm(hooks: WebhookStore, clock: Any, receiver: Receiver) -> None:
    webhook, _ = hooks.create("default", receiver.url, [], actor="key:a")
    hooks.post_test(webhook.id, "default")
    expected = {
        "redirects are not followed": Reply(status=302, headers=(("Location", f"{receiver.url}/inside"),)),
        "no answer within 0.3 s": Reply(after_s=1.0),
    }
    for error, reply in expected.items():
        receiver.reply = reply
        turn(hooks, send_seconds=0.3 if reply.after_s else 5)
        assert only(hooks, webhook).last_error == error
        clock.advance(DAY)
    receiver.reply = Reply(status=200, endless=True)
    turn(hooks)
    assert only(hooks, webhook).state == "delivered"
    assert {message.path for message in receiver.messages} == {"/"}


def test_nothing_reaches_an_address_that_is_not_public(hooks: WebhookStore, receiver: Receiver) -> None:
    webhook, _ = hooks.create("default", receiver.url, [], actor="key:a")
    hooks.post_test(webhook.id, "default")
    assert turn(hooks, networks=()) == 1
    assert receiver.messages == []
    assert only(hooks, webhook).last_error == "the receiver has no public address"


def test_a_message_whose_sender_died_is_sent_by_another_and_the_dead_one_writes_nothing(
    hooks: WebhookStore, clock: Any, receiver: Receiver
) -> None:
    webhook, _ = hooks.create("default", receiver.url, [], actor="key:a")
    hooks.post_test(webhook.id, "default")
    (zombie,) = hooks.claim(limit=10, lease_seconds=60)
    assert hooks.claim(limit=10, lease_seconds=60) == []
    clock.advance(61)
    (other,) = hooks.claim(limit=10, lease_seconds=60)
    assert other.delivery.id == zombie.delivery.id
    hooks.failed(zombie, status=None, error="late", retry_in_seconds=None, disable_after_seconds=0)
    hooks.delivered(zombie, 200)
    assert (only(hooks, webhook).state, only(hooks, webhook).attempt) == ("pending", 2)
    assert hooks.get(webhook.id, "default").enabled
    hooks.delivered(other, 204)
    assert only(hooks, webhook).state == "delivered"


def test_senders_side_by_side_never_claim_the_same_message(hooks: WebhookStore) -> None:
    made = [hooks.create("default", "http://127.0.0.1:9/", [], actor="key:a")[0] for _ in range(5)]
    sent = [hooks.post_test(each.id, "default").id for each in made for _ in range(8)]
    claimed: list[str] = []

    def claim() -> None:
        while batch := hooks.claim(limit=7, lease_seconds=60):
            claimed.extend(each.delivery.id for each in batch)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(set(claimed))
    while batch := hooks.claim(limit=7, lease_seconds=60):  # a thread may have met only rows that others had locked
        claimed.extend(each.delivery.id for each in batch)
    assert sorted(claimed) == sorted(sent)


def test_one_busy_webhook_does_not_push_the_others_aside(hooks: WebhookStore, clock: Any) -> None:
    busy, _ = hooks.create("default", "http://127.0.0.1:9/", [], actor="key:a")
    quiet, _ = hooks.create("default", "http://127.0.0.1:9/", [], actor="key:a")
    for _ in range(MAX_TESTS):
        hooks.post_test(busy.id, "default")
    with pytest.raises(QuotaExceeded):
        hooks.post_test(busy.id, "default")
    clock.advance(1)
    hooks.post_test(quiet.id, "default")
    first = [each.delivery.webhook_id for each in hooks.claim(limit=MAX_TESTS - 2, lease_seconds=60)]
    assert quiet.id in first
    assert first.count(busy.id) == 4


def test_a_replaced_secret_signs_beside_the_new_one_for_a_day(
    hooks: WebhookStore, clock: Any, receiver: Receiver
) -> None:
    webhook, old = hooks.create("default", receiver.url, [], actor="key:a")
    _, new = hooks.rotate_secret(webhook.id, "default", actor="key:a")
    assert old != new
    hooks.post_test(webhook.id, "default")
    turn(hooks)
    for secret in (old, new):
        Verifier(secret.get_secret_value()).verify(receiver.messages[0].body, dict(receiver.messages[0].headers))
    clock.advance(DAY + 1)
    hooks.post_test(webhook.id, "default")
    turn(hooks)
    Verifier(new.get_secret_value()).verify(receiver.messages[1].body, dict(receiver.messages[1].headers))
    with pytest.raises(WebhookVerificationError):
        Verifier(old.get_secret_value()).verify(receiver.messages[1].body, dict(receiver.messages[1].headers))


def test_the_database_holds_no_secret(hooks: WebhookStore, engine: Engine) -> None:
    webhook, first = hooks.create("default", "https://example.com/", [], actor="key:a")
    _, second = hooks.rotate_secret(webhook.id, "default", actor="key:a")
    with read(engine) as connection:
        stored = str([connection.execute(select(table)).all() for table in (webhooks, webhook_deliveries)])
    stored += str(audit.entries(engine))
    for secret in (first, second):
        assert secret.get_secret_value().removeprefix("whsec_") not in stored
    # The same row under another pepper signs with something else.
    assert WebhookStore(engine, SecretStr("other"))._secret(webhook.id, "x") != hooks._secret(webhook.id, "x")


def test_a_message_can_be_sent_again(hooks: WebhookStore, clock: Any, receiver: Receiver) -> None:
    webhook, _ = hooks.create("default", receiver.url, [], actor="key:a")
    sent = hooks.post_test(webhook.id, "default")
    turn(hooks)
    again = hooks.redeliver(sent.id, webhook.id, "default")
    assert (again.id, again.state, again.attempt) == (sent.id, "pending", 0)
    turn(hooks)
    assert [message.headers["webhook-id"] for message in receiver.messages] == [sent.id, sent.id]
    receiver.reply = Reply(status=500)
    hooks.redeliver(sent.id, webhook.id, "default")
    turn(hooks)
    waiting = hooks.redeliver(sent.id, webhook.id, "default")
    assert (waiting.next_at, waiting.attempt) == (clock.now, 1)


def test_other_tenants_webhooks_and_messages_are_not_there(hooks: WebhookStore) -> None:
    webhook, _ = hooks.create("default", "https://example.com/", [], actor="key:a")
    sent = hooks.post_test(webhook.id, "default")
    second, _ = hooks.create("default", "https://example.com/", [], actor="key:a")
    for attempt in (
        lambda: hooks.get(webhook.id, "other"),
        lambda: hooks.change(webhook.id, "other", actor="x", enabled=False),
        lambda: hooks.rotate_secret(webhook.id, "other", actor="x"),
        lambda: hooks.delete(webhook.id, "other", actor="x"),
        lambda: hooks.post_test(webhook.id, "other"),
        lambda: hooks.deliveries(webhook.id, "other", limit=1),
        lambda: hooks.redeliver(sent.id, webhook.id, "other"),
        lambda: hooks.redeliver(sent.id, second.id, "default"),
    ):
        with pytest.raises(WebhookNotFound):
            attempt()
    assert hooks.get(webhook.id, "default").enabled
    hooks.delete(webhook.id, "default", actor="key:a")
    assert hooks.claim(limit=10, lease_seconds=60) == []


def test_a_tenant_has_so_many_webhooks_and_no_more(hooks: WebhookStore) -> None:
    for _ in range(MAX_WEBHOOKS):
        hooks.create("default", "https://example.com/", [], actor="key:a")
    with pytest.raises(QuotaExceeded):
        hooks.create("default", "https://example.com/", [], actor="key:a")


def test_old_messages_are_forgotten_unless_they_wait(hooks: WebhookStore, clock: Any, receiver: Receiver) -> None:
    webhook, _ = hooks.create("default", receiver.url, [], actor="key:a")
    hooks.post_test(webhook.id, "default")
    turn(hooks)
    hooks.post_test(webhook.id, "default")
    clock.advance(sending.KEEP_S + 1)
    assert hooks.prune(older_than_seconds=sending.KEEP_S) == 1
    assert only(hooks, webhook).state == "pending"
