"""Notices that batches have ended, and puts what webhooks shall say of it into the outbox.

A batch has no state that a job's end could move: its jobs end in any process, two of them at the same moment, and
whoever counted at the end of each would have to lock the batch against the others. So this looks now and then instead.
Any process may call it at any time, several at once too: a batch is told of once.
"""

from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Engine, exists, select, update

from infra.batch_progress import progress_of, tallies
from infra.database import now_ms, read, write
from infra.outbox import BATCH_FINISHED, post
from infra.schema import batch_items, batches, jobs

_AT_ONCE = 100

_is_open = (
    exists()
    .where(batch_items.c.batch_id == batches.c.id, jobs.c.id == batch_items.c.job_id, jobs.c.finished_at.is_(None))
    .correlate(batches)
)
_ended = select(batches).where(batches.c.finished_at.is_(None), ~_is_open)


def note_finished_batches(engine: Engine) -> int:
    """Note the batches of which nothing waits or runs any more; return how many that were."""
    with read(engine) as connection:
        ids = connection.execute(_ended.with_only_columns(batches.c.id).limit(_AT_ONCE)).scalars().all()
    return sum(note_if_finished(engine, batch_id) for batch_id in ids)


def note_if_finished(engine: Engine, batch_id: str) -> bool:
    """Note a batch of which nothing waits or runs any more; return whether it was one, and not noted yet."""
    with write(engine) as connection:
        # The lock comes first and the look after it, in a statement of its own: it sees a retry that was in between.
        mine = select(batches.c.id).where(batches.c.id == batch_id).with_for_update(skip_locked=True)
        if connection.execute(mine).first() is None:
            return False
        row = connection.execute(_ended.where(batches.c.id == batch_id)).mappings().first()
        if row is None:
            return False
        now = now_ms(engine.dialect)
        noted = update(batches).where(batches.c.id == batch_id).values(finished_at=now).returning(batches)
        batch = dict(connection.execute(noted).mappings().one())
        post(connection, batch["tenant_id"], BATCH_FINISHED, _facts(connection, batch), now)
        return True


def _facts(connection: Connection, batch: dict[str, Any]) -> dict[str, Any]:
    progress = progress_of(tallies(connection, [batch["id"]]).get(batch["id"], {}))
    return {
        "batch_id": batch["id"],
        "name": batch["name"],
        "state": progress.state,
        "jobs": asdict(progress.jobs),
        "evaluations": asdict(progress.evaluations),
        "created_at": batch["created_at"],
        "finished_at": batch["finished_at"],
    }


def reopen_batches_of(connection: Connection, job_id: str) -> None:
    """Note that a job that had ended waits again, and with it every batch that it is a part of."""
    named = select(batch_items.c.batch_id).where(batch_items.c.job_id == job_id)
    connection.execute(update(batches).where(batches.c.id.in_(named)).values(finished_at=None))
