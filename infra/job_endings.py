"""How a try ends: by its worker's own word, under its claim's fence."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NoReturn

from sqlalchemy import Connection, bindparam, exists, func, select, update
from sqlalchemy.sql.dml import ReturningUpdate

from infra.database import alone, write, writes_at_once
from infra.errors import JobConflict
from infra.job_measures import JobMeasures
from infra.job_model import TRANSITIONS, CardRevision, Claim, EventType, FailureReason, Job, JobState
from infra.job_results import artifact_of, measured_of, new_artifact_of, record_artifact
from infra.job_rows import IS_WATCHED, MOVED, clean, state_is
from infra.outbox import post_job_event
from infra.prepared import Prepared, Row, together
from infra.schema import artifacts, evaluations, job_layers, jobs


class JobEndings(JobMeasures):
    """Complete, fail, release."""

    def complete(self, claim: Claim, result: Mapping[str, Any], *, card: CardRevision | None = None) -> Job:
        """End the job well; its artifact or evaluation is listed from the same moment, and on the artifact's card.

        Also after its deadline: what is done is done.

        Raises:
            LeaseLost: the claim is stale.
            JobConflict: a cancel was requested (finish it), or a planned layer is not done.
            CardOutdated: the artifact has got another card since this one was made; nothing was written.
        """
        values = {"claimed_id": claim.job.id, "held_fence": claim.fence, "made": dict(result)}
        if card is None and (row := self._succeed_quickly(claim, values)) is not None:
            return Job.from_row(row)
        with write(self._engine) as connection:
            with together(connection):
                row = self._succeed.row(connection, values)
                if row is not None:
                    job = Job.from_row(row)
                    data = {"from": JobState.RUNNING, "to": job.state}
                    self._event(connection, job.id, EventType.SUCCEEDED, claim.owner, data)
                    record_artifact(connection, job)
            if row is None:
                self._explain(connection, claim)
            self._record_what_it_measured(connection, job)
            if card is not None:
                self._swing_card(connection, card)
            if row["is_watched"]:
                post_job_event(connection, job, self._now())
            if row["awaited"]:
                self._move_dependents(connection, job)
            return job

    def _record_what_it_measured(self, connection: Connection, job: Job) -> None:
        """Write the evaluation of an evaluate job; give a gated artifact what its own job has measured on it."""
        measured = measured_of(job)
        if measured is not None:
            self._put_measured(connection, job, measured)
        if "quality_gate" in (job.result or {}):
            made = select(artifacts.c.id).where(artifacts.c.job_id == job.id).scalar_subquery()
            own = (evaluations.c.job_id == job.id) & (evaluations.c.artifact_job_id == job.id)
            connection.execute(update(evaluations).where(own).values(artifact_id=made))

    def _succeed_quickly(self, claim: Claim, values: Mapping[str, Any]) -> Row | None:
        """End a plain job well in one statement. None where more has to be done, or something is wrong."""
        artifact = artifact_of(claim.job.kind, values["made"])
        if artifact is None or "quality_gate" in values["made"] or not writes_at_once(self._engine.dialect):
            return None
        made = {f"artifact_{name}": value for name, value in artifact.items()}
        with alone(self._engine) as connection:
            return self._succeed_at_once.row(connection, {**values, **made, "actor": claim.owner})

    @cached_property
    def _succeed_at_once(self) -> Prepared:
        """As `complete`, in one statement, for a job that nobody waits for and no webhook tells of."""
        return self._at_once(
            self._success().where(jobs.c.awaited == 0, ~IS_WATCHED),
            EventType.SUCCEEDED,
            lambda moved: {"from": JobState.RUNNING, "to": moved.c.state},
            new_artifact_of,
        )

    @cached_property
    def _succeed(self) -> Prepared:
        return Prepared(self._success())

    def _success(self) -> ReturningUpdate[Any]:
        """The way from running to succeeded, with all that it needs as its guard."""
        assert JobState.SUCCEEDED in TRANSITIONS[JobState.RUNNING]
        is_unfinished = exists().where(job_layers.c.job_id == jobs.c.id, job_layers.c.state != "done").correlate(jobs)
        return (
            update(jobs)
            .where(jobs.c.id == bindparam("claimed_id"), jobs.c.fence == bindparam("held_fence"))
            .where(state_is(JobState.RUNNING), jobs.c.lease_until >= self._now(), ~is_unfinished)
            .values(
                state=JobState.SUCCEEDED,
                version=jobs.c.version + 1,
                finished_at=self._now(),
                lease_owner=None,
                lease_until=None,
                result=bindparam("made", type_=jobs.c.result.type),
            )
            .returning(*MOVED)
        )

    def _explain(self, connection: Connection, claim: Claim) -> NoReturn:
        """Raise what kept a job from succeeding."""
        job = self._held(connection, claim)
        if job.state is JobState.CANCELLING:
            raise JobConflict(f"{job.id} is cancelling; it cannot become succeeded", job_id=job.id, state=job.state)
        unfinished = select(func.count()).where(job_layers.c.job_id == job.id, job_layers.c.state != "done")
        missing = connection.execute(unfinished).scalar_one()
        raise JobConflict(f"{job.id} cannot succeed: {missing} layers are not done", job_id=job.id)

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
                return self._schedule_retry(connection, job, claim.owner, reason, detail, retry_in_seconds, attempt)
            final = reason if retry_in_seconds is None else "retries_exhausted"
            return self._end_failed(connection, job, final, detail, claim.owner)

    def _schedule_retry(
        self,
        connection: Connection,
        job: Job,
        actor: str,
        reason: FailureReason,
        detail: str,
        seconds: float,
        attempt: int,
    ) -> Job:
        return self._transition(
            connection,
            job,
            JobState.SCHEDULED,
            EventType.RETRY_SCHEDULED,
            actor=actor,
            data={"reason": reason, "detail": detail, "in_seconds": seconds},
            # The place in the queue stays: a job that waits for a retry gets no younger.
            run_at=self._after(seconds),
            attempt=attempt,
            reason=reason,
            detail=detail,
        )

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
