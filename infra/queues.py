"""Queues: named lines that jobs wait in, which an operator pauses, resumes and bounds."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, Select, case, delete, func, insert, select, update
from sqlalchemy.engine import RowMapping

from infra import audit
from infra.database import now_ms, read, take_turns, write
from infra.errors import QueueChanged, QueueConflict, QueueNotFound, QuotaExceeded
from infra.job_claims import held_gpus
from infra.job_model import HELD, JobState
from infra.job_rows import state_is
from infra.schema import DEFAULT_QUEUE, jobs, queues

MAX_QUEUES = 20
"""Of one server. Every claim looks at each queue for each project."""


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
    busy: int
    """GPU slots that its jobs take, of all tenants: what `max_running` bounds."""
    oldest_wait_ms: int | None
    """How long the job has waited that could have started first."""


class QueueStore:
    """Makes, reads, changes and deletes queues. The default queue is made by a migration and stays."""

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

    def put(self, name: str, *, max_running: int | None, actor: str, exists: bool | None = None) -> bool:
        """Make a queue, or bound one anew; return whether it is new. A bound stops nothing that runs.

        Args:
            name: The queue.
            max_running: GPU slots that its jobs may take at once; none is no bound.
            actor: Who asks.
            exists: Only if it is there already, or only if it is not.

        Raises:
            QueueChanged: it is there and must not be, or the other way round.
            QuotaExceeded: there are as many queues as there may be.
        """
        with write(self._engine) as connection:
            # Two that make queues at once must not both take the last place, or both make the same one.
            take_turns(connection, "queues")
            found = connection.execute(select(queues.c.max_running).where(queues.c.name == name)).one_or_none()
            if exists is not None and exists != (found is not None):
                raise QueueChanged(
                    f"there is {'no' if exists else 'a'} queue {name}{'' if exists else ' already'}", queue=name
                )
            if found is not None and found.max_running == max_running:
                return False
            if found is None:
                _require_room(connection)
                connection.execute(insert(queues).values(name=name, max_running=max_running))
            else:
                connection.execute(update(queues).where(queues.c.name == name).values(max_running=max_running))
            action = "queue.created" if found is None else "queue.changed"
            data = {"max_running": max_running}
            audit.record(connection, tenant_id=None, actor=actor, action=action, target=name, data=data)
            return found is None

    def delete(self, name: str, *, actor: str) -> None:
        """Delete a queue in which nothing waits or runs. Its ended jobs keep its name.

        Raises:
            QueueNotFound: no such queue.
            QueueConflict: a job of it has not ended, or it is the default queue.
        """
        if name == DEFAULT_QUEUE:
            raise QueueConflict(f"the queue {name} is where jobs go that name none; it stays", queue=name)
        with write(self._engine) as connection:
            take_turns(connection, "queues")
            # The lock comes first and the look after it, in a statement of its own: whoever adds a job holds the row
            # until the job is in, so either we see the job or its request finds no queue.
            mine = select(queues.c.name).where(queues.c.name == name).with_for_update()
            if connection.execute(mine).first() is None:
                raise QueueNotFound(f"no queue {name}", queue=name)
            unfinished = select(func.count()).where(jobs.c.queue == name, jobs.c.finished_at.is_(None))
            if count := connection.execute(unfinished).scalar_one():
                words = "1 job that has" if count == 1 else f"{count} jobs that have"
                raise QueueConflict(f"the queue {name} has {words} not ended", queue=name)
            connection.execute(delete(queues).where(queues.c.name == name))
            audit.record(connection, tenant_id=None, actor=actor, action="queue.deleted", target=name)

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
                held_gpus(jobs.c.queue == queues.c.name).label("busy"),
                (now_ms(self._engine.dialect) - func.min(waits_since)).label("oldest_wait_ms"),
            )
            .select_from(queues.outerjoin(jobs, is_open))
            .group_by(queues.c.name, queues.c.paused, queues.c.max_running)
            .order_by(queues.c.name)
        )


def _require_room(connection: Connection) -> None:
    used = connection.execute(select(func.count()).select_from(queues)).scalar_one()
    if used >= MAX_QUEUES:
        words = f"a server has at most {MAX_QUEUES} queues"
        raise QuotaExceeded(words, quota="queues", limit=MAX_QUEUES, used=used, is_final=True)


def _from_row(row: RowMapping) -> Queue:
    return Queue(**{**row, "paused": bool(row["paused"])})
