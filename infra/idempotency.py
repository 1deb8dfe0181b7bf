"""Answers kept by Idempotency-Key, so that a request that is sent again is done once.

A key's row, the work and the answer are one transaction: a server that dies leaves none of them, and of two requests at
once the second waits at the row of the first, then finds its answer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from sqlalchemy import BigInteger, ColumnElement, Connection, Engine, bindparam, delete, select, update
from sqlalchemy.engine import RowMapping

from infra.database import insert_new, now_ms, read, write
from infra.errors import IdempotencyMismatch
from infra.prepared import Prepared
from infra.schema import idempotency_keys

_IS_KEY = (idempotency_keys.c.tenant_id == bindparam("of_tenant")) & (idempotency_keys.c.key == bindparam("of_key"))
_KEEP = Prepared(update(idempotency_keys).where(_IS_KEY), columns=("status", "headers", "body"))


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """A request with an Idempotency-Key, and what tells it from another request with the same key."""

    tenant_id: str
    key: str
    route: str
    body_hash: str


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

    def find(self, request: KeyedRequest) -> Answer | None:
        """Return the answer that was given before, if there is one.

        Raises:
            IdempotencyMismatch: the key was used for another request.
        """
        with read(self._engine) as connection:
            row = self._row(connection, request)
        return None if row is None or self._is_over(row) else _answer_to(request, row)

    def take(self, request: KeyedRequest) -> Answer | None:
        """Take the key for this request, or return the answer that was given before.

        Belongs at the start of the transaction that does the work, and `keep` at its end. Another request with the same
        key waits here until that transaction has ended.

        Raises:
            IdempotencyMismatch: the key was used for another request.
        """
        values = {name: getattr(request, name) for name in ("tenant_id", "key", "route", "body_hash")}
        with write(self._engine, savepoint=False) as connection:
            while self._take.row(connection, values) is None:
                row = self._row(connection, request)
                if row is None:  # forgotten since
                    continue
                if not self._is_over(row):
                    return _answer_to(request, row)
                # Only what was seen: another request may have put a fresh row in its place meanwhile.
                seen = idempotency_keys.c.created_at == row["created_at"]
                connection.execute(delete(idempotency_keys).where(_IS_KEY, seen), _name(request))
        return None

    @cached_property
    def _take(self) -> Prepared:
        made = insert_new(self._engine.dialect, idempotency_keys).values(created_at=self._now())
        return Prepared(
            made.returning(idempotency_keys.c.created_at), columns=("tenant_id", "key", "route", "body_hash")
        )

    def _row(self, connection: Connection, request: KeyedRequest) -> RowMapping | None:
        query = select(idempotency_keys, self._now().label("now")).where(_IS_KEY)
        return connection.execute(query, _name(request)).mappings().first()

    def _is_over(self, row: RowMapping) -> bool:
        return bool(row["now"] - row["created_at"] > self._lifetime_ms)

    def keep(self, request: KeyedRequest, answer: Answer) -> None:
        """Keep the answer, in the transaction that took the key."""
        values = {"status": answer.status, "headers": dict(answer.headers), "body": answer.body}
        with write(self._engine, savepoint=False) as connection:
            _KEEP.run(connection, {**_name(request), **values})

    def purge(self) -> int:
        """Forget the answers that are older than the lifetime; return how many."""
        oldest = self._now() - self._lifetime_ms
        with write(self._engine) as connection:
            return connection.execute(delete(idempotency_keys).where(idempotency_keys.c.created_at < oldest)).rowcount


def _name(request: KeyedRequest) -> dict[str, str]:
    return {"of_tenant": request.tenant_id, "of_key": request.key}


def _answer_to(request: KeyedRequest, row: RowMapping) -> Answer:
    if (row["route"], row["body_hash"]) != (request.route, request.body_hash):
        raise IdempotencyMismatch()
    return Answer(status=row["status"], headers=row["headers"], body=row["body"])
