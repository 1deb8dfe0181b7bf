"""What people ask of a job that exists: cancel it, run it again, change when it runs."""

from collections.abc import Collection

from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError

from infra.batch_endings import reopen_batches_of
from infra.database import write
from infra.errors import JobChanged, JobConflict, QueueNotFound
from infra.job_enqueue import require_may_succeed
from infra.job_model import ACTIVE, WAITING, EventType, Job, JobState, turn_at
from infra.job_quotas import require_room
from infra.job_rows import JobChanges, JobRows
from infra.schema import job_deps, jobs


class JobRequests(JobRows):
    """Requests of people, not of workers."""

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

    def retry(self, job_id: str, *, tenant_id: str | None, actor: str) -> Job:
        """Queue a job again that failed or was cancelled. Its counts start anew; layers that it finished stay finished.

        A deadline that has passed is dropped. Jobs that failed because of this one are not retried with it.

        Raises:
            JobNotFound: no such job, or it is another tenant's.
            JobConflict: it has not ended, or has succeeded, or another job is doing the same work.
            DependencyFailed: a job that it depends on has to be retried first.
            QueueNotFound: its queue has been deleted.
            QuotaExceeded: the tenant has as much as it may have.
        """
        try:
            with write(self._engine) as connection:
                return self._retry(connection, job_id, tenant_id, actor)
        except IntegrityError as error:
            raise JobConflict(f"another job is doing the work of {job_id} already", job_id=job_id) from error

    def _retry(self, connection: Connection, job_id: str, tenant_id: str | None, actor: str) -> Job:
        # What it depends on first, as in `enqueue`: none of them may end between our look and our move.
        query = select(jobs).join(job_deps, job_deps.c.depends_on == jobs.c.id).where(job_deps.c.job_id == job_id)
        needed = [Job.from_row(row) for row in self._locked(connection, query.order_by(jobs.c.id))]
        job = self._lock_job(connection, job_id, tenant_id)
        if job.state not in (JobState.FAILED, JobState.CANCELLED):
            raise JobConflict(f"{job.id} is {job.state}; only a failed or cancelled job can be retried", job_id=job.id)
        require_may_succeed(needed)
        require_room(connection, job.tenant_id, gpus=job.gpus)
        try:
            now = self._hold_queue(connection, job.queue)
        except QueueNotFound as error:
            raise queue_deleted(job) from error
        is_blocked = any(each.state is not JobState.SUCCEEDED for each in needed)
        reopen_batches_of(connection, job.id)
        return self._transition(
            connection,
            job,
            JobState.BLOCKED if is_blocked else JobState.QUEUED,
            EventType.RETRIED,
            actor=actor,
            data={"reason": job.reason},
            run_at=now,
            turn_at=turn_at(now, job.priority),
            deadline_at=job.deadline_at if job.deadline_at is not None and job.deadline_at > now else None,
            started_at=None,
            attempt=0,
            lease_losses=0,
            reason=None,
            detail=None,
        )

    def change(
        self, job_id: str, changes: JobChanges, *, tenant_id: str | None, actor: str, version: int | None = None
    ) -> Job:
        """Change when and in which queue a job runs, or its labels, which are replaced by those that are given.

        `version` makes sure that it is as the caller has seen it. Labels are words to find a job by: it may have ended.

        Raises:
            JobNotFound: no such job, or it is another tenant's.
            JobChanged: it has another version by now.
            JobConflict: it has ended, and more than its labels was to be changed; or it runs, and more than these and
                its deadline.
            QueueNotFound: the queue that it is to wait in is not there.
        """
        with write(self._engine) as connection:
            job = self._lock_job(connection, job_id, tenant_id)
            if version is not None and job.version != version:
                raise JobChanged(f"{job.id} has version {job.version}, not {version}", job_id=job.id)
            if job.state not in _changeable_in(changes):
                raise JobConflict(f"{job.id} is {job.state}; this cannot be changed any more", job_id=job.id)
            if "queue" in changes:
                self._hold_queue(connection, changes["queue"])
            return self._change(connection, job, changes, actor) if changes else job


def _changeable_in(changes: JobChanges) -> Collection[JobState]:
    """Return the states of a job in which all of this may be changed."""
    asked = changes.keys()
    if asked and asked <= {"labels"}:
        return tuple(JobState)
    return ACTIVE if asked <= {"deadline_at", "labels"} else WAITING


def queue_deleted(job: Job) -> QueueNotFound:
    """Say that a job cannot wait again where it waited before."""
    words = f"{job.id} was in the queue {job.queue}, which is deleted: submit it anew, or have the queue made again"
    return QueueNotFound(words, queue=job.queue)
