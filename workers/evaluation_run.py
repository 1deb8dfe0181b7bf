"""EvaluationRun: takes one claimed evaluate job from its artifact or model to a perplexity."""

import json
from typing import Any

from duquant.config import TextSource
from duquant.errors import DuQuantError
from infra.artifact_keys import ArtifactKeys
from infra.errors import JobNotFound
from infra.jobs import JobState
from workers.claimed_run import COLLECT_S, ClaimedRun
from workers.endings import JobFailed, JobStopped
from workers.inputs import find_text, model_reference
from workers.measure import PROGRESS, STOP
from workers.tasks import EvaluationSpec, EvaluationTask


class EvaluationRun(ClaimedRun):
    """One claim of one evaluate job. The measuring is one task of the executor; this watches it."""

    def __init__(self, *parts: Any, **more_parts: Any) -> None:
        super().__init__(*parts, **more_parts)
        self._shown: tuple[int, int] | None = None

    def run(self) -> dict[str, Any]:
        """Measure; return the job's result. An evaluation has no steps that a later try could go on from."""
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
            if self._must_stop:
                # A thread cannot be stopped from outside; the worker looks for this file after each window.
                (self._work_dir / STOP).touch()
                raise JobStopped
            self._show_progress()
            for completion in self._executor.collect(COLLECT_S):
                if completion.kind == "ok":
                    assert completion.result is not None
                    self._show_progress()
                    return {**completion.result, "device": completion.device}
                self._check_another_try(completion, completion.error or "", attempt)
                attempt += 1
                self._executor.submit(EvaluationTask(spec, attempt))

    def _show_progress(self) -> None:
        try:
            done, total = json.loads((self._work_dir / PROGRESS).read_bytes())
        except FileNotFoundError:
            return
        if (done, total) != self._shown:
            self._shown = done, total
            self._store.progress(self._claim, phase="windows", done=done, total=total)
