"""What the queue does by itself: take jobs back from the dead, queue what is due, fail what is too late."""

from sqlalchemy import Connection, select

from infra.database import write
from infra.job_claims import JobClaims
from infra.job_endings import JobEndings
from infra.job_model import HELD, WAITING, EventType, Job, JobState
from infra.job_rows import SWEEPER, state_is
from infra.schema import jobs


class JobSweep(JobClaims, JobEndings):
    """The sweeper. Any process may call it at any time, several at once too."""

    def sweep(self) -> int:
        """Take jobs back from workers whose lease has expired; return how many.

        Scheduled jobs whose time has come are queued, and waiting ones whose deadline has passed fail. Running jobs are
        told at their next beat.
        """
        expired = (
            select(jobs)
            .where(state_is(*HELD), jobs.c.lease_until.is_not(None), jobs.c.lease_until < self._now())
            .order_by(jobs.c.id)
        )
        overdue = (
            select(jobs)
            .where(state_is(*WAITING), jobs.c.finished_at.is_(None))
            .where(jobs.c.deadline_at.is_not(None), jobs.c.deadline_at <= self._now())
            .order_by(jobs.c.id)
        )
        with write(self._engine) as connection:
            self._promote(connection)
            rows = self._locked(connection, expired, skip_locked=True)
            for row in rows:
                self._take_back(connection, Job.from_row(row))
        with write(self._engine) as connection:
            for row in self._locked(connection, overdue, skip_locked=True):
                self._end_overdue(connection, row["id"])
        return len(rows)

    def _end_overdue(self, connection: Connection, job_id: str) -> None:
        # The failure of one takes along those that wait for it: read each when its turn comes.
        job = self._lock_job(connection, job_id)
        if job.state in WAITING:
            self._end_failed(connection, job, "deadline", "its deadline passed while it waited", SWEEPER)

    def _take_back(self, connection: Connection, job: Job) -> None:
        if job.state is JobState.CANCELLING:
            self._end_cancel(connection, job, SWEEPER)
            return
        losses = job.lease_losses + 1
        if losses > job.max_lease_losses:
            detail = f"its workers vanished {losses} times; the last was {job.lease_owner}"
            self._end_failed(connection, job, "lease_losses_exhausted", detail, SWEEPER)
            return
        self._transition(
            connection,
            job,
            JobState.QUEUED,
            EventType.LEASE_LOST,
            actor=SWEEPER,
            data={"owner": job.lease_owner, "fence": job.fence, "lease_losses": losses},
            lease_losses=losses,
            attempt=job.attempt - 1,
        )
