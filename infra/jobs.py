"""The job store: the only bridge between the service, which enqueues and watches, and the workers, which claim and run.

One implementation for SQLite and PostgreSQL. Every method is one transaction. Every transition is one guarded UPDATE
and one event in that transaction, and every write of a worker carries the fence of its claim: a worker that lost its
lease, however long it slept, can change nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, case, func, insert, select
from sqlalchemy.exc import IntegrityError

from infra.database import write
from infra.errors import InfraError, JobConflict
from infra.ids import new_id
from infra.job_layers import JobLayers
from infra.job_model import (
    ACTIVE,
    HELD,
    TRANSITIONS,
    Claim,
    EventType,
    FailureReason,
    Job,
    JobEvent,
    JobState,
    LayerRow,
    LayerState,
    NewJob,
    Worker,
)
from infra.job_reads import JobReads
from infra.job_rows import clean, state_is
from infra.schema import job_layers, jobs, tenants

__all__ = [
    "ACTIVE",
    "TRANSITIONS",
    "Claim",
    "EventType",
    "FailureReason",
    "Job",
    "JobEvent",
    "JobState",
    "JobStore",
    "LayerRow",
    "LayerState",
    "NewJob",
    "Worker",
]

_MAX_LEASE_LOSSES = 5
_SWEEPER = "sweeper"


class JobStore(JobReads, JobLayers):
    """Jobs, their layers, their events and the dispatchers that run them."""

    def enqueue(self, new: NewJob, *, force: bool = False, actor: str) -> tuple[Job, bool]:
        """Add a job, or return the one that already does or did the same work for this tenant.

        Returns:
            The job, and whether it is new. With `force` it always is.

        Raises:
            InfraError: no such tenant.
        """
        for _ in range(3):
            try:
                with write(self._engine) as connection:
                    if not force and (existing := self._same_work(connection, new)) is not None:
                        return existing, False
                    return self._insert(connection, new, force=force, actor=actor), True
            except IntegrityError:
                # Another request inserted the same work between our look and our insert: look again.
                if force:
                    raise
        raise JobConflict("the same job is being added and finished again and again; try later")

    def _same_work(self, connection: Connection, new: NewJob) -> Job | None:
        query = (
            select(jobs)
            .where(jobs.c.tenant_id == new.tenant_id, jobs.c.fingerprint == new.fingerprint)
            .where(state_is(*ACTIVE, JobState.SUCCEEDED))
            # A finished artifact is worth more than a second run of the same work.
            .order_by(case((state_is(JobState.SUCCEEDED), 0), else_=1), jobs.c.created_at.desc(), jobs.c.id.desc())
            .limit(1)
        )
        row = connection.execute(query).mappings().one_or_none()
        return None if row is None else Job.from_row(row)

    def _insert(self, connection: Connection, new: NewJob, *, force: bool, actor: str) -> Job:
        if connection.execute(select(tenants.c.id).where(tenants.c.id == new.tenant_id)).first() is None:
            raise InfraError(f"no tenant {new.tenant_id}", tenant_id=new.tenant_id)
        statement = (
            insert(jobs)
            .values(
                id=new_id("job"),
                tenant_id=new.tenant_id,
                kind=new.kind,
                state=JobState.QUEUED,
                spec=dict(new.spec),
                fingerprint=new.fingerprint,
                forced=int(force),
                priority=new.priority,
                created_at=self._now(),
                run_at=self._now(),
                attempt=0,
                max_attempts=new.max_attempts,
                lease_losses=0,
                max_lease_losses=_MAX_LEASE_LOSSES,
                fence=0,
                phase="",
                progress_done=0,
                progress_total=0,
                version=1,
            )
            .returning(jobs)
        )
        job = Job.from_row(connection.execute(statement).mappings().one())
        self._event(connection, job.id, EventType.ENQUEUED, actor, {"to": job.state, "forced": force})
        return job

    def cancel(self, job_id: str, *, tenant_id: str | None, actor: str) -> Job:
        """Cancel a waiting job, or ask the worker of a running one to stop. Asking twice is the same as once.

        Raises:
            JobNotFound: no such job, or it is another tenant's.
            JobConflict: the job has ended.
        """
        with write(self._engine) as connection:
            job = self._lock_job(connection, job_id, tenant_id)
            if job.state is JobState.CANCELLING:
                return job
            if job.state is JobState.RUNNING:
                return self._transition(connection, job, JobState.CANCELLING, EventType.CANCEL_REQUESTED, actor=actor)
            return self._transition(connection, job, JobState.CANCELLED, EventType.CANCELLED, actor=actor)

    def claim(
        self, owner: str, *, lease_seconds: float, kinds: Sequence[str] = ("quantize", "evaluate")
    ) -> Claim | None:
        """Take the next job: smallest priority, then longest waiting. None when nothing waits."""
        query = (
            select(jobs)
            .where(state_is(JobState.QUEUED), jobs.c.kind.in_(kinds))
            .order_by(jobs.c.priority, jobs.c.run_at, jobs.c.id)
            .limit(1)
        )
        with write(self._engine) as connection:
            self._promote(connection)
            rows = self._locked(connection, query, skip_locked=True)
            if not rows:
                return None
            waiting = Job.from_row(rows[0])
            fence = waiting.fence + 1
            job = self._transition(
                connection,
                waiting,
                JobState.RUNNING,
                EventType.CLAIMED,
                actor=owner,
                data={"fence": fence, "attempt": waiting.attempt + 1},
                fence=fence,
                attempt=waiting.attempt + 1,
                lease_owner=owner,
                lease_until=self._after(lease_seconds),
                started_at=func.coalesce(jobs.c.started_at, self._now()),
                reason=None,
                detail=None,
            )
        return Claim(job=job, fence=fence, owner=owner)

    def _promote(self, connection: Connection) -> None:
        """Queue the scheduled jobs whose time has come."""
        due = select(jobs).where(state_is(JobState.SCHEDULED), jobs.c.run_at <= self._now()).order_by(jobs.c.run_at)
        for row in self._locked(connection, due, skip_locked=True):
            self._transition(connection, Job.from_row(row), JobState.QUEUED, EventType.PROMOTED, actor=_SWEEPER)

    def heartbeat(self, claim: Claim, *, lease_seconds: float) -> bool:
        """Extend the lease; return whether somebody asked to cancel the job.

        Raises:
            LeaseLost: the claim is stale, or its lease has already expired: an expired lease is never renewed.
        """
        with write(self._engine) as connection:
            # The version stays: readers see no difference.
            job = self._held(connection, claim, lease_until=self._after(lease_seconds), version=jobs.c.version)
        return job.state is JobState.CANCELLING

    def progress(self, claim: Claim, *, phase: str, done: int, total: int) -> None:
        """Say how far the job is.

        Raises:
            LeaseLost: the claim is stale.
        """
        with write(self._engine) as connection:
            self._held(connection, claim, phase=phase, progress_done=done, progress_total=total)
            data = {"phase": phase, "done": done, "total": total}
            self._event(connection, claim.job.id, EventType.PROGRESS, claim.owner, data)

    def complete(self, claim: Claim, result: Mapping[str, Any]) -> Job:
        """End the job well.

        Raises:
            LeaseLost: the claim is stale.
            JobConflict: a cancel was requested (finish it), or a planned layer is not done.
        """
        with write(self._engine) as connection:
            job = self._held(connection, claim)
            unfinished = select(func.count()).where(job_layers.c.job_id == job.id, job_layers.c.state != "done")
            if (missing := connection.execute(unfinished).scalar_one()) > 0:
                raise JobConflict(f"{job.id} cannot succeed: {missing} layers are not done", job_id=job.id)
            return self._transition(
                connection, job, JobState.SUCCEEDED, EventType.SUCCEEDED, actor=claim.owner, result=dict(result)
            )

    def fail(
        self,
        claim: Claim,
        reason: FailureReason,
        detail: str,
        *,
        retry_in_seconds: float | None = None,
        has_progressed: bool = False,
    ) -> Job:
        """End this try badly: with a retry time and tries left the job waits for the next, otherwise it has failed.

        A try that committed a layer starts the count again: a long job may meet more short outages than `max_attempts`.
        A job whose cancelling was requested becomes cancelled instead.

        Raises:
            LeaseLost: the claim is stale.
        """
        with write(self._engine) as connection:
            job = self._held(connection, claim)
            detail = clean(detail)
            if job.state is JobState.CANCELLING:
                return self._end_cancel(connection, job, claim.owner)
            attempt = 1 if has_progressed else job.attempt
            if retry_in_seconds is not None and attempt < job.max_attempts:
                return self._transition(
                    connection,
                    job,
                    JobState.SCHEDULED,
                    EventType.RETRY_SCHEDULED,
                    actor=claim.owner,
                    data={"reason": reason, "detail": detail, "in_seconds": retry_in_seconds},
                    run_at=self._after(retry_in_seconds),
                    attempt=attempt,
                    reason=reason,
                    detail=detail,
                )
            final = reason if retry_in_seconds is None else "retries_exhausted"
            return self._end_failed(connection, job, final, detail, claim.owner)

    def finish_cancel(self, claim: Claim) -> Job:
        """Report that the work of a job being cancelled has stopped.

        Raises:
            LeaseLost: the claim is stale.
            JobConflict: nobody asked to cancel it.
        """
        with write(self._engine) as connection:
            return self._end_cancel(connection, self._held(connection, claim), claim.owner)

    def release(self, claim: Claim) -> Job:
        """Give the job back to the queue, for a graceful stop: the try does not count.

        A job whose cancelling was requested becomes cancelled instead.

        Raises:
            LeaseLost: the claim is stale.
        """
        with write(self._engine) as connection:
            job = self._held(connection, claim)
            if job.state is JobState.CANCELLING:
                return self._end_cancel(connection, job, claim.owner)
            return self._transition(
                connection,
                job,
                JobState.QUEUED,
                EventType.RELEASED,
                actor=claim.owner,
                attempt=jobs.c.attempt - 1,
            )

    def _end_cancel(self, connection: Connection, job: Job, actor: str) -> Job:
        return self._transition(connection, job, JobState.CANCELLED, EventType.CANCELLED, actor=actor)

    def _end_failed(self, connection: Connection, job: Job, reason: FailureReason, detail: str, actor: str) -> Job:
        return self._transition(
            connection,
            job,
            JobState.FAILED,
            EventType.FAILED,
            actor=actor,
            data={"reason": reason, "detail": detail},
            reason=reason,
            detail=detail,
        )

    def sweep(self) -> int:
        """Take jobs back from workers whose lease has expired; return how many. Any process may call it at any time."""
        expired = (
            select(jobs)
            .where(state_is(*HELD), jobs.c.lease_until.is_not(None), jobs.c.lease_until < self._now())
            .order_by(jobs.c.id)
        )
        with write(self._engine) as connection:
            self._promote(connection)
            rows = self._locked(connection, expired, skip_locked=True)
            for row in rows:
                self._take_back(connection, Job.from_row(row))
        return len(rows)

    def _take_back(self, connection: Connection, job: Job) -> None:
        if job.state is JobState.CANCELLING:
            self._end_cancel(connection, job, _SWEEPER)
            return
        losses = job.lease_losses + 1
        if losses > job.max_lease_losses:
            detail = f"its workers vanished {losses} times; the last was {job.lease_owner}"
            self._end_failed(connection, job, "lease_losses_exhausted", detail, _SWEEPER)
            return
        self._transition(
            connection,
            job,
            JobState.QUEUED,
            EventType.LEASE_LOST,
            actor=_SWEEPER,
            data={"owner": job.lease_owner, "fence": job.fence, "lease_losses": losses},
            lease_losses=losses,
            attempt=job.attempt - 1,
        )
