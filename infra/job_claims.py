"""Which job is next, and the lease of whoever works on it.

Between tenants the weight decides, by start-time fair queueing: a claim starts at the tenant's virtual time or at the
start of the latest claim of all, whichever is later, and the tenant that would start first is served. GPU time that it
uses, divided by its weight, moves its virtual time on. A tenant that was away gets no credit for it.
Among the jobs of one tenant priority decides, with ageing (`job_model.turn_at`).

Reference: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, case, exists, func, or_, select, true, update

from infra.database import write
from infra.job_model import HELD, Claim, EventType, Job, JobKind, JobState, StopReason
from infra.job_rows import SWEEPER, JobRows, state_is
from infra.outbox import post_job_event
from infra.schema import jobs, queues, tenants

NOMINAL_GPU_SECONDS = 1.0
"""What a claim costs before any layer is done, so that claims at the same moment go to different tenants."""


class JobClaims(JobRows):
    """The way from the queue to a worker, and the worker's signs of life."""

    def claim(
        self, owner: str, *, lease_seconds: float, kinds: Sequence[JobKind] = ("quantize", "evaluate")
    ) -> Claim | None:
        """Take the next job that its tenant and its queue let run. None when there is none.

        Jobs of paused tenants and queues wait, and so do those for which their tenant's or queue's running slots do not
        suffice; smaller ones behind them go ahead.
        """
        with write(self._engine) as connection:
            if self._begin_claim(connection):
                self._promote(connection)
            while (choice := connection.execute(self._next(kinds)).one_or_none()) is not None:
                job = self._take(connection, choice.id, owner, lease_seconds)
                if job is None:  # cancelled or put off while we looked
                    continue
                self._charge(connection, job, choice.start)
                return Claim(job=job, fence=job.fence, owner=owner)
        return None

    def _begin_claim(self, connection: Connection) -> bool:
        """Wait for other claims to commit; return whether scheduled jobs are due.

        Claims go one after the other, since they share budgets: two at once could both take a tenant's last slot.
        """
        is_due = exists().where(state_is(JobState.SCHEDULED), jobs.c.run_at <= self._now())
        gate = select(queues.c.name, is_due.label("is_due")).order_by(queues.c.name)
        rows = connection.execute(gate.with_for_update(key_share=True, of=queues)).all()
        return any(row.is_due for row in rows)

    def _next(self, kinds: Sequence[str]) -> Select[Any]:
        """Return the query for the next job's id and the virtual time at which its tenant starts it."""
        held_by_tenant = _held_gpus(jobs.c.tenant_id)
        held_by_queue = _held_gpus(jobs.c.queue)
        tenant_room = tenants.c.max_running - func.coalesce(held_by_tenant.c.gpus, 0)
        queue_room = queues.c.max_running - func.coalesce(held_by_queue.c.gpus, 0)
        latest_start = select(func.max(tenants.c.vstart)).scalar_subquery()
        waiting = jobs.alias("waiting")
        first = (
            select(waiting.c.id)
            .where(waiting.c.tenant_id == tenants.c.id, waiting.c.queue == queues.c.name)
            .where(state_is(JobState.QUEUED, of=waiting), waiting.c.kind.in_(kinds))
            .where(or_(waiting.c.deadline_at.is_(None), waiting.c.deadline_at > self._now()))
            .where(or_(tenant_room.is_(None), waiting.c.gpus <= tenant_room))
            .where(or_(queue_room.is_(None), waiting.c.gpus <= queue_room))
            .order_by(waiting.c.turn_at, waiting.c.id)
            .limit(1)
            .scalar_subquery()
        )
        heads = (
            select(
                first.label("job_id"),
                case((tenants.c.vtime > latest_start, tenants.c.vtime), else_=latest_start).label("start"),
            )
            .select_from(
                tenants.join(queues, true())
                .outerjoin(held_by_tenant, held_by_tenant.c.owner == tenants.c.id)
                .outerjoin(held_by_queue, held_by_queue.c.owner == queues.c.name)
            )
            .where(tenants.c.paused == 0, queues.c.paused == 0)
            # A full tenant must not cost a walk through all that it has waiting.
            .where(or_(tenant_room.is_(None), tenant_room >= 1), or_(queue_room.is_(None), queue_room >= 1))
            .subquery("heads")
        )
        return (
            select(jobs.c.id, heads.c.start)
            .join(heads, heads.c.job_id == jobs.c.id)
            .order_by(heads.c.start, jobs.c.turn_at, jobs.c.id)
            .limit(1)
        )

    def _take(self, connection: Connection, job_id: str, owner: str, lease_seconds: float) -> Job | None:
        statement = (
            update(jobs)
            .where(jobs.c.id == job_id, state_is(JobState.QUEUED))
            .values(
                state=JobState.RUNNING,
                version=jobs.c.version + 1,
                fence=jobs.c.fence + 1,
                attempt=jobs.c.attempt + 1,
                lease_owner=owner,
                lease_until=self._after(lease_seconds),
                started_at=func.coalesce(jobs.c.started_at, self._now()),
                reason=None,
                detail=None,
            )
            .returning(jobs)
        )
        row = connection.execute(statement).mappings().one_or_none()
        if row is None:
            return None
        job = Job.from_row(row)
        data = {"from": JobState.QUEUED, "to": job.state, "fence": job.fence, "attempt": job.attempt}
        self._event(connection, job.id, EventType.CLAIMED, owner, data)
        post_job_event(connection, job, self._now())
        return job

    def _charge(self, connection: Connection, job: Job, start: float) -> None:
        cost = job.gpus * NOMINAL_GPU_SECONDS / tenants.c.weight
        connection.execute(
            update(tenants).where(tenants.c.id == job.tenant_id).values(vstart=start, vtime=start + cost)
        )

    def _promote(self, connection: Connection) -> None:
        """Queue the scheduled jobs whose time has come."""
        due = select(jobs).where(state_is(JobState.SCHEDULED), jobs.c.run_at <= self._now()).order_by(jobs.c.run_at)
        for row in self._locked(connection, due, skip_locked=True):
            self._transition(connection, Job.from_row(row), JobState.QUEUED, EventType.PROMOTED, actor=SWEEPER)

    def heartbeat(self, claim: Claim, *, lease_seconds: float) -> StopReason | None:
        """Extend the lease; return why the worker should stop, if it should.

        Raises:
            LeaseLost: the claim is stale, or its lease has already expired: an expired lease is never renewed.
        """
        with write(self._engine) as connection:
            # The version stays: readers see no difference.
            job = self._held(connection, claim, lease_until=self._after(lease_seconds), version=jobs.c.version)
            if job.state is JobState.CANCELLING:
                return "cancel"
            return "deadline" if self._is_overdue(connection, job) else None

    def _is_overdue(self, connection: Connection, job: Job) -> bool:
        return job.deadline_at is not None and job.deadline_at <= connection.execute(select(self._now())).scalar_one()

    def progress(self, claim: Claim, *, phase: str, done: int, total: int) -> None:
        """Say how far the job is.

        Raises:
            LeaseLost: the claim is stale.
        """
        with write(self._engine) as connection:
            self._held(connection, claim, phase=phase, progress_done=done, progress_total=total)
            data = {"phase": phase, "done": done, "total": total}
            self._event(connection, claim.job.id, EventType.PROGRESS, claim.owner, data)


def _held_gpus(owner: ColumnElement[str]) -> Any:
    """Return a table of the GPU slots that running jobs hold, by tenant or by queue."""
    # Only jobs with a lease have one, and the index of leases is small.
    return (
        select(owner.label("owner"), func.sum(jobs.c.gpus).label("gpus"))
        .where(jobs.c.lease_until.is_not(None), state_is(*HELD))
        .group_by(owner)
        .subquery()
    )
