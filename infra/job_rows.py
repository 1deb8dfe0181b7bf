"""The job store's inner half: reading and locking rows, and the one way in which a job changes state."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypedDict

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    FromClause,
    Insert,
    Select,
    String,
    Update,
    bindparam,
    case,
    exists,
    func,
    insert,
    literal,
    literal_column,
    select,
    update,
)
from sqlalchemy.engine import RowMapping
from sqlalchemy.sql.dml import ReturningUpdate

from infra import database
from infra.errors import JobConflict, JobNotFound, LeaseLost, QueueNotFound
from infra.job_model import HELD, TERMINAL, TRANSITIONS, Claim, EventType, Job, JobState, turn_at
from infra.outbox import post_job_event
from infra.prepared import Prepared
from infra.schema import job_deps, job_events, jobs, queues, webhooks

_MAX_DETAIL = 10_000
SWEEPER = "sweeper"
"""The actor of what the queue does by itself."""


def state_is(*states: JobState, of: FromClause = jobs) -> ColumnElement[bool]:
    """A predicate with the states written out: a planner matches partial indexes against text, not parameters."""
    if len(states) == 1:
        return of.c.state == literal_column(f"'{states[0]}'")
    return of.c.state.in_([literal_column(f"'{state}'") for state in states])


def clean(detail: str) -> str:
    """Make an error's text fit for the database: PostgreSQL stores no NUL, and nobody reads a megabyte."""
    return detail.replace("\0", "")[:_MAX_DETAIL]


IS_WATCHED = exists().where(webhooks.c.tenant_id == jobs.c.tenant_id, webhooks.c.enabled == 1).correlate(jobs)
"""Whether webhooks are told of what a job does."""
MOVED = (jobs, IS_WATCHED.label("is_watched"))
"""What an UPDATE that moves a job returns: its row, and whether anybody has to be told of it."""


class JobChanges(TypedDict, total=False):
    """What may be changed of a job; what is left out stays."""

    priority: int
    run_at: int
    deadline_at: int | None
    labels: dict[str, str]
    queue: str
    batch_id: None
    """It no longer ends with its batch."""


class JobRows:
    """Transactions on the jobs table. `clock` replaces the database's clock in tests.

    Statements that every job needs are built once and kept as attributes: building one costs more than running it.
    Those of a claim and of a success are prepared, too: they run while other processes wait.
    """

    def __init__(self, engine: Engine, clock: Callable[[], int] | None = None) -> None:
        self._engine = engine
        self._clock = clock

    def _now(self) -> ColumnElement[int]:
        if self._clock is not None:
            # Asked when the statement runs, as the database's own clock is.
            return bindparam(None, callable_=self._clock, type_=BigInteger, unique=True)
        return database.now_ms(self._engine.dialect)

    def _after(self, seconds: float) -> ColumnElement[int]:
        return self._now() + round(seconds * 1000)

    def _locked(self, connection: Connection, query: Select[Any], *, skip_locked: bool = False) -> Sequence[RowMapping]:
        # NO KEY UPDATE leaves inserts of child rows (events, layers) alone; SQLite's transaction is a lock already
        # and its dialect leaves the clause out.
        query = query.with_for_update(key_share=True, skip_locked=skip_locked, of=jobs)
        return connection.execute(query).mappings().all()

    def _lock_job(self, connection: Connection, job_id: str, tenant_id: str | None = None) -> Job:
        query = select(jobs).where(jobs.c.id == job_id)
        if tenant_id is not None:
            query = query.where(jobs.c.tenant_id == tenant_id)
        rows = self._locked(connection, query)
        if not rows:
            raise JobNotFound(f"no job {job_id}", job_id=job_id)
        return Job.from_row(rows[0])

    def _hold_queue(self, connection: Connection, name: str) -> int:
        """Keep a queue from being deleted until the transaction ends; return the time.

        The lock hinders only whoever deletes the queue: not claims, which lock it too, nor a pause.

        Raises:
            QueueNotFound: no such queue, or it has just been deleted.
        """
        row = self._held_queue.row(connection, {"line": name})
        if row is None:
            raise QueueNotFound(f"no queue {name}", queue=name)
        now: int = row["now"]
        return now

    @cached_property
    def _held_queue(self) -> Prepared:
        query = select(self._now().label("now")).select_from(queues).where(queues.c.name == bindparam("line"))
        return Prepared(query.with_for_update(read=True, key_share=True))

    def _held(self, connection: Connection, claim: Claim, **changes: Any) -> Job:
        """Lock the claimed job and apply `changes`, if this claim still holds it.

        The write itself is the check: it also makes concurrent writers of one job commit in the order of its events.

        Raises:
            LeaseLost: another claim holds the job, nobody does, or the lease has expired unnoticed.
        """
        statement = (
            update(jobs)
            .where(jobs.c.id == claim.job.id, jobs.c.fence == claim.fence, state_is(*HELD))
            .where(jobs.c.lease_until >= self._now())
            .values({"version": jobs.c.version + 1} | changes)
            .returning(jobs)
        )
        row = connection.execute(statement).mappings().one_or_none()
        if row is None:
            raise LeaseLost(
                f"{claim.owner} no longer holds {claim.job.id} (fence {claim.fence})",
                job_id=claim.job.id,
                fence=claim.fence,
            )
        return Job.from_row(row)

    def _transition(
        self,
        connection: Connection,
        job: Job,
        to: JobState,
        event: EventType,
        *,
        actor: str,
        data: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Job:
        """Move `job` to another state, and with it the jobs that wait for it when it ends.

        Raises:
            JobConflict: the table has no such edge, or the job changed since it was read.
        """
        row = self._move(connection, job, to, event, actor=actor, data=data, **changes)
        moved = Job.from_row(row)
        if to in TERMINAL and row["awaited"]:
            self._move_dependents(connection, moved)
        return moved

    def _move(
        self,
        connection: Connection,
        job: Job,
        to: JobState,
        event: EventType,
        *,
        actor: str,
        data: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> RowMapping:
        """Do one step: an UPDATE guarded by the state and fence it was read with, an event, a line in the outbox."""
        if to not in TRANSITIONS[job.state]:
            raise JobConflict(f"{job.id} is {job.state}; it cannot become {to}", job_id=job.id, state=job.state, to=to)
        if to not in HELD:
            changes |= {"lease_owner": None, "lease_until": None}
        changes |= {"finished_at": self._now() if to in TERMINAL else None}
        statement = (
            update(jobs)
            .where(jobs.c.id == job.id, jobs.c.fence == job.fence, state_is(job.state))
            .values(state=to, version=jobs.c.version + 1, **changes)
            .returning(*MOVED)
        )
        row = connection.execute(statement).mappings().one_or_none()
        if row is None:
            raise JobConflict(f"{job.id} changed in the meantime", job_id=job.id)
        self._tell(connection, row, job.state, event, actor, data)
        return row

    def _tell(
        self,
        connection: Connection,
        moved: Mapping[str, Any] | RowMapping,
        came_from: JobState,
        event: EventType,
        actor: str,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the event of a step that was just made, and what webhooks will say of it."""
        self._event(connection, moved["id"], event, actor, {"from": came_from, "to": moved["state"], **(data or {})})
        if moved["is_watched"]:
            post_job_event(connection, Job.from_row(moved), self._now())

    def _move_dependents(self, connection: Connection, ended: Job) -> None:
        """Start what waited only for this job; fail what will wait for ever, and what waits for that in turn."""
        pending = deque([ended])
        while pending:
            cause = pending.popleft()
            waiting = (
                select(jobs)
                .join(job_deps, job_deps.c.job_id == jobs.c.id)
                .where(job_deps.c.depends_on == cause.id, state_is(JobState.BLOCKED))
                .order_by(jobs.c.id)
            )
            for row in self._locked(connection, waiting):
                job = Job.from_row(row)
                if cause.state is not JobState.SUCCEEDED:
                    failed = self._fail_dependent(connection, job, cause)
                    if failed["awaited"]:
                        pending.append(Job.from_row(failed))
                elif not self._has_unfinished_dependency(connection, job.id):
                    to = self._waiting_state(connection, job.run_at)
                    self._move(connection, job, to, EventType.UNBLOCKED, actor=SWEEPER, data={"by": cause.id})

    def _fail_dependent(self, connection: Connection, job: Job, cause: Job) -> RowMapping:
        detail = f"{cause.id}, which it depends on, is {cause.state}"
        why: dict[str, Any] = {"reason": "dependency_failed", "detail": detail}
        return self._move(connection, job, JobState.FAILED, EventType.FAILED, actor=SWEEPER, data=why, **why)

    def _change(
        self, connection: Connection, job: Job, changes: JobChanges, actor: str, *, unblock: bool = False
    ) -> Job:
        """Change when and in which queue a locked job runs, or its labels; `unblock` has it wait for no other jobs."""
        now = connection.execute(select(self._now())).scalar_one()
        run_at = max(changes["run_at"], now) if "run_at" in changes else job.run_at
        values: dict[str, Any] = {**changes, "run_at": run_at}
        if changes.keys() & {"run_at", "priority"}:
            # Else the place in the queue stays, which a job that waits for a retry has from before its first try.
            values["turn_at"] = turn_at(run_at, changes.get("priority", job.priority))
        to = job.state
        if unblock or ("run_at" in changes and to is not JobState.BLOCKED):
            to = JobState.SCHEDULED if run_at > now else JobState.QUEUED
        data: dict[str, Any] = {"changes": changes}
        if unblock:
            data["depends_on"] = []
        if to is not job.state:
            return self._transition(connection, job, to, EventType.CHANGED, actor=actor, data=data, **values)
        statement = update(jobs).where(jobs.c.id == job.id).values(version=jobs.c.version + 1, **values).returning(jobs)
        changed = Job.from_row(connection.execute(statement).mappings().one())
        self._event(connection, job.id, EventType.CHANGED, actor, data)
        return changed

    def _has_unfinished_dependency(self, connection: Connection, job_id: str) -> bool:
        query = (
            select(job_deps.c.depends_on)
            .join(jobs, jobs.c.id == job_deps.c.depends_on)
            .where(job_deps.c.job_id == job_id, ~state_is(JobState.SUCCEEDED))
        )
        return bool(connection.execute(select(exists(query))).scalar_one())

    def _waiting_state(self, connection: Connection, run_at: int) -> JobState:
        """Return the state of a job that waits for nothing but its time and its turn."""
        is_due = case((self._now() >= run_at, 1), else_=0)
        return JobState.QUEUED if connection.execute(select(is_due)).scalar_one() else JobState.SCHEDULED

    def _event(
        self, connection: Connection, job_id: str, event: EventType, actor: str, data: Mapping[str, Any] | None = None
    ) -> None:
        values = {"job_id": job_id, "type": event, "actor": actor, "data": dict(data or {})}
        self._new_event.run(connection, values)

    def _at_once(
        self,
        step: ReturningUpdate[Any],
        event: EventType,
        data: Callable[[CTE], Mapping[str, Any]],
        also: Callable[[CTE], Insert | Update],
    ) -> Prepared:
        """A step, its event and what else is written of the job that it moves, in one statement.

        For PostgreSQL: a round trip takes longer than what is done there.
        """
        moved = step.cte("moved")
        facts: list[ColumnElement[Any]] = []
        for name, value in data(moved).items():
            facts += (literal(name, String), literal(value, String) if isinstance(value, str) else value)
        columns = (
            moved.c.id,
            self._now(),
            literal(event, String),
            bindparam("actor", type_=String),
            func.jsonb_build_object(*facts),
        )
        told = insert(job_events).from_select(("job_id", "at", "type", "actor", "data"), select(*columns))
        return Prepared(select(moved).add_cte(told.cte("told"), also(moved).cte("written")))

    @cached_property
    def _new_event(self) -> Prepared:
        return Prepared(insert(job_events).values(at=self._now()), columns=("job_id", "type", "actor", "data"))
