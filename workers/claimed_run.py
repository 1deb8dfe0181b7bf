"""What the runs of all kinds of jobs have in common: their parts, when they stop, and what a failed task means."""

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import structlog

from infra.jobs import Claim, Job, JobStore
from infra.storage import ObjectStore
from workers.endings import JobFailed
from workers.lease import LeaseKeeper
from workers.metrics import STEP_FAILURES
from workers.settings import WorkerSettings
from workers.tasks import Completion, Executor

log = structlog.stdlib.get_logger(__name__)

COLLECT_S = 0.5
"""How long a run waits for its executor before it looks whether it should stop."""
_MAX_ATTEMPTS = 3


class ClaimedRun(ABC):
    """One claim of one job. All writes to the job go through here, on one thread, with the claim's fence."""

    def __init__(
        self,
        store: JobStore,
        storage: ObjectStore,
        executor: Executor,
        settings: WorkerSettings,
        claim: Claim,
        *,
        lease: LeaseKeeper,
        stopping: threading.Event,
        work_dir: Path,
    ) -> None:
        self._store, self._storage, self._executor = store, storage, executor
        self._settings, self._claim, self._lease = settings, claim, lease
        self._stopping = stopping
        self._work_dir = work_dir
        self.has_progressed = False
        """Whether this claim has committed something that a later try goes on from."""

    @abstractmethod
    def run(self) -> dict[str, Any]:
        """Do everything that is not done yet; return the job's result.

        Raises:
            JobFailed: it cannot be done (now).
            JobStopped: it must not be done any further.
            InfraError: database or object storage failed.
        """

    def complete(self, result: dict[str, Any]) -> Job:
        """End the job well.

        Raises:
            JobConflict: a cancel was requested meanwhile.
            InfraError: database or object storage failed.
        """
        return self._store.complete(self._claim, result)

    @property
    def _must_stop(self) -> bool:
        return self._lease.lost.is_set() or self._lease.stop_requested.is_set() or self._stopping.is_set()

    @staticmethod
    def _check_another_try(completion: Completion[Any], detail: str, attempt: int) -> None:
        """Note a failed attempt at a task.

        Raises:
            JobFailed: there is no point in another.
        """
        STEP_FAILURES.labels(completion.kind).inc()
        log.warning("task_failed", task=completion.task.label, kind=completion.kind, error=completion.error)
        if completion.kind == "bad_input":
            raise JobFailed("bad_input", detail)
        if attempt >= _MAX_ATTEMPTS:
            raise JobFailed("error", detail, retry_as=completion.retry_as)
