"""Which job is next, and the lease of whoever works on it.

Between tenants the weight decides, by start-time fair queueing: a claim starts at the tenant's virtual time or at the
start of the latest claim of all, whichever is later, and the tenant that would start first is served. GPU time that it
uses, divided by its weight, moves its virtual time on. A tenant that was away gets no credit for it.
Among the jobs of one tenant priority decides, with ageing (`job_model.turn_at`).

Reference: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Float,
    Select,
    bindparam,
    case,
    exists,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from infra.database import write
from infra.job_model import HELD, Claim, EventType, Job, JobKind, JobState, StopReason
from infra.job_rows import MOVED, SWEEPER, JobRows, state_is
from infra.schema import jobs, queues, tenants

NOMINAL_GPU_SECONDS = 1.0
"""What a claim costs before any layer is done, so that claims at the same moment go to different tenants."""

_UNBOUNDED = 2**31 - 1
_CHARGE = (
    update(tenants)
    .where(tenants.c.id == bindparam("payer"))
    .values(vstart=bindparam("start"), vtime=bindparam("start", type_=Float) + bindparam("cost") / tenants.c.weight)
)


class _Line(NamedTuple):
    """A queue that may start a job, and the GPU slots it has left."""

    name: str
    room: int


class _Choice(NamedTuple):
    """A job that could be next, and the virtual time at which its tenant would start it."""

    start: float
    job_id: str


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
            lines = self._open_queues(connection)
            while lines and (choice := self._choose(connection, lines, kinds)) is not None:
                job = self._take(connection, choice.job_id, owner, lease_seconds)
                if job is None:  # cancelled or put off while we looked
                    continue
                self._charge(connection, job, choice.start)
                return Claim(job=job, fence=job.fence, owner=owner)
        return None

    def _open_queues(self, connection: Connection) -> list[_Line]:
        """Wait for other claims to commit, and queue what is due; return the queues that may start a job.

        Claims go one after the other, since they share budgets: two at once could both take a tenant's last slot.
        """
        rows = connection.execute(self._gate).all()
        if any(row.is_due for row in rows):
            self._promote(connection)
        room = [_UNBOUNDED if row.max_running is None else row.max_running - row.held for row in rows]
        return [_Line(row.name, free) for row, free in zip(rows, room, strict=True) if not row.paused and free > 0]

    @cached_property
    def _gate(self) -> Select[Any]:
        is_due = exists().where(state_is(JobState.SCHEDULED), jobs.c.run_at <= self._now())
        held = _held_gpus(jobs.c.queue == queues.c.name)
        return (
            select(
                queues.c.name,
                queues.c.paused,
                queues.c.max_running,
                case((queues.c.max_running.is_not(None), held), else_=0).label("held"),
                is_due.label("is_due"),
            )
            .order_by(queues.c.name)
            .with_for_update(key_share=True, of=queues)
        )

    def _choose(self, connection: Connection, lines: Sequence[_Line], kinds: Sequence[str]) -> _Choice | None:
        """Return the job that is next: the first of the tenant that starts first."""
        choices = []
        for line in lines:
            heads = connection.execute(self._heads, {"line": line.name, "room": line.room, "kinds": list(kinds)})
            choices += [_Choice(max(row.vtime, row.latest_start), row.job_id) for row in heads if row.job_id]
        if not choices:
            return None
        first = min(choice.start for choice in choices)
        tied = [choice for choice in choices if choice.start == first]
        if len(tied) == 1:
            return tied[0]
        # Among tenants that are equal, the job that has waited longest by its priority.
        order = select(jobs.c.id).where(jobs.c.id.in_([choice.job_id for choice in tied]))
        ids = connection.execute(order.order_by(jobs.c.turn_at, jobs.c.id).limit(1)).scalars()
        return next((_Choice(first, job_id) for job_id in ids), None)

    @cached_property
    def _heads(self) -> Select[Any]:
        """The query for each tenant's first job in one queue, null for those that have none.

        One look into an index for each tenant. Written as one join over all of them, planners scan the table instead.
        """
        held = _held_gpus(jobs.c.tenant_id == tenants.c.id)
        waiting = jobs.alias("waiting")
        first = (
            select(waiting.c.id)
            .where(waiting.c.tenant_id == tenants.c.id, waiting.c.queue == bindparam("line"))
            .where(state_is(JobState.QUEUED, of=waiting), waiting.c.kind.in_(bindparam("kinds", expanding=True)))
            .where(or_(waiting.c.deadline_at.is_(None), waiting.c.deadline_at > self._now()))
            .where(waiting.c.gpus <= bindparam("room", type_=BigInteger))
            .where(or_(tenants.c.max_running.is_(None), waiting.c.gpus <= tenants.c.max_running - held))
            .order_by(waiting.c.turn_at, waiting.c.id)
            .limit(1)
            .scalar_subquery()
        )
        latest_start = select(func.max(tenants.alias("all_tenants").c.vstart)).scalar_subquery()
        return select(tenants.c.vtime, latest_start.label("latest_start"), first.label("job_id")).where(
            tenants.c.paused == 0,
            # A tenant without room must not cost a walk through all that it has waiting.
            or_(tenants.c.max_running.is_(None), tenants.c.max_running > held),
        )

    def _take(self, connection: Connection, job_id: str, owner: str, lease_seconds: float) -> Job | None:
        values = {"taken_id": job_id, "owner": owner, "lease_ms": round(lease_seconds * 1000)}
        row = connection.execute(self._start, values).mappings().one_or_none()
        if row is None:
            return None
        data = {"fence": row["fence"], "attempt": row["attempt"]}
        self._tell(connection, row, JobState.QUEUED, EventType.CLAIMED, owner, data)
        return Job.from_row(row)

    @cached_property
    def _start(self) -> ReturningUpdate[Any]:
        return (
            update(jobs)
            .where(jobs.c.id == bindparam("taken_id"), state_is(JobState.QUEUED))
            .values(
                state=JobState.RUNNING,
                version=jobs.c.version + 1,
                fence=jobs.c.fence + 1,
                attempt=jobs.c.attempt + 1,
                lease_owner=bindparam("owner"),
                lease_until=self._now() + bindparam("lease_ms", type_=BigInteger),
                started_at=func.coalesce(jobs.c.started_at, self._now()),
                reason=None,
                detail=None,
            )
            .returning(*MOVED)
        )

    def _charge(self, connection: Connection, job: Job, start: float) -> None:
        values = {"payer": job.tenant_id, "start": start, "cost": job.gpus * NOMINAL_GPU_SECONDS}
        connection.execute(_CHARGE, values)

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


def _held_gpus(condition: ColumnElement[bool]) -> ColumnElement[int]:
    """Return the GPU slots of running jobs that fulfil a condition on an outer table's row."""
    # Only a held job has a lease, and the index of leases is small.
    return (
        select(func.coalesce(func.sum(jobs.c.gpus), 0))
        .where(jobs.c.lease_until > 0, state_is(*HELD), condition)
        .correlate_except(jobs)
        .scalar_subquery()
    )
