"""Which job is next, and the lease of whoever works on it.

Between tenants the weight decides, by start-time fair queueing: a claim starts at the tenant's virtual time or at the
start of the latest claim of all, whichever is later, and the tenant that would start first is served. GPU time that it
uses, divided by its weight, moves its virtual time on. A tenant that was away gets no credit for it.
Among the jobs of one tenant priority decides, with ageing (`job_model.turn_at`).

Claims may run side by side: each locks the job it takes, and passes over those that others are taking. Two at the same
moment may so go to the tenant whose turn it was only once; both are charged, and it waits the longer afterwards. Only
where a limit on running slots is set do claims go one after the other, since two at once could both take the last slot.

Reference: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Float,
    Select,
    String,
    Update,
    bindparam,
    case,
    cast,
    exists,
    false,
    func,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from infra.database import alone, write, writes_at_once
from infra.job_model import HELD, Claim, EventType, Job, JobKind, JobState, StopReason
from infra.job_rows import IS_WATCHED, MOVED, SWEEPER, JobRows, state_is
from infra.outbox import post_job_event
from infra.prepared import Prepared, Row, Statement, together
from infra.schema import jobs, queues, tenants

NOMINAL_GPU_SECONDS = 1.0
"""What a claim costs before any layer is done, so that claims at the same moment go to different tenants."""

_UNBOUNDED = 2**31 - 1
_waiting = jobs.alias("waiting")
_any_tenant = tenants.alias("any_tenant")
_HEAD = cast(_waiting.c.turn_at, String) + ":" + _waiting.c.id
"""A job and its turn as one value: two would take two looks."""
_start = bindparam("start", type_=Float)
_starts_at = case((tenants.c.vtime > _start, tenants.c.vtime), else_=_start)


def _charge(payer: ColumnElement[str], cost: ColumnElement[float]) -> Update:
    # Claims at the same moment chose by the same virtual time; each starts where the one before it ends.
    charged = update(tenants).where(tenants.c.id == payer)
    return charged.values(vstart=_starts_at, vtime=_starts_at + cost / tenants.c.weight)


_CHARGE = Prepared(_charge(bindparam("payer"), bindparam("cost", type_=Float)))


class _Choice(NamedTuple):
    """A tenant that could be next in a queue. They compare as they are served."""

    start: float
    """The virtual time at which it would start."""
    turn_at: int
    """Among tenants that start at the same time, the job that has waited longest by its priority is first."""
    job_id: str
    tenant_id: str
    queue: str
    room: int
    """GPU slots that the queue has left."""


class JobClaims(JobRows):
    """The way from the queue to a worker, and the worker's signs of life."""

    def claim(
        self, owner: str, *, lease_seconds: float, kinds: Sequence[JobKind] = ("quantize", "evaluate")
    ) -> Claim | None:
        """Take the next job that its tenant and its queue let run. None when there is none.

        Jobs of paused tenants and queues wait, and so do those for which their tenant's or queue's running slots do not
        suffice; smaller ones behind them go ahead.
        """
        wanted = tuple(kinds)
        if writes_at_once(self._engine.dialect):
            with alone(self._engine) as connection:
                row, is_settled = self._claim_at_once(connection, wanted, owner, lease_seconds)
            if is_settled:
                return None if row is None else _claim(row, owner)
        with write(self._engine) as connection:
            for choice in sorted(self._choices(connection, wanted)):
                row = self._take(connection, choice, wanted, owner, lease_seconds)
                if row is not None:
                    return _claim(row, owner)
                # What waits there is being taken by others, or was cancelled while we looked.
        return None

    def _claim_at_once(
        self, connection: Connection, kinds: tuple[JobKind, ...], owner: str, lease_seconds: float
    ) -> tuple[Row | None, bool]:
        """Take the next job in two statements, each a transaction of its own; say whether that settles the claim.

        It does not where slots are limited, a job is due, a webhook wants to know, or others take that job.
        """
        rows = self._prepared(self._look, kinds).rows(connection, {})
        if any(row["is_limited"] or row["is_due"] for row in rows):
            return None, False
        choices = [_choice(row) for row in rows if row["head"] is not None]
        if not choices:
            return None, True
        choice = min(choices)
        values = {**_start_values(choice, owner, lease_seconds), "actor": owner, "start": choice.start}
        row = self._prepared(self._start_at_once, kinds).row(connection, values)
        return row, row is not None

    def _choices(self, connection: Connection, kinds: tuple[JobKind, ...]) -> list[_Choice]:
        """Queue what is due; return who could be next. Waits for other claims where slots are limited."""
        look = self._prepared(self._look, kinds)
        rows = look.rows(connection, {})
        if any(row["is_due"] for row in rows):
            self._promote(connection)
            rows = look.rows(connection, {})
        # Last, so that no look comes after it that could find room in a queue that was full before, without the lock.
        if any(row["is_limited"] for row in rows):
            self._queue_locks.run(connection, {})
            rows = look.rows(connection, {})
        return [_choice(row) for row in rows if row["head"] is not None]

    @cached_property
    def _queue_locks(self) -> Prepared:
        return Prepared(select(queues.c.name).order_by(queues.c.name).with_for_update(key_share=True))

    def _prepared(
        self, build: Callable[[Sequence[JobKind]], Statement | Prepared], kinds: tuple[JobKind, ...]
    ) -> Prepared:
        """Return a statement that is about some kinds of jobs; which kinds are in its text."""
        key = (build.__name__, kinds)
        if key not in self._by_kinds:
            made = build(kinds)
            self._by_kinds[key] = made if isinstance(made, Prepared) else Prepared(made)
        return self._by_kinds[key]

    @cached_property
    def _by_kinds(self) -> dict[tuple[str, tuple[JobKind, ...]], Prepared]:
        return {}

    def _look(self, kinds: Sequence[JobKind]) -> Select[Any]:
        """The query for each tenant's first job in each queue, null where it has none.

        One look into an index for each tenant. Written as one join over all of them, planners scan the table instead.
        """
        held = held_gpus(jobs.c.queue == queues.c.name)
        room = case((queues.c.max_running.is_(None), _UNBOUNDED), else_=queues.c.max_running - held)
        head = self._first(kinds, queues.c.name, room).with_only_columns(_HEAD)
        return (
            select(
                queues.c.name.label("queue"),
                room.label("room"),
                tenants.c.id.label("tenant_id"),
                tenants.c.vtime,
                select(func.max(_any_tenant.c.vstart)).scalar_subquery().label("latest_start"),
                head.correlate(queues, tenants).scalar_subquery().label("head"),
                exists().where(state_is(JobState.SCHEDULED), jobs.c.run_at <= self._now()).label("is_due"),
                or_(queues.c.max_running.is_not(None), exists().where(_any_tenant.c.max_running.is_not(None))).label(
                    "is_limited"
                ),
            )
            .join_from(queues, tenants, true())
            .where(
                queues.c.paused == 0,
                tenants.c.paused == 0,
                or_(queues.c.max_running.is_(None), queues.c.max_running > held),
                # One without room must not cost a walk through all that it has waiting.
                or_(tenants.c.max_running.is_(None), tenants.c.max_running > _held_by_tenant()),
            )
        )

    def _first(self, kinds: Sequence[JobKind], queue: ColumnElement[str], room: ColumnElement[int]) -> Select[Any]:
        """The first job that a tenant may start in a queue, in at most `room` slots."""
        limit = tenants.c.max_running
        return (
            select(_waiting.c.id)
            .where(_waiting.c.tenant_id == tenants.c.id, _waiting.c.queue == queue)
            .where(state_is(JobState.QUEUED, of=_waiting), or_(false(), *(_waiting.c.kind == kind for kind in kinds)))
            .where(or_(_waiting.c.deadline_at.is_(None), _waiting.c.deadline_at > self._now()))
            .where(_waiting.c.gpus <= room)
            .where(or_(limit.is_(None), _waiting.c.gpus <= limit - _held_by_tenant()))
            .order_by(_waiting.c.turn_at, _waiting.c.id)
            .limit(1)
        )

    def _take(
        self,
        connection: Connection,
        choice: _Choice,
        kinds: tuple[JobKind, ...],
        owner: str,
        lease_seconds: float,
    ) -> Row | None:
        """Start the first job of the choice that nobody else is taking."""
        row = self._prepared(self._start, kinds).row(connection, _start_values(choice, owner, lease_seconds))
        if row is None:
            return None
        job = Job.from_row(row)
        data = _claimed_facts(job.state, job.fence, job.attempt)
        with together(connection):
            self._event(connection, job.id, EventType.CLAIMED, owner, data)
            self._charge(connection, job, choice.start)
        if row["is_watched"]:
            post_job_event(connection, job, self._now())
        return row

    def _start_at_once(self, kinds: Sequence[JobKind]) -> Prepared:
        """As `_take`, in one statement, for a job that no webhook is told of."""
        return self._at_once(
            self._start(kinds).where(~IS_WATCHED),
            EventType.CLAIMED,
            lambda moved: _claimed_facts(moved.c.state, moved.c.fence, moved.c.attempt),
            lambda moved: _charge(moved.c.tenant_id, moved.c.gpus * NOMINAL_GPU_SECONDS),
        )

    def _start(self, kinds: Sequence[JobKind]) -> ReturningUpdate[Any]:
        free = (
            self._first(kinds, bindparam("line", type_=String), bindparam("room", type_=BigInteger))
            .where(tenants.c.id == bindparam("taker"))
            .with_for_update(key_share=True, skip_locked=True, of=_waiting)
        )
        return (
            update(jobs)
            .where(jobs.c.id == free.scalar_subquery(), state_is(JobState.QUEUED))
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
        _CHARGE.run(connection, values)

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


def _claim(row: Row, owner: str) -> Claim:
    job = Job.from_row(row)
    return Claim(job=job, fence=job.fence, owner=owner)


def _claimed_facts(state: Any, fence: Any, attempt: Any) -> dict[str, Any]:
    """What the event of a claim says: values, or columns of a statement that writes it."""
    return {"from": JobState.QUEUED, "to": state, "fence": fence, "attempt": attempt}


def _start_values(choice: _Choice, owner: str, lease_seconds: float) -> dict[str, Any]:
    return {
        "taker": choice.tenant_id,
        "line": choice.queue,
        "room": choice.room,
        "owner": owner,
        "lease_ms": round(lease_seconds * 1000),
    }


def _choice(row: Row) -> _Choice:
    turn_at, _, job_id = row["head"].partition(":")
    start = max(row["vtime"], row["latest_start"])
    return _Choice(start, int(turn_at), job_id, row["tenant_id"], row["queue"], row["room"])


def _held_by_tenant() -> ColumnElement[int]:
    return held_gpus(jobs.c.tenant_id == tenants.c.id)


def held_gpus(condition: ColumnElement[bool]) -> ColumnElement[int]:
    """Return the GPU slots of running jobs that fulfil a condition on an outer table's row."""
    # Only a held job has a lease, and the index of leases is small.
    return (
        select(func.coalesce(func.sum(jobs.c.gpus), 0))
        .where(jobs.c.lease_until > 0, state_is(*HELD), condition)
        .correlate_except(jobs)
        .scalar_subquery()
    )
