"""Answers kept by Idempotency-Key, so that a request that is sent again is done once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from sqlalchemy import BigInteger, ColumnElement, Connection, Engine, and_, bindparam, delete, select, update
from sqlalchemy.engine import RowMapping

from infra.database import insert_new, now_ms, write
from infra.errors import IdempotencyInProgress, IdempotencyMismatch
from infra.prepared import Prepared
from infra.schema import idempotency_keys

_FINISH = Prepared(
    update(idempotency_keys)
    .where(idempotency_keys.c.tenant_id == bindparam("of_tenant"), idempotency_keys.c.key == bindparam("of_key"))
    .where(idempotency_keys.c.state == "running", idempotency_keys.c.created_at == bindparam("began_at"))
    .values(state="done")
    .returning(idempotency_keys.c.state),
    columns=("state", "status", "headers", "body"),
)
_STALE_MS = 60_000
"""A request that has not been answered for this long died with its server; the next one takes its place."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to work on a request; every write under it checks that nobody took it over."""

    tenant_id: str
    key: str
    began_at: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered the first time."""

    status: int
    headers: Mapping[str, str]
    body: str


class IdempotencyStore:
    """The keys of all tenants; answers are kept for `lifetime_ms`. `clock` replaces the database's clock in tests."""

    def __init__(self, engine: Engine, *, lifetime_ms: int, clock: Callable[[], int] | None = None) -> None:
        self._engine = engine
        self._lifetime_ms = lifetime_ms
        self._clock = clock

    def _now(self) -> ColumnElement[int]:
        if self._clock is not None:
            return bindparam(None, callable_=self._clock, type_=BigInteger, unique=True)
        return now_ms(self._engine.dialect)

    def begin(self, tenant_id: str, key: str, *, route: str, body_hash: str) -> Ticket | Answer:
        """Return the answer that was given before, or a ticket to work one out.

        Raises:
            IdempotencyMismatch: the key was used for another request.
            IdempotencyInProgress: the first request with this key is being worked on.
        """
        values = {"tenant_id": tenant_id, "key": key, "route": route, "body_hash": body_hash, "state": "running"}
        with write(self._engine) as connection:
            row = self._begin.row(connection, values)
            if row is not None:
                return Ticket(tenant_id, key, row["created_at"])
            return self._known(connection, values)

    @cached_property
    def _begin(self) -> Prepared:
        made = insert_new(self._engine.dialect, idempotency_keys).values(created_at=self._now())
        columns = ("tenant_id", "key", "route", "body_hash", "state")
        return Prepared(made.returning(idempotency_keys.c.created_at), columns)

    def _known(self, connection: Connection, values: Mapping[str, str]) -> Ticket | Answer:
        now = self._now()
        is_this = _is(values["tenant_id"], values["key"])
        query = select(idempotency_keys, now.label("now")).where(is_this).with_for_update()
        row = connection.execute(query).mappings().first()
        if row is None:
            raise IdempotencyInProgress("the first request with this key has just ended; try again")
        age = row["now"] - row["created_at"]
        is_stale = row["state"] == "running" and age > _STALE_MS
        if age > self._lifetime_ms or (is_stale and _is_same(row, values)):
            renewed = {"status": None, "headers": None, "body": None, "created_at": now, **values}
            statement = update(idempotency_keys).where(is_this).values(renewed)
            began_at = connection.execute(statement.returning(idempotency_keys.c.created_at)).scalar_one()
            return Ticket(values["tenant_id"], values["key"], began_at)
        if not _is_same(row, values):
            raise IdempotencyMismatch()
        if row["state"] == "running":
            raise IdempotencyInProgress()
        return Answer(status=row["status"], headers=row["headers"], body=row["body"])

    def finish(self, ticket: Ticket, answer: Answer) -> None:
        """Keep the answer; call it in the transaction that does the work, so that both are there or neither is.

        Raises:
            IdempotencyInProgress: another request took this one for dead and works on it; roll the work back.
        """
        values = {
            "of_tenant": ticket.tenant_id,
            "of_key": ticket.key,
            "began_at": ticket.began_at,
            "status": answer.status,
            "headers": dict(answer.headers),
            "body": answer.body,
        }
        with write(self._engine) as connection:
            if _FINISH.row(connection, values) is None:
                raise IdempotencyInProgress("this request took so long that another one with its key was begun")

    def abandon(self, ticket: Ticket) -> None:
        """Free the key: the request failed, and one that is sent again is to be worked on."""
        with write(self._engine) as connection:
            connection.execute(delete(idempotency_keys).where(_is_held(ticket)))

    def purge(self) -> int:
        """Forget the answers that are older than the lifetime; return how many."""
        oldest = self._now() - self._lifetime_ms
        with write(self._engine) as connection:
            return connection.execute(delete(idempotency_keys).where(idempotency_keys.c.created_at < oldest)).rowcount


def _is(tenant_id: str, key: str) -> ColumnElement[bool]:
    return and_(idempotency_keys.c.tenant_id == tenant_id, idempotency_keys.c.key == key)


def _is_held(ticket: Ticket) -> ColumnElement[bool]:
    is_running = and_(idempotency_keys.c.state == "running", idempotency_keys.c.created_at == ticket.began_at)
    return and_(_is(ticket.tenant_id, ticket.key), is_running)


def _is_same(row: RowMapping, values: Mapping[str, str]) -> bool:
    return bool(row["route"] == values["route"] and row["body_hash"] == values["body_hash"])
