"""Batches: many jobs from one request. A batch has no state of its own; it is what its jobs are."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, exists, func, insert, select, tuple_, update

from infra.batch_progress import KNOWN, Tally, tallies
from infra.batch_search import BatchFilter
from infra.database import now_ms, read, take_turns, transaction, write
from infra.errors import BatchNotFound, DependencyFailed, JobConflict, QuotaExceeded
from infra.ids import new_id
from infra.job_changes import queue_deleted
from infra.job_model import ACTIVE, Job, JobState, NewJob, Record
from infra.job_quotas import require_room
from infra.job_rows import state_is
from infra.jobs import JobStore
from infra.schema import batch_items, batches, jobs, queues

_AT_ONCE = 50
"""Jobs that are cancelled or queued again in one transaction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch(Record):
    """A batch as it was asked for."""

    id: str
    tenant_id: str
    name: str
    spec: dict[str, Any]
    created_at: int
    cancelled_at: int | None
    finished_at: int | None
    """When it was noticed that nothing of it waits or runs any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewItem:
    """One piece of work of a batch: a job, or the reason why there is none."""

    model_name: str
    recipe_name: str
    job: NewJob | None = None
    detail: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchItem(Record):
    """One piece of work of a batch."""

    batch_id: str
    idx: int
    model_name: str
    recipe_name: str
    job_id: str | None
    reused: bool
    """Whether its job was there before the batch."""
    detail: str | None
    """Why it has no job."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reused", bool(self.reused))


class BatchStore:
    """Adds, reads and steers batches. Their jobs are the job store's."""

    def __init__(self, engine: Engine, jobs_: JobStore) -> None:
        self._engine = engine
        self._jobs = jobs_

    def add(self, tenant_id: str, name: str, spec: Mapping[str, Any]) -> Batch:
        """Add a batch without items."""
        values = {"id": new_id("batch"), "tenant_id": tenant_id, "name": name, "spec": dict(spec)}
        statement = insert(batches).values(created_at=now_ms(self._engine.dialect), **values).returning(batches)
        with write(self._engine) as connection:
            return Batch.from_row(connection.execute(statement).mappings().one())

    def add_items(
        self, batch: Batch, items: Iterable[NewItem], *, force: bool = False, actor: str
    ) -> Sequence[Job | None]:
        """Add pieces of work behind those that are there; return the job of each: a new one, or one that was there.

        Work that cannot be promised, since a job that does it is being cancelled, has no job, and its item says so.

        Raises:
            InfraError: the job store refuses a job for another reason; nothing is added then.
        """
        rows: list[dict[str, Any]] = []
        made: list[Job | None] = []
        last = select(func.coalesce(func.max(batch_items.c.idx), -1)).where(batch_items.c.batch_id == batch.id)
        with transaction(self._engine), write(self._engine) as connection:
            _take_turns(connection, batch.tenant_id)
            first = connection.execute(last).scalar_one() + 1
            for idx, item in enumerate(items, first):
                job, is_new, detail = None, True, item.detail
                if item.job is not None:
                    new = replace(item.job, batch_id=batch.id)
                    try:
                        job, is_new = self._jobs.enqueue(new, force=force, actor=actor)
                    except JobConflict as error:
                        detail = str(error)
                    except QuotaExceeded as error:
                        # What it counts includes the jobs before, which are not made either.
                        words = f"{error}, after the {len(made)} before it in this batch; nothing was added"
                        raise QuotaExceeded(words, **error.facts) from error
                rows.append(
                    {
                        "batch_id": batch.id,
                        "idx": idx,
                        "model_name": item.model_name,
                        "recipe_name": item.recipe_name,
                        "job_id": None if job is None else job.id,
                        "reused": int(not is_new),
                        "detail": detail,
                    }
                )
                made.append(job)
            if rows:
                connection.execute(insert(batch_items), rows)
        return made

    def get(self, batch_id: str, tenant_id: str) -> Batch:
        """Return one batch.

        Raises:
            BatchNotFound: no such batch, or it is another tenant's.
        """
        with read(self._engine) as connection:
            return self._find(connection, batch_id, tenant_id)

    def _find(self, connection: Connection, batch_id: str, tenant_id: str) -> Batch:
        query = select(batches).where(batches.c.id == batch_id, batches.c.tenant_id == tenant_id)
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise BatchNotFound(f"no batch {batch_id}", batch_id=batch_id)
        return Batch.from_row(row)

    def page(
        self, tenant_id: str, wanted: BatchFilter, *, limit: int, before: tuple[int, str] | None = None
    ) -> Sequence[Batch]:
        """Return a tenant's batches, newest first; `before` is (created_at, id) of the last one on the page before."""
        query = (
            select(batches)
            .where(batches.c.tenant_id == tenant_id, *wanted.conditions())
            .order_by(batches.c.created_at.desc(), batches.c.id.desc())
            .limit(limit)
        )
        if before is not None:
            query = query.where(tuple_(batches.c.created_at, batches.c.id) < tuple_(*before))
        with read(self._engine) as connection:
            return [Batch.from_row(row) for row in connection.execute(query).mappings()]

    def tallies(self, batch_ids: Iterable[str]) -> Mapping[str, Tally]:
        """Return the counts of each of these batches."""
        with read(self._engine) as connection:
            return tallies(connection, batch_ids)

    def reused(self, batch_ids: Iterable[str]) -> Mapping[str, int]:
        """Return how many quantizations of each of these batches were there already."""
        query = (
            select(batch_items.c.batch_id, func.count().label("jobs"))
            .join(jobs, jobs.c.id == batch_items.c.job_id)
            .where(batch_items.c.batch_id.in_(list(batch_ids)), batch_items.c.reused == 1, jobs.c.kind == "quantize")
            .group_by(batch_items.c.batch_id)
        )
        with read(self._engine) as connection:
            return {row.batch_id: row.jobs for row in connection.execute(query)}

    def items(self, batch_id: str) -> Sequence[tuple[BatchItem, Job | None]]:
        """Return a batch's items in order, each with its job."""
        listed = select(batch_items).where(batch_items.c.batch_id == batch_id, KNOWN).order_by(batch_items.c.idx)
        named = select(batch_items.c.job_id).where(batch_items.c.batch_id == batch_id)
        with read(self._engine) as connection:
            items = [BatchItem.from_row(row) for row in connection.execute(listed).mappings()]
            rows = connection.execute(select(jobs).where(jobs.c.id.in_(named))).mappings()
            by_id = {row["id"]: Job.from_row(row) for row in rows}
        return [(item, None if item.job_id is None else by_id.get(item.job_id)) for item in items]

    def cancel(self, batch_id: str, *, tenant_id: str, actor: str) -> Batch:
        """Cancel the jobs that the batch made and that have not ended. What it found there goes on.

        So does what another batch has found here, until that is cancelled, too. A batch of which nothing waits or runs
        stays as it is.

        Some jobs at a time: other writers get their turns in between. One that is cut off is finished by asking again.

        Raises:
            BatchNotFound: no such batch.
        """
        to_cancel = _is_abandoned(batch_id) & state_is(*(each for each in ACTIVE if each is not JobState.CANCELLING))
        with write(self._engine) as connection:
            batch = self._find(connection, batch_id, tenant_id)
            # One that is cancelled already is so anew where jobs of it were tried again, one by one.
            left = _is_part(batch_id) & state_is(*ACTIVE) if batch.cancelled_at is None else to_cancel
            if connection.execute(select(exists().where(left))).scalar_one():
                batch = self._set(connection, batch_id, cancelled_at=now_ms(self._engine.dialect))
        # Evaluations first: they would fail for want of what they wait for.
        query = select(jobs.c.id).where(to_cancel).order_by(jobs.c.kind, jobs.c.id).limit(_AT_ONCE)
        while True:
            with transaction(self._engine), write(self._engine) as connection:
                _take_turns(connection, tenant_id)
                ids = connection.execute(query).scalars().all()
                for job_id in ids:
                    with contextlib.suppress(JobConflict):  # it has ended meanwhile
                        self._jobs.cancel(job_id, tenant_id=tenant_id, actor=actor)
            if len(ids) < _AT_ONCE:
                return batch

    def retry_failed(self, batch_id: str, *, tenant_id: str, actor: str) -> tuple[Batch, int]:
        """Queue the jobs of a batch again that failed or were cancelled; return the batch and how many.

        Work that was refused has no job, and stays refused. Where somebody else has meanwhile submitted the same work,
        the batch takes over that job. Some jobs at a time: other writers get their turns in between, and one that is
        cut off is finished by asking again.

        Raises:
            BatchNotFound: no such batch.
            QueueNotFound: the queue of one of the jobs has been deleted. Nothing is queued then.
            QuotaExceeded: the tenant may not have so many more. Where it gets them meanwhile, some may be queued.
        """
        with read(self._engine) as connection:
            self._find(connection, batch_id, tenant_id)
        # In the order of the items: what an evaluation waits for comes before it.
        ended_badly = [
            (item, job)
            for item, job in self.items(batch_id)
            if job is not None and job.state in (JobState.FAILED, JobState.CANCELLED)
        ]
        with write(self._engine) as connection:
            changes: dict[str, Any] = {"cancelled_at": None}
            if ended_badly:
                _require_queues(connection, (job for _, job in ended_badly))
                require_room(connection, tenant_id, gpus=0, more=len(ended_badly))
                # Also where another job is taken over; one of which nothing waits is noted as finished anew.
                changes["finished_at"] = None
            batch = self._set(connection, batch_id, **changes)
        count = 0
        for start in range(0, len(ended_badly), _AT_ONCE):
            with transaction(self._engine), write(self._engine) as connection:
                _take_turns(connection, tenant_id)
                for item, job in ended_badly[start : start + _AT_ONCE]:
                    count += self._retry(connection, item, job, tenant_id=tenant_id, actor=actor)
        return batch, count

    def _retry(self, connection: Connection, item: BatchItem, job: Job, *, tenant_id: str, actor: str) -> bool:
        # What it waits for is not the batch's, or whoever does its work now is being cancelled.
        with contextlib.suppress(DependencyFailed, JobConflict):
            try:
                self._jobs.retry(job.id, tenant_id=tenant_id, actor=actor)
            except JobConflict:
                self._take_over(connection, item, job, actor)
            return True
        return False

    def _take_over(self, connection: Connection, item: BatchItem, job: Job, actor: str) -> None:
        names = ("tenant_id", "spec", "fingerprint", "priority", "max_attempts", "queue", "model_name", "recipe_name")
        new = NewJob(
            kind="evaluate" if job.kind == "evaluate" else "quantize",
            batch_id=item.batch_id,
            **{name: getattr(job, name) for name in names},
        )
        other, is_new = self._jobs.enqueue(new, actor=actor)
        connection.execute(
            update(batch_items)
            .where(batch_items.c.batch_id == item.batch_id, batch_items.c.idx == item.idx)
            .values(job_id=other.id, reused=int(not is_new))
        )

    def _set(self, connection: Connection, batch_id: str, **values: Any) -> Batch:
        statement = update(batches).where(batches.c.id == batch_id).values(values).returning(batches)
        return Batch.from_row(connection.execute(statement).mappings().one())


def _take_turns(connection: Connection, tenant_id: str) -> None:
    """Let one batch of a tenant at a time add jobs: two that name the same work in another order would deadlock."""
    take_turns(connection, f"batches of {tenant_id}")


def _require_queues(connection: Connection, ended: Iterable[Job]) -> None:
    """Raise QueueNotFound unless all jobs can go back to where they waited."""
    there = set(connection.execute(select(queues.c.name)).scalars())
    if lost := next((job for job in ended if job.queue not in there), None):
        raise queue_deleted(lost)


def _is_abandoned(batch_id: str) -> ColumnElement[bool]:
    """Whether a job is in a batch, was made by one that is cancelled, and is in none that is not."""
    is_left = exists().where(batches.c.id == jobs.c.batch_id, batches.c.cancelled_at.is_not(None)).correlate(jobs)
    is_wanted = (
        exists()
        .where(batch_items.c.job_id == jobs.c.id, batches.c.id == batch_items.c.batch_id)
        .where(batches.c.cancelled_at.is_(None))
        .correlate(jobs)
    )
    return _is_part(batch_id) & is_left & ~is_wanted


def _is_part(batch_id: str) -> ColumnElement[bool]:
    named = select(batch_items.c.job_id).where(batch_items.c.batch_id == batch_id, batch_items.c.job_id.is_not(None))
    return jobs.c.id.in_(named)
