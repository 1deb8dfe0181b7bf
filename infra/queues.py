"""Queues: named lines that jobs wait in, which an operator pauses, resumes and bounds."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, Select, case, func, select, update
from sqlalchemy.engine import RowMapping

from infra import audit
from infra.database import now_ms, read, write
from infra.errors import QueueNotFound
from infra.job_model import HELD, JobState
from infra.job_rows import state_is
from infra.schema import jobs, queues


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """A queue and what stands in it, of all tenants or of one."""

    name: str
    paused: bool
    """Whether its jobs wait whatever is free. What runs goes on."""
    max_running: int | None
    """GPU slots that its jobs may take at once."""
    waiting: int
    """Jobs whose turn may come any time."""
    running: int
    oldest_wait_ms: int | None
    """How long the job has waited that could have started first."""


class QueueStore:
    """Reads and changes queues. They are made by migrations, never by requests."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def list(self, tenant_id: str | None = None) -> Sequence[Queue]:
        """Return every queue by name, with the jobs of one tenant or of all."""
        with read(self._engine) as connection:
            return [_from_row(row) for row in connection.execute(self._query(tenant_id)).mappings()]

    def get(self, name: str, tenant_id: str | None = None) -> Queue:
        """Return one queue.

        Raises:
            QueueNotFound: no such queue.
        """
        with read(self._engine) as connection:
            row = connection.execute(self._query(tenant_id).where(queues.c.name == name)).mappings().first()
        if row is None:
            raise QueueNotFound(f"no queue {name}", queue=name)
        return _from_row(row)

    def pause(self, name: str, *, actor: str) -> None:
        """Start no more of a queue's jobs; what runs goes on. Doing it twice is the same as once.

        Raises:
            QueueNotFound: no such queue.
        """
        self._set_paused(name, True, actor)

    def resume(self, name: str, *, actor: str) -> None:
        """Start a queue's jobs again.

        Raises:
            QueueNotFound: no such queue.
        """
        self._set_paused(name, False, actor)

    def _set_paused(self, name: str, paused: bool, actor: str) -> None:
        statement = update(queues).where(queues.c.name == name, queues.c.paused != int(paused))
        with write(self._engine) as connection:
            if connection.execute(select(queues.c.name).where(queues.c.name == name)).first() is None:
                raise QueueNotFound(f"no queue {name}", queue=name)
            if connection.execute(statement.values(paused=int(paused))).rowcount:
                action = "queue.paused" if paused else "queue.resumed"
                audit.record(connection, tenant_id=None, actor=actor, action=action, target=name)

    def _query(self, tenant_id: str | None) -> Select[tuple[object, ...]]:
        is_waiting = state_is(JobState.QUEUED)
        waits_since = case((is_waiting, jobs.c.run_at))
        # finished_at says the same as the states, and is what the partial index is about.
        is_open = (jobs.c.queue == queues.c.name) & jobs.c.finished_at.is_(None)
        if tenant_id is not None:
            is_open &= jobs.c.tenant_id == tenant_id
        return (
            select(
                queues.c.name,
                queues.c.paused,
                queues.c.max_running,
                func.count(case((is_waiting, 1))).label("waiting"),
                func.count(case((state_is(*HELD), 1))).label("running"),
                (now_ms(self._engine.dialect) - func.min(waits_since)).label("oldest_wait_ms"),
            )
            .select_from(queues.outerjoin(jobs, is_open))
            .group_by(queues.c.name, queues.c.paused, queues.c.max_running)
            .order_by(queues.c.name)
        )


def _from_row(row: RowMapping) -> Queue:
    return Queue(**{**row, "paused": bool(row["paused"])})
