"""The dispatcher: claims jobs, one at a time, and drives each through an executor."""

import threading
from collections.abc import Mapping
from typing import Any

import structlog

from duquant.errors import DuQuantError
from infra import tracing
from infra.errors import InfraError, JobConflict, LeaseLost, TransientError
from infra.jobs import ACTIVE, Claim, FailureReason, JobState, JobStore
from infra.metrics import snapshot
from infra.storage import ObjectStore
from workers.claimed_run import ClaimedRun
from workers.endings import JobFailed, JobStopped
from workers.evaluation_run import EvaluationRun
from workers.gated_run import GatedRun
from workers.lease import LeaseKeeper
from workers.metrics import CLAIM_SECONDS, ENDINGS, WAIT_SECONDS
from workers.retries import ErrorClass, class_of, pause_s
from workers.scratch import Scratch
from workers.settings import WorkerSettings
from workers.tasks import Executor

log = structlog.stdlib.get_logger(__name__)

_MAX_IDLE_FACTOR = 5
_ENDINGS = {JobState.FAILED: "failed", JobState.CANCELLED: "cancelled"}
_RUNS: Mapping[str, type[ClaimedRun]] = {"quantize": GatedRun, "evaluate": EvaluationRun}


class Dispatcher:
    """Runs until `stop` is called. It is the only writer of the rows of the job that it holds."""

    def __init__(
        self, store: JobStore, storage: ObjectStore, executor: Executor, settings: WorkerSettings, *, owner: str
    ) -> None:
        self._store, self._storage, self._executor, self._settings = store, storage, executor, settings
        self._owner = owner
        self._scratch = Scratch(settings.scratch)
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ask for a graceful end: the running job goes back to the queue. Safe in a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Claim and run jobs until stopped."""
        beat = threading.Thread(target=self._say_alive, name="worker-beat", daemon=True)
        beat.start()
        idle = 0
        try:
            self._clean_scratch()
            while not self._stopping.is_set():
                idle = 0 if self._turn() else min(idle + 1, _MAX_IDLE_FACTOR)
                if idle:
                    # Polling is the truth; it slows down a little while nothing comes.
                    self._stopping.wait(self._settings.poll_seconds * (1 + idle / _MAX_IDLE_FACTOR))
        finally:
            self._stopping.set()
            beat.join()
            self._executor.close()

    def _turn(self) -> bool:
        """Take back expired jobs, and run one if there is one. Database trouble is waited out."""
        try:
            self._store.sweep()
            with CLAIM_SECONDS.time():
                claim = self._store.claim(self._owner, lease_seconds=self._settings.lease_seconds)
        except TransientError as err:
            log.warning("queue_unreachable", error=str(err))
            return False
        if claim is None:
            return False
        self.run_job(claim)
        return True

    def run_job(self, claim: Claim) -> None:
        """Run one claimed job to whatever end it comes to."""
        job = claim.job
        if job.attempt == 1 and not job.lease_losses and job.started_at is not None:
            WAIT_SECONDS.observe(max(job.started_at - job.run_at, 0) / 1000)
        lease = LeaseKeeper(
            self._store, claim, lease_seconds=self._settings.lease_seconds, beat_seconds=self._settings.beat_seconds
        )
        facts = {"duquant.job_id": job.id, "duquant.fence": claim.fence, "duquant.tenant": job.tenant_id}
        with (
            # On every line from here on, of ours and of the libraries.
            structlog.contextvars.bound_contextvars(job_id=job.id, fence=claim.fence),
            tracing.span(f"job {job.kind}", parent=job.traceparent, attributes=facts),
        ):
            log.info("job_claimed", attempt=job.attempt)
            try:
                with lease:
                    self._run_held(claim, lease)
            except LeaseLost:
                ENDINGS.labels("lost").inc()
                log.warning("lease_lost")
            except InfraError as err:
                # The verdict itself could not be written: the lease runs out and the job is taken up again.
                ENDINGS.labels("lost").inc()
                log.warning("verdict_not_written", error=str(err))

    def _run_held(self, claim: Claim, lease: LeaseKeeper) -> None:
        run: ClaimedRun | None = None
        try:
            run = _RUNS[claim.job.kind](
                self._store,
                self._storage,
                self._executor,
                self._settings,
                claim,
                lease=lease,
                stopping=self._stopping,
                work_dir=self._scratch.take(claim),
            )
            self._complete(claim, run, run.run())
        except JobStopped:
            self._stop_job(claim, lease)
        except LeaseLost:
            self._executor.abandon()
            raise
        except JobFailed as err:
            self._fail(claim, err.reason, str(err), retry_as=err.retry_as, run=run)
        except TransientError as err:
            self._fail(claim, "error", str(err), retry_as=ErrorClass.OUTAGE, run=run)
        except OSError as err:
            detail = f"{err.strerror or err}: {err.filename or self._settings.scratch}"
            self._fail(claim, "error", detail, retry_as=class_of(err), run=run)
        except (InfraError, DuQuantError) as err:
            self._fail(claim, "error", str(err))
        except Exception as err:  # the job loop's last resort: a bug must fail its job, not the dispatcher
            log.exception("job_crashed")
            self._fail(claim, "error", f"unexpected {type(err).__name__}: {err}")

    def _complete(self, claim: Claim, run: ClaimedRun, result: dict[str, Any]) -> None:
        try:
            run.complete(result)
        except JobConflict:
            # A cancel that came while the manifest was written; without one this raises, too.
            self._store.finish_cancel(claim)
            ENDINGS.labels("cancelled").inc()
            log.info("job_cancelled")
        else:
            ENDINGS.labels("succeeded").inc()
            log.info("job_succeeded", seconds=result["seconds"])
        self._scratch.drop(claim.job.id)

    def _stop_job(self, claim: Claim, lease: LeaseKeeper) -> None:
        """End a job that must not go on: nobody may write its files any more before we let go of it."""
        self._executor.abandon()
        if lease.lost.is_set():
            raise LeaseLost
        if lease.stop_reason == "cancel":
            self._store.finish_cancel(claim)
            self._scratch.drop(claim.job.id)
            ENDINGS.labels("cancelled").inc()
            log.info("job_cancelled")
        elif lease.stop_reason == "deadline":
            self._fail(claim, "deadline", "its deadline passed while it ran")
        else:
            self._store.release(claim)
            ENDINGS.labels("released").inc()
            log.info("job_released")

    def _fail(
        self,
        claim: Claim,
        reason: FailureReason,
        detail: str,
        *,
        retry_as: ErrorClass | None = None,
        run: ClaimedRun | None = None,
    ) -> None:
        self._executor.abandon()
        has_progressed = run is not None and run.has_progressed
        tries = 1 if has_progressed else claim.job.attempt
        delay = None if retry_as is None else pause_s(retry_as, tries, first_s=self._settings.retry_seconds)
        told = self._settings.told(detail)
        job = self._store.fail(claim, reason, told, retry_in_seconds=delay, has_progressed=has_progressed)
        # A job that was to be cancelled anyway is, whatever went wrong meanwhile.
        ENDINGS.labels(_ENDINGS.get(job.state, "retried")).inc()
        log.warning("job_failed", state=job.state, reason=reason, detail=detail)
        if job.state.is_terminal:
            self._scratch.drop(job.id)

    def _say_alive(self) -> None:
        info = {"slots": self._executor.slots, "executor": self._settings.executor, "device": self._settings.device}
        while True:
            try:
                self._store.worker_beat(self._owner, {**info, "metrics": snapshot()})
            except InfraError as err:
                log.warning("worker_beat_failed", error=str(err))
            if self._stopping.wait(self._settings.beat_seconds):
                break
        try:
            self._store.worker_gone(self._owner)
        except InfraError as err:
            log.warning("worker_sign_off_failed", error=str(err))

    def _clean_scratch(self) -> None:
        """Delete what jobs that ended elsewhere left behind."""
        try:
            active = {job.id for state in ACTIVE for job in self._store.list(None, state=state, limit=1000)}
        except InfraError as err:
            log.warning("scratch_not_cleaned", error=str(err))
            return
        self._scratch.clean(active)
