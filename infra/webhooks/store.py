"""Webhooks and the messages to them: what is to be sent, who is sending it, how it went.

The rows of the outbox are written by `infra.outbox`, in the transaction of what they tell. Any number of processes may
send: a claim raises the message's attempt and puts its next one a lease ahead: a sender that dies is made up for, one
that was thought dead writes nothing, and a receiver may get a message twice, with the same `webhook-id`.
"""

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from pydantic import SecretStr
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    RowMapping,
    case,
    delete,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)

from infra import audit
from infra.database import now_ms, read, take_turns, write
from infra.errors import QuotaExceeded, WebhookNotFound
from infra.ids import new_id
from infra.schema import webhook_deliveries as deliveries
from infra.schema import webhooks

TEST_EVENT = "webhook.test"

MAX_WEBHOOKS = 20
"""Webhooks of one tenant."""
MAX_TESTS = 10
"""Test messages to one webhook that may wait."""
SECRET_OVERLAP_S = 24 * 3600
"""How long a replaced secret signs beside the new one."""

_SAME_TIME = 4
"""Messages to one webhook that are claimed at once: a slow receiver must not hold up the others."""
_DISABLED = "the webhook is switched off"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    @classmethod
    def from_row(cls, row: RowMapping) -> Self:
        """Build the record from a database row; columns that it does not know are left out."""
        return cls(**{item.name: row[item.name] for item in fields(cls)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook(_Record):
    """Where a tenant wants to be told what."""

    id: str
    tenant_id: str
    url: str
    events: list[str]
    """Event types; an empty list is all."""
    enabled: bool
    failing_since: int | None
    """When the first of the attempts that failed since the last success did."""
    created_at: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "enabled", bool(self.enabled))


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery(_Record):
    """One message to one webhook."""

    id: str
    webhook_id: str
    job_id: str | None
    event: str
    state: str
    """pending, delivered or failed."""
    attempt: int
    next_at: int
    last_status: int | None
    last_error: str | None
    created_at: int
    finished_at: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outgoing:
    """A claimed message, with all that sending it takes."""

    delivery: Delivery
    url: str
    payload: dict[str, Any]
    signing_secrets: tuple[SecretStr, ...]


class WebhookStore:
    """The webhooks of all tenants. `clock` replaces the database's clock in tests."""

    def __init__(self, engine: Engine, pepper: SecretStr, clock: Callable[[], int] | None = None) -> None:
        self._engine = engine
        # The pepper also hashes API keys; a key of its own keeps one use from ever standing in for the other.
        self._key = hmac.digest(pepper.get_secret_value().encode(), b"duquant webhook secrets v1", hashlib.sha256)
        self._clock = clock

    def _now(self) -> ColumnElement[int]:
        return now_ms(self._engine.dialect) if self._clock is None else literal(self._clock())

    # --- what tenants do ---------------------------------------------------------------------------------------------

    def create(self, tenant_id: str, url: str, events: Sequence[str], *, actor: str) -> tuple[Webhook, SecretStr]:
        """Make a webhook; return it with the secret that its messages are signed with.

        Raises:
            QuotaExceeded: the tenant has as many as it may have.
        """
        webhook_id, salt = new_id("wh"), _new_salt()
        values = {"id": webhook_id, "tenant_id": tenant_id, "url": url, "events": list(events), "secret": _stored(salt)}
        with write(self._engine) as connection:
            take_turns(connection, f"webhooks of {tenant_id}")
            used = connection.execute(select(func.count()).where(webhooks.c.tenant_id == tenant_id)).scalar_one()
            if used >= MAX_WEBHOOKS:
                raise QuotaExceeded(
                    f"a project has at most {MAX_WEBHOOKS} webhooks", quota="webhooks", limit=MAX_WEBHOOKS, used=used
                )
            statement = insert(webhooks).values(enabled=1, created_at=self._now(), **values).returning(webhooks)
            webhook = Webhook.from_row(connection.execute(statement).mappings().one())
            self._audit(connection, webhook, actor, "webhook.created", {"url": url, "events": list(events)})
        return webhook, self._secret(webhook_id, salt)

    def get(self, webhook_id: str, tenant_id: str) -> Webhook:
        """Return one webhook.

        Raises:
            WebhookNotFound: no such webhook, or it is another tenant's.
        """
        with read(self._engine) as connection:
            return Webhook.from_row(_one(connection, webhook_id, tenant_id))

    def page(self, tenant_id: str, *, limit: int, before: tuple[int, str] | None = None) -> Sequence[Webhook]:
        """Return a tenant's webhooks, newest first; `before` is (created_at, id) of the last on the page before."""
        query = select(webhooks).where(webhooks.c.tenant_id == tenant_id)
        if before is not None:
            query = query.where(tuple_(webhooks.c.created_at, webhooks.c.id) < tuple_(*before))
        query = query.order_by(webhooks.c.created_at.desc(), webhooks.c.id.desc()).limit(limit)
        with read(self._engine) as connection:
            return [Webhook.from_row(row) for row in connection.execute(query).mappings()]

    def change(
        self,
        webhook_id: str,
        tenant_id: str,
        *,
        actor: str,
        url: str | None = None,
        events: Sequence[str] | None = None,
        enabled: bool | None = None,
    ) -> Webhook:
        """Change what is given. Switching it off gives up what is waiting; switching it on forgives its failures.

        Raises:
            WebhookNotFound: no such webhook, or it is another tenant's.
        """
        given = {"url": url, "events": None if events is None else list(events), "enabled": enabled}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        with write(self._engine) as connection:
            before = Webhook.from_row(_one(connection, webhook_id, tenant_id))
            if not changes:
                return before
            self._audit(connection, before, actor, "webhook.changed", changes)
            if enabled:
                changes["failing_since"] = None
            if enabled is False:
                self._give_up(connection, webhook_id)
            columns = {**changes, **({} if enabled is None else {"enabled": int(enabled)})}
            statement = update(webhooks).where(webhooks.c.id == webhook_id).values(columns).returning(webhooks)
            return Webhook.from_row(connection.execute(statement).mappings().one())

    def rotate_secret(self, webhook_id: str, tenant_id: str, *, actor: str) -> tuple[Webhook, SecretStr]:
        """Give a webhook another secret; for a day its messages carry the signatures of both.

        Raises:
            WebhookNotFound: no such webhook, or it is another tenant's.
        """
        salt = _new_salt()
        with write(self._engine) as connection:
            row = _one(connection, webhook_id, tenant_id)
            now: int = connection.execute(select(self._now())).scalar_one()
            old = json.loads(row["secret"])["salt"]
            stored = _stored(salt, before={"salt": old, "until": now + SECRET_OVERLAP_S * 1000})
            connection.execute(update(webhooks).where(webhooks.c.id == webhook_id).values(secret=stored))
            webhook = Webhook.from_row(row)
            self._audit(connection, webhook, actor, "webhook.secret_rotated", {})
        return webhook, self._secret(webhook_id, salt)

    def delete(self, webhook_id: str, tenant_id: str, *, actor: str) -> None:
        """Delete a webhook with its messages.

        Raises:
            WebhookNotFound: no such webhook, or it is another tenant's.
        """
        with write(self._engine) as connection:
            webhook = Webhook.from_row(_one(connection, webhook_id, tenant_id))
            connection.execute(delete(webhooks).where(webhooks.c.id == webhook_id))
            self._audit(connection, webhook, actor, "webhook.deleted", {"url": webhook.url})

    def post_test(self, webhook_id: str, tenant_id: str) -> Delivery:
        """Put a message into the outbox that only says that messages arrive.

        Raises:
            WebhookNotFound: no such webhook, or it is another tenant's.
            QuotaExceeded: as many tests wait as may: nobody is to be flooded with them.
        """
        waiting = select(func.count()).where(
            deliveries.c.webhook_id == webhook_id, deliveries.c.event == TEST_EVENT, deliveries.c.state == "pending"
        )
        payload = {"type": TEST_EVENT, "data": {"webhook_id": webhook_id}}
        with write(self._engine) as connection:
            _one(connection, webhook_id, tenant_id)
            if (used := connection.execute(waiting).scalar_one()) >= MAX_TESTS:
                raise QuotaExceeded(f"{used} test messages wait to be sent", quota="tests", limit=MAX_TESTS, used=used)
            statement = insert(deliveries).values(
                id=new_id("msg"),
                webhook_id=webhook_id,
                event=TEST_EVENT,
                payload=payload,
                state="pending",
                attempt=0,
                next_at=self._now(),
                created_at=self._now(),
            )
            return Delivery.from_row(connection.execute(statement.returning(deliveries)).mappings().one())

    def deliveries(
        self, webhook_id: str, tenant_id: str, *, limit: int, before: tuple[int, str] | None = None
    ) -> Sequence[Delivery]:
        """Return the messages to a webhook, newest first.

        Raises:
            WebhookNotFound: no such webhook, or it is another tenant's.
        """
        query = select(deliveries).where(deliveries.c.webhook_id == webhook_id)
        if before is not None:
            query = query.where(tuple_(deliveries.c.created_at, deliveries.c.id) < tuple_(*before))
        query = query.order_by(deliveries.c.created_at.desc(), deliveries.c.id.desc()).limit(limit)
        with read(self._engine) as connection:
            _one(connection, webhook_id, tenant_id)
            return [Delivery.from_row(row) for row in connection.execute(query).mappings()]

    def redeliver(self, delivery_id: str, webhook_id: str, tenant_id: str) -> Delivery:
        """Send a message again, whatever came of it, with the same `webhook-id`. One that waits is sent at once.

        Raises:
            WebhookNotFound: no such webhook or message, or it is another tenant's.
        """
        statement = (
            update(deliveries)
            .where(deliveries.c.id == delivery_id, deliveries.c.webhook_id == webhook_id)
            .values(
                state="pending",
                attempt=case((deliveries.c.state == "pending", deliveries.c.attempt), else_=0),
                next_at=self._now(),
                finished_at=None,
            )
            .returning(deliveries)
        )
        with write(self._engine) as connection:
            _one(connection, webhook_id, tenant_id)
            row = connection.execute(statement).mappings().first()
        if row is None:
            raise WebhookNotFound(f"no delivery {delivery_id}", delivery_id=delivery_id)
        return Delivery.from_row(row)

    # --- what senders do ---------------------------------------------------------------------------------------------

    def claim(self, *, limit: int, lease_seconds: float) -> list[Outgoing]:
        """Take messages whose time has come, the longest due first, and few of each webhook."""
        order = (deliveries.c.next_at, deliveries.c.id)
        place = func.row_number().over(partition_by=deliveries.c.webhook_id, order_by=order)
        due = (
            select(deliveries.c.id, place.label("place"))
            .join(webhooks, webhooks.c.id == deliveries.c.webhook_id)
            .where(deliveries.c.state == "pending", deliveries.c.next_at <= self._now(), webhooks.c.enabled == 1)
            .subquery()
        )
        query = (
            select(deliveries.c.id)
            .where(deliveries.c.id.in_(select(due.c.id).where(due.c.place <= _SAME_TIME)))
            .where(deliveries.c.state == "pending", deliveries.c.next_at <= self._now())
            .order_by(*order)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with write(self._engine) as connection:
            ids = connection.execute(query).scalars().all()
            if not ids:
                return []
            taken = (
                update(deliveries)
                .where(deliveries.c.id.in_(ids))
                .values(attempt=deliveries.c.attempt + 1, next_at=self._now() + round(lease_seconds * 1000))
                .returning(deliveries)
            )
            rows = connection.execute(taken).mappings().all()
            receivers = {
                row["id"]: row
                for row in connection.execute(
                    select(webhooks, self._now().label("now")).where(
                        webhooks.c.id.in_({row["webhook_id"] for row in rows})
                    )
                ).mappings()
            }
        return [self._outgoing(row, receivers[row["webhook_id"]]) for row in rows]

    def delivered(self, outgoing: Outgoing, status: int) -> None:
        """Note that a message arrived."""
        with write(self._engine) as connection:
            if not self._settle(
                connection, outgoing, state="delivered", last_status=status, last_error=None, finished_at=self._now()
            ):
                return
            connection.execute(
                update(webhooks)
                .where(webhooks.c.id == outgoing.delivery.webhook_id, webhooks.c.failing_since.is_not(None))
                .values(failing_since=None)
            )

    def failed(
        self,
        outgoing: Outgoing,
        *,
        status: int | None,
        error: str,
        retry_in_seconds: float | None,
        disable_after_seconds: float,
    ) -> bool:
        """Note that an attempt failed; return whether the webhook was switched off.

        Args:
            outgoing: What was sent.
            status: What the receiver answered, if it did.
            error: Why it counts as a failure.
            retry_in_seconds: When to try again; none gives the message up.
            disable_after_seconds: Failing for so long, without one success, switches the webhook off.
        """
        webhook_id = outgoing.delivery.webhook_id
        facts: dict[str, Any] = {"last_status": status, "last_error": error[:300]}
        if retry_in_seconds is None:
            facts |= {"state": "failed", "finished_at": self._now()}
        else:
            facts |= {"next_at": self._now() + round(retry_in_seconds * 1000)}
        with write(self._engine) as connection:
            if not self._settle(connection, outgoing, **facts):
                return False
            row = (
                connection.execute(
                    update(webhooks)
                    .where(webhooks.c.id == webhook_id)
                    .values(failing_since=func.coalesce(webhooks.c.failing_since, self._now()))
                    .returning(webhooks, self._now().label("now"))
                )
                .mappings()
                .one()
            )
            if not row["enabled"] or row["now"] - row["failing_since"] < disable_after_seconds * 1000:
                return False
            connection.execute(update(webhooks).where(webhooks.c.id == webhook_id).values(enabled=0))
            self._give_up(connection, webhook_id)
            data = {"failing_since": row["failing_since"], "error": error[:300]}
            self._audit(connection, Webhook.from_row(row), "service", "webhook.disabled", data)
            return True

    def prune(self, *, older_than_seconds: float) -> int:
        """Forget messages that ended long ago; return how many."""
        oldest = self._now() - round(older_than_seconds * 1000)
        statement = delete(deliveries).where(deliveries.c.state != "pending", deliveries.c.created_at < oldest)
        with write(self._engine) as connection:
            return connection.execute(statement).rowcount

    def _settle(self, connection: Connection, outgoing: Outgoing, **values: Any) -> bool:
        """Write how an attempt went, unless the message was claimed again, given up or asked for anew meanwhile."""
        statement = (
            update(deliveries)
            .where(deliveries.c.id == outgoing.delivery.id, deliveries.c.state == "pending")
            .where(deliveries.c.attempt == outgoing.delivery.attempt)
            .values(values)
        )
        return connection.execute(statement).rowcount > 0

    def _give_up(self, connection: Connection, webhook_id: str) -> None:
        connection.execute(
            update(deliveries)
            .where(deliveries.c.webhook_id == webhook_id, deliveries.c.state == "pending")
            .values(state="failed", last_error=_DISABLED, finished_at=self._now())
        )

    def _outgoing(self, row: RowMapping, receiver: RowMapping) -> Outgoing:
        facts = json.loads(receiver["secret"])
        salts = [facts["salt"]]
        if (before := facts.get("before")) is not None and before["until"] > receiver["now"]:
            salts.append(before["salt"])
        return Outgoing(
            delivery=Delivery.from_row(row),
            url=receiver["url"],
            payload=row["payload"],
            signing_secrets=tuple(self._secret(receiver["id"], salt) for salt in salts),
        )

    def _secret(self, webhook_id: str, salt: str) -> SecretStr:
        digest = hmac.digest(self._key, f"{webhook_id}.{salt}".encode(), hashlib.sha256)
        return SecretStr("whsec_" + base64.b64encode(digest).decode())

    def _audit(self, connection: Connection, webhook: Webhook, actor: str, action: str, data: dict[str, Any]) -> None:
        audit.record(connection, tenant_id=webhook.tenant_id, actor=actor, action=action, target=webhook.id, data=data)


def _one(connection: Connection, webhook_id: str, tenant_id: str) -> RowMapping:
    query = select(webhooks).where(webhooks.c.id == webhook_id, webhooks.c.tenant_id == tenant_id)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise WebhookNotFound(f"no webhook {webhook_id}", webhook_id=webhook_id)
    return row


def _new_salt() -> str:
    return secrets.token_hex(16)


def _stored(salt: str, before: dict[str, Any] | None = None) -> str:
    """What the database holds: what the secret is derived from, worth nothing without the pepper."""
    return json.dumps({"salt": salt, "before": before})
