"""EvaluationRun: takes one claimed evaluate job from its artifact or model to a perplexity."""

import json
import threading
from pathlib import Path
from typing import Any

import structlog

from duquant.config import TextSource
from duquant.errors import DuQuantError
from infra.artifact_keys import ArtifactKeys
from infra.errors import JobNotFound
from infra.jobs import Claim, JobState, JobStore
from infra.storage import ObjectStore
from workers.endings import JobFailed, JobStopped
from workers.inputs import find_text, model_reference
from workers.lease import LeaseKeeper
from workers.measure import PROGRESS, STOP
from workers.metrics import STEP_FAILURES
from workers.settings import WorkerSettings
from workers.tasks import Completion, EvaluationSpec, EvaluationTask, Executor

log = structlog.stdlib.get_logger(__name__)

_MAX_ATTEMPTS = 3
_COLLECT_S = 0.5


class EvaluationRun:
    """One claim of one evaluate job. The measuring is one task of the executor; this watches it."""

    has_progressed = False
    """An evaluation has no steps that a later try could go on from."""

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
        self._shown: tuple[int, int] | None = None

    def run(self) -> dict[str, Any]:
        """Measure; return the job's result.

        Raises:
            JobFailed: it cannot be done (now).
            JobStopped: it must not be done any further.
            InfraError: database or object storage failed.
        """
        (self._work_dir / STOP).unlink(missing_ok=True)
        (self._work_dir / PROGRESS).unlink(missing_ok=True)
        try:
            spec = self._spec()
        except DuQuantError as err:
            raise JobFailed("bad_input", str(err)) from err
        self._store.progress(self._claim, phase="load", done=0, total=0)
        metrics = self._drive(spec)
        artifact_job = self._claim.job.spec.get("artifact_job_id")
        return {"artifact_job_id": artifact_job, "metrics": metrics, "seconds": metrics["seconds"]}

    def _spec(self) -> EvaluationSpec:
        job, settings = self._claim.job, self._settings
        wanted = job.spec["evaluation"]
        text = find_text(job, TextSource(**wanted["text"]), settings, self._storage, what="evaluation text")
        artifact_job = job.spec.get("artifact_job_id")
        return EvaluationSpec(
            job_id=job.id,
            work_dir=self._work_dir,
            model_cache=settings.models,
            allow_hub=settings.allow_hub,
            device=settings.device,
            text=wanted["text"],
            seq_len=wanted["seq_len"],
            windows=wanted["windows"],
            model=model_reference(job, settings) if artifact_job is None else None,
            manifest_key=None if artifact_job is None else self._manifest_key(artifact_job),
            text_key=text.key,
            text_file=text.file,
        )

    def _manifest_key(self, artifact_job: str) -> str:
        try:
            made_by = self._store.get(artifact_job, self._claim.job.tenant_id)
        except JobNotFound as err:
            raise JobFailed("bad_input", str(err)) from err
        if made_by.state is not JobState.SUCCEEDED:
            raise JobFailed("bad_input", f"{artifact_job} is {made_by.state} and has no artifact")
        return ArtifactKeys(made_by.tenant_id, made_by.id).manifest

    def _drive(self, spec: EvaluationSpec) -> dict[str, Any]:
        """Keep the task running until it has ended well."""
        attempt = 1
        self._executor.submit(EvaluationTask(spec, attempt))
        while True:
            if self._lease.lost.is_set() or self._lease.stop_requested.is_set() or self._stopping.is_set():
                # A thread cannot be stopped from outside; the worker looks for this file after each window.
                (self._work_dir / STOP).touch()
                raise JobStopped
            self._show_progress()
            for completion in self._executor.collect(_COLLECT_S):
                if completion.kind == "ok":
                    assert completion.result is not None
                    self._show_progress()
                    return {**completion.result, "device": completion.device}
                self._handle_failure(completion, attempt)
                attempt += 1
                self._executor.submit(EvaluationTask(spec, attempt))

    def _handle_failure(self, completion: Completion[EvaluationTask], attempt: int) -> None:
        """Note a failed attempt; raise when there is no point in another."""
        STEP_FAILURES.labels(completion.kind).inc()
        log.warning(
            "evaluation_failed",
            attempt=attempt,
            kind=completion.kind,
            error=completion.error,
        )
        detail = completion.error or ""
        if completion.kind == "bad_input":
            raise JobFailed("bad_input", detail)
        if attempt >= _MAX_ATTEMPTS:
            raise JobFailed("error", detail, retry_as=completion.retry_as)

    def _show_progress(self) -> None:
        try:
            done, total = json.loads((self._work_dir / PROGRESS).read_bytes())
        except FileNotFoundError:
            return
        if (done, total) != self._shown:
            self._shown = done, total
            self._store.progress(self._claim, phase="windows", done=done, total=total)
