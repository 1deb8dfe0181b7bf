"""Looking at jobs, and the register of the dispatchers that run them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, case, delete, func, insert, select, tuple_, update

from infra.database import read, write
from infra.errors import JobNotFound
from infra.job_model import Job, JobEvent, JobState, Record, Worker
from infra.job_rows import JobRows, state_is
from infra.prepared import Prepared
from infra.schema import job_events, jobs, tenants, workers

_WORKER_MEMORY_S = 24 * 3600

_is_queued_beside = state_is(JobState.QUEUED) & (jobs.c.queue == bindparam("line"))
FARTHEST_PLACE = 1000
"""How far a job's place in its queue is counted: the exact number of thousands would cost more than it tells."""
_place = select(jobs.c.turn_at).where(jobs.c.id == bindparam("job_id")).correlate(None).scalar_subquery()
_before = (
    select(jobs.c.id)
    .where(jobs.c.tenant_id == bindparam("of_tenant"), _is_queued_beside)
    .where(tuple_(jobs.c.turn_at, jobs.c.id) < tuple_(_place, bindparam("job_id")))
    .limit(FARTHEST_PLACE - 1)
    .subquery()
)
_farthest = (
    select(jobs.c.turn_at)
    .where(jobs.c.tenant_id == bindparam("of_tenant"), _is_queued_beside)
    .order_by(jobs.c.turn_at, jobs.c.id)
    .limit(1)
    .offset(FARTHEST_PLACE - 2)
    .scalar_subquery()
)
# Finding the last job that is counted takes half of what counting takes: in a long queue only the first is done.
_count_before = case(
    (_farthest < _place, FARTHEST_PLACE - 1), else_=select(func.count()).select_from(_before).scalar_subquery()
)
_AHEAD = Prepared(select(_count_before.label("before"), tenants.c.weight).where(tenants.c.id == bindparam("of_tenant")))
"""How many jobs of its own tenant are before a job, and the tenant's weight."""
_of_rival = (
    select(jobs.c.id)
    .where(jobs.c.tenant_id == tenants.c.id, _is_queued_beside)
    .limit(FARTHEST_PLACE - 1)
    .correlate(tenants)
    .subquery()
)
_RIVALS = Prepared(
    select(select(func.count()).select_from(_of_rival).scalar_subquery().label("count"), tenants.c.weight).where(
        tenants.c.id != bindparam("of_tenant"), tenants.c.paused == 0
    )
)
"""How many jobs each other tenant has waiting, as far as they count, and its weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureGroup(Record):
    """Dead letters that failed for the same reason."""

    kind: str
    reason: str
    count: int
    latest_at: int
    latest_job_id: str
    latest_detail: str


class JobReads(JobRows):
    """What the service shows."""

    def get(self, job_id: str, tenant_id: str | None = None) -> Job:
        """Return one job.

        Raises:
            JobNotFound: no such job, or it is another tenant's.
        """
        query = select(jobs).where(jobs.c.id == job_id)
        if tenant_id is not None:
            query = query.where(jobs.c.tenant_id == tenant_id)
        with read(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise JobNotFound(f"no job {job_id}", job_id=job_id)
        return Job.from_row(row)

    def counts(self, tenant_id: str | None = None) -> dict[JobState, int]:
        """Return how many jobs are in each state; states without jobs count zero."""
        query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
        if tenant_id is not None:
            query = query.where(jobs.c.tenant_id == tenant_id)
        with read(self._engine) as connection:
            found = {JobState(state): count for state, count in connection.execute(query)}
        return {state: found.get(state, 0) for state in JobState}

    def queue_position(self, job: Job) -> int | None:
        """Return how many jobs are likely to be claimed before this one; none when it is not queued.

        Exact for the tenant's own jobs, up to `FARTHEST_PLACE - 1` of them. Of the others, those count that get their
        turn by weight meanwhile.
        """
        if job.state is not JobState.QUEUED:
            return None
        values = {"job_id": job.id, "of_tenant": job.tenant_id, "line": job.queue}
        with read(self._engine) as connection:
            own = _AHEAD.rows(connection, values)[0]
            if own["before"] in (0, FARTHEST_PLACE - 1):
                return int(own["before"])
            rivals = _RIVALS.rows(connection, values)
        before, weight = own["before"], own["weight"]
        position: int = before + sum(
            min(rival["count"], math.ceil(before * rival["weight"] / weight)) for rival in rivals
        )
        return min(position, FARTHEST_PLACE - 1)

    def failures(self, tenant_id: str | None = None) -> list[FailureGroup]:
        """Return the dead letters: failed jobs by kind and reason, the most frequent first."""
        newest = func.row_number().over(
            partition_by=(jobs.c.kind, jobs.c.reason), order_by=(jobs.c.finished_at.desc(), jobs.c.id.desc())
        )
        count = func.count().over(partition_by=(jobs.c.kind, jobs.c.reason))
        ranked = select(
            jobs.c.kind,
            jobs.c.reason,
            count.label("count"),
            jobs.c.finished_at.label("latest_at"),
            jobs.c.id.label("latest_job_id"),
            jobs.c.detail.label("latest_detail"),
            newest.label("place"),
        ).where(state_is(JobState.FAILED))
        if tenant_id is not None:
            ranked = ranked.where(jobs.c.tenant_id == tenant_id)
        groups = ranked.subquery()
        query = (
            select(groups).where(groups.c.place == 1).order_by(groups.c.count.desc(), groups.c.reason, groups.c.kind)
        )
        with read(self._engine) as connection:
            return [FailureGroup.from_row(row) for row in connection.execute(query).mappings()]

    def events(self, job_id: str, after: int = 0, limit: int = 500) -> list[JobEvent]:
        """Return a job's events with ids above `after`, oldest first."""
        query = (
            select(job_events)
            .where(job_events.c.job_id == job_id, job_events.c.id > after)
            .order_by(job_events.c.id)
            .limit(limit)
        )
        with read(self._engine) as connection:
            return [JobEvent.from_row(row) for row in connection.execute(query).mappings()]

    def worker_beat(self, owner: str, info: Mapping[str, Any]) -> None:
        """Register a dispatcher, or say that it still lives. Dispatchers silent for a day are forgotten."""
        with write(self._engine) as connection:
            beat = update(workers).where(workers.c.owner == owner).values(beat_at=self._now(), info=dict(info))
            if connection.execute(beat).rowcount == 0:
                connection.execute(
                    insert(workers).values(owner=owner, started_at=self._now(), beat_at=self._now(), info=dict(info))
                )
            connection.execute(delete(workers).where(workers.c.beat_at < self._after(-_WORKER_MEMORY_S)))

    def worker_gone(self, owner: str) -> None:
        """Forget a dispatcher that stops in good order."""
        with write(self._engine) as connection:
            connection.execute(delete(workers).where(workers.c.owner == owner))

    def live_workers(self, within_seconds: float) -> list[Worker]:
        """Return the dispatchers that have beaten lately."""
        query = select(workers).where(workers.c.beat_at >= self._after(-within_seconds)).order_by(workers.c.owner)
        with read(self._engine) as connection:
            return [Worker.from_row(row) for row in connection.execute(query).mappings()]

    def list(
        self,
        tenant_id: str | None,
        *,
        state: JobState | None = None,
        limit: int = 50,
        before: tuple[int, str] | None = None,
    ) -> list[Job]:
        """Return jobs, newest first; `before` is the (created_at, id) of the last job of the previous page."""
        query = select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        if tenant_id is not None:
            query = query.where(jobs.c.tenant_id == tenant_id)
        if state is not None:
            query = query.where(state_is(state))
        if before is not None:
            query = query.where(tuple_(jobs.c.created_at, jobs.c.id) < before)
        with read(self._engine) as connection:
            return [Job.from_row(row) for row in connection.execute(query).mappings()]
