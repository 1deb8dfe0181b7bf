"""Adding jobs: the same work is done once, quotas hold, and what a job depends on exists."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice

import structlog
from sqlalchemy import Connection, bindparam, case, delete, exists, insert, select, update

from infra import tracing
from infra.database import insert_new, write
from infra.errors import DependencyFailed, DependencyNotFound, JobConflict, QueueNotFound
from infra.ids import new_id
from infra.job_claims import held_gpus
from infra.job_model import ACTIVE, MAX_LABELS, TERMINAL, WAITING, EventType, Job, JobState, NewJob, turn_at
from infra.job_quotas import require_room
from infra.job_rows import JobChanges, JobRows, state_is
from infra.prepared import Prepared
from infra.schema import artifacts, job_deps, jobs, queues

log = structlog.stdlib.get_logger(__name__)

_MAX_LEASE_LOSSES = 5

_COLUMNS = (
    *("id", "tenant_id", "kind", "state", "spec", "fingerprint", "forced", "priority", "created_at", "run_at"),
    *("turn_at", "deadline_at", "queue", "batch_id", "gpus", "model_name", "recipe_name", "labels", "traceparent"),
    *("attempt", "max_attempts", "lease_losses", "max_lease_losses", "fence"),
    *("phase", "progress_done", "progress_total", "version", "gpu_ms"),
)
_UNSET = dict.fromkeys(set(jobs.c.keys()) - set(_COLUMNS))
"""What a new job does not have yet."""
_SAME_WORK = Prepared(
    select(jobs)
    .where(jobs.c.tenant_id == bindparam("of_tenant"), jobs.c.fingerprint == bindparam("wanted"))
    .where(state_is(*ACTIVE, JobState.SUCCEEDED))
    .where(~exists().where(artifacts.c.job_id == jobs.c.id, artifacts.c.deleted_at.is_not(None)))
    # A finished artifact is worth more than a second run of the same work, and that more than one that is stopped.
    .order_by(
        case((state_is(JobState.SUCCEEDED), 0), (state_is(JobState.CANCELLING), 2), else_=1),
        jobs.c.created_at.desc(),
        jobs.c.id.desc(),
    )
    .limit(1)
)

_NEEDED = Prepared(
    update(jobs)
    .where(jobs.c.tenant_id == bindparam("of_tenant"), jobs.c.id == bindparam("needed"))
    .values(awaited=1)
    .returning(jobs)
)
_NEW_DEPENDENCY = Prepared(insert(job_deps), columns=("job_id", "depends_on"))


class JobEnqueue(JobRows):
    """The way in."""

    def enqueue(self, new: NewJob, *, force: bool = False, actor: str) -> tuple[Job, bool]:
        """Add a job, or return the one that already does or did the same work for this tenant.

        One that has not ended serves both from then on: it starts as early, and as urgently, as the more impatient of
        the two wants, fails at the later deadline, and waits for other jobs only if both do. It stays in its queue,
        unless that is paused and the one of the new request is not, or that is full and the other has no bound.

        Returns:
            The job, and whether it is new. With `force` it always is.

        Raises:
            TenantNotFound: no such tenant.
            QueueNotFound: no such queue.
            DependencyNotFound: a job in `depends_on` is not there, or is another tenant's.
            DependencyFailed: a job in `depends_on` has failed or was cancelled.
            QuotaExceeded: the tenant has as much as it may have.
            JobConflict: the job that does the same work is being cancelled.
        """
        # Whatever refuses a job does so before anything is written but that others wait for what it depends on, which
        # costs those a statement and is no harm where nobody does.
        with write(self._engine, savepoint=False) as connection:
            self._require_what_it_names(connection, new)
            for _ in range(3):
                if not force and (existing := self._same_work(connection, new)) is not None:
                    joined = self._join(connection, existing, new, actor)
                    if joined is None:  # it has just ended
                        continue
                    return joined, False
                if (job := self._insert(connection, new, force=force, actor=actor)) is not None:
                    return job, True
                # Another request inserted the same work between our look and our insert: look again.
        raise JobConflict("the same job is being added and finished again and again; try later")

    def _same_work(self, connection: Connection, new: NewJob) -> Job | None:
        values = {"of_tenant": new.tenant_id, "wanted": new.fingerprint}
        row = _SAME_WORK.row(connection, values)
        return None if row is None else Job.from_row(row)

    def _require_what_it_names(self, connection: Connection, new: NewJob) -> None:
        """Refuse what is not there, also where the work is done already: a slip of the pen is to be seen at once."""
        if self._queue.row(connection, {"line": new.queue}) is None:
            raise QueueNotFound(f"no queue {new.queue}", queue=new.queue)
        wanted = dict.fromkeys(new.depends_on)
        if wanted:
            query = select(jobs.c.id).where(jobs.c.tenant_id == new.tenant_id, jobs.c.id.in_(wanted))
            found = set(connection.execute(query).scalars())
            if missing := next((job_id for job_id in wanted if job_id not in found), None):
                raise DependencyNotFound(f"no job {missing} to wait for", job_id=missing)

    def _join(self, connection: Connection, existing: Job, new: NewJob, actor: str) -> Job | None:
        """Let a job that does the wanted work serve the new request, too. None when it has ended badly meanwhile."""
        if existing.state is JobState.SUCCEEDED:
            return existing
        job = self._lock_job(connection, existing.id)
        if job.state is JobState.CANCELLING:
            raise JobConflict(f"{job.id} does this work and is being cancelled; submit it again in a moment")
        if job.state in TERMINAL:
            return job if job.state is JobState.SUCCEEDED else None
        changes: JobChanges = {}
        if job.deadline_at is not None and (new.deadline_at is None or new.deadline_at > job.deadline_at):
            changes["deadline_at"] = new.deadline_at
        labels = dict(job.labels or {})
        missing = ((name, value) for name, value in (new.labels or {}).items() if name not in labels)
        # Each request may bring as many as a job may have.
        labels |= islice(missing, max(0, MAX_LABELS - len(labels)))
        if labels != (job.labels or {}):
            changes["labels"] = labels
        if job.batch_id is not None and new.batch_id is None:
            # It is somebody's own by now, and must not be cancelled with the batch.
            changes["batch_id"] = None
        if job.state not in WAITING:
            return self._change(connection, job, changes, actor) if changes else job
        if new.priority < job.priority:
            changes["priority"] = new.priority
        now = connection.execute(select(self._now())).scalar_one()
        if (run_at := max(now, new.run_at or now)) < job.run_at:
            changes["run_at"] = run_at
        unblock = job.state is JobState.BLOCKED and not new.depends_on
        is_due = (unblock or job.state is not JobState.BLOCKED) and changes.get("run_at", job.run_at) <= now
        if new.queue != job.queue and self._is_better_off(connection, job, new.queue, is_due=is_due):
            # As with a new job: the queue stays until the job is in.
            self._hold_queue(connection, new.queue)
            changes["queue"] = new.queue
        if unblock:
            connection.execute(delete(job_deps).where(job_deps.c.job_id == job.id))
        return self._change(connection, job, changes, actor, unblock=unblock) if changes or unblock else job

    def _is_better_off(self, connection: Connection, job: Job, queue: str, *, is_due: bool) -> bool:
        """Whether a job starts in another queue, and never later than where it waits.

        So out of a paused queue into an open one; and, when it waits for nothing but its turn, out of one without room
        for it into one without a bound. Room in a bounded one proves nothing: those ahead of the job may fill it.
        """
        held = held_gpus(jobs.c.queue == queues.c.name).label("held")
        query = select(queues.c.name, queues.c.paused, queues.c.max_running, held)
        rows = {row.name: row for row in connection.execute(query.where(queues.c.name.in_([job.queue, queue])))}
        there, elsewhere = rows.get(job.queue), rows.get(queue)
        if there is None or elsewhere is None or elsewhere.paused:
            return False
        is_full = there.max_running is not None and there.max_running - there.held < job.gpus
        return bool(there.paused or (is_due and is_full and elsewhere.max_running is None))

    def _insert(self, connection: Connection, new: NewJob, *, force: bool, actor: str) -> Job | None:
        """Add the job; none where an active one with its fingerprint is there, unless it is forced."""
        # Jobs are locked before the tenant's turn is taken, as everywhere: two orders would be a deadlock.
        is_blocked = self._is_blocked(connection, new.tenant_id, new.depends_on)
        require_room(connection, new.tenant_id, gpus=new.gpus)
        now = self._hold_queue(connection, new.queue)
        # A time in the past would be a way to the front of the queue.
        run_at = max(now, new.run_at or now)
        state = JobState.BLOCKED if is_blocked else JobState.SCHEDULED if run_at > now else JobState.QUEUED
        values = {
            "id": new_id("job"),
            "tenant_id": new.tenant_id,
            "kind": new.kind,
            "state": state,
            "spec": dict(new.spec),
            "fingerprint": new.fingerprint,
            "forced": int(force),
            "priority": new.priority,
            "created_at": now,
            "run_at": run_at,
            "turn_at": turn_at(run_at, new.priority),
            "deadline_at": new.deadline_at,
            "queue": new.queue,
            "batch_id": new.batch_id,
            "gpus": new.gpus,
            "model_name": new.model_name,
            "recipe_name": new.recipe_name,
            "labels": None if new.labels is None else dict(new.labels),
            "traceparent": new.traceparent or tracing.current_traceparent(),
            "attempt": 0,
            "max_attempts": new.max_attempts,
            "lease_losses": 0,
            "max_lease_losses": _MAX_LEASE_LOSSES,
            "fence": 0,
            "phase": "",
            "progress_done": 0,
            "progress_total": 0,
            "version": 1,
            "gpu_ms": 0,
        }
        if self._new_job.row(connection, values) is None:
            return None
        job = Job.from_row(_UNSET | values)
        for depends_on in dict.fromkeys(new.depends_on):
            _NEW_DEPENDENCY.run(connection, {"job_id": job.id, "depends_on": depends_on})
        data = {"to": job.state, "forced": force}
        if new.depends_on:
            data["depends_on"] = list(new.depends_on)
        self._event(connection, job.id, EventType.ENQUEUED, actor, data)
        log.info("job_enqueued", job_id=job.id, tenant_id=job.tenant_id, kind=job.kind, state=job.state)
        return job

    @cached_property
    def _new_job(self) -> Prepared:
        return Prepared(insert_new(self._engine.dialect, jobs).returning(jobs.c.id), _COLUMNS)

    @cached_property
    def _queue(self) -> Prepared:
        return Prepared(select(queues.c.name).where(queues.c.name == bindparam("line")))

    def _is_blocked(self, connection: Connection, tenant_id: str, depends_on: Sequence[str]) -> bool:
        """Mark the jobs that a new one waits for, which keeps them from ending before it is in.

        A cycle cannot arise: only jobs that exist already can be named.
        """
        if not depends_on:
            return False
        found = []
        # One after the other, in the order of their ids, as all locks of jobs are taken.
        for job_id in sorted(set(depends_on)):
            row = _NEEDED.row(connection, {"of_tenant": tenant_id, "needed": job_id})
            if row is None:
                raise DependencyNotFound(f"no job {job_id} to wait for", job_id=job_id)
            found.append(Job.from_row(row))
        require_may_succeed(found)
        return any(job.state is not JobState.SUCCEEDED for job in found)


def require_may_succeed(dependencies: Iterable[Job]) -> None:
    """Raise DependencyFailed if one of these jobs has ended without success."""
    for job in dependencies:
        if job.state in TERMINAL and job.state is not JobState.SUCCEEDED:
            raise DependencyFailed(f"{job.id}, which it depends on, is {job.state}", job_id=job.id, state=job.state)
