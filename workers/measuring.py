"""Measuring: one evaluation of a claim, from what is known already to the last part, each written when it is done."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from duquant.evaluation.plan import EvaluationPlan
from infra.jobs import Measured
from workers.claimed_run import COLLECT_S, ClaimedRun
from workers.endings import JobFailed, JobStopped
from workers.inputs import local_plan, model_reference
from workers.measure import PROGRESS, STOP, Record, part_ids
from workers.reports import put_report
from workers.tasks import EvaluationSpec, EvaluationTask

_LONGEST_PHASE = 64


@dataclass(frozen=True)
class Target:
    """What is measured, and how."""

    fingerprint: str
    settings: Mapping[str, Any]
    """What was asked for, as it stands in the job's spec."""
    spec: EvaluationSpec
    artifact_job_id: str | None = None
    """The job that made it; none for an unquantized model."""
    label: str = ""
    """What phases and errors begin with, where a job measures more than one thing."""


class MeasuringRun(ClaimedRun):
    """A run that measures. The measuring is one task of the executor; this watches it."""

    _shown: tuple[str, int, int] | None = None
    _billed = 0
    """Numbers under which this claim has billed measuring."""

    def _evaluation_spec(
        self, measurement: Mapping[str, Any], work_dir: Path, *, manifest_key: str | None
    ) -> EvaluationSpec:
        """Return what a worker needs to measure an artifact, or (without a manifest) the job's unquantized model.

        Raises:
            JobFailed: the model, a text or a task file is not allowed here, is gone, or has changed.
            DuQuantError: the plan makes no sense.
        """
        job, settings = self._claim.job, self._settings
        return EvaluationSpec(
            job_id=job.id,
            work_dir=work_dir,
            model_cache=settings.models,
            allow_hub=settings.allow_hub,
            device=settings.device,
            plan=local_plan(job, measurement, settings, self._storage, self._work_dir),
            task_roots=(*settings.text_roots, self._work_dir),
            model=model_reference(job, settings) if manifest_key is None else None,
            manifest_key=manifest_key,
        )

    def _measured(self, target: Target, *, is_baseline: bool = False) -> Measured:
        """Measure what has not been measured yet; return everything, complete.

        What the tenant's other jobs have measured counts, too: for a job that was forced only as a baseline.

        Raises:
            JobFailed: a part cannot be measured (now). What was done before it is written.
            JobStopped: it must not go on.
        """
        job = self._claim.job
        known = self._store.measured_before(job, target.fingerprint, is_baseline=is_baseline)
        record = Record()
        if known is not None:
            record = Record(known.metrics, {name: part.get("names", []) for name, part in _done(known.parts).items()})
        if known is not None and known.is_complete:
            return replace(_written(target, record, {}), is_complete=True, report_key=known.report_key)
        record = self._measure_rest(target, record)
        report_key = self._report(target, record)
        return replace(_written(target, record, {}), is_complete=True, report_key=report_key)

    def _report(self, target: Target, record: Record) -> str | None:
        """Store the report, beside what is known of the unquantized model; return its key."""
        baseline = self._store.baseline_of(self._claim.job)
        return put_report(
            self._storage,
            self._claim,
            record.metrics,
            work_dir=self._work_dir,
            is_baseline=target.artifact_job_id is None,
            baseline=None if baseline is None else baseline.metrics,
        )

    def _measure_rest(self, target: Target, record: Record) -> Record:
        """Keep the task running until it has ended well; write each part when it is done."""
        folder = target.spec.work_dir
        folder.mkdir(exist_ok=True)
        for left in (STOP, PROGRESS):
            (folder / left).unlink(missing_ok=True)
        if len(Record.read(folder).parts) <= len(record.parts):
            record.write(folder)
        # An earlier claim may have died between the end of a part and its row.
        record = self._write_new_parts(target, record)
        self._store.progress(self._claim, phase=self._phase(target, "load"), done=0, total=0)
        attempt = 1
        self._executor.submit(EvaluationTask(target.spec, attempt))
        while True:
            if self._must_stop:
                # A thread cannot be stopped from outside; the worker looks for this file after each step.
                (folder / STOP).touch()
                raise JobStopped
            self._show_progress(target)
            for completion in self._executor.collect(COLLECT_S):
                self._show_progress(target)
                record = self._write_new_parts(target, record, completion.device)
                if completion.kind == "ok":
                    return record
                error = completion.error or ""
                try:
                    self._check_another_try(completion, self._where(target, record) + error, attempt)
                except JobFailed:
                    self._write_failure(target, record, error)
                    raise
                attempt += 1
                self._executor.submit(EvaluationTask(target.spec, attempt))
            record = self._write_new_parts(target, record)

    def _write_new_parts(self, target: Target, before: Record, device: str = "unknown") -> Record:
        """Write the parts that have been done since; return the record as it is now."""
        record = Record.read(target.spec.work_dir)
        if record.parts.keys() == before.parts.keys():
            return before
        self._billed += 1
        self._store.record_measured(
            self._claim,
            _written(target, record, {}),
            # Layers have the numbers from -1 on.
            slot=-1 - self._billed,
            seconds=record.metrics["seconds"] - before.metrics.get("seconds", 0.0),
            device=record.metrics.get("device", device),
        )
        self.has_progressed = True
        return record

    def _write_failure(self, target: Target, record: Record, error: str) -> None:
        """Say in the row which part failed, where others have been done."""
        if record.parts:
            failed = {next(iter(_missing(target, record)), ""): self._settings.told(error)}
            self._store.record_measured(self._claim, _written(target, record, failed))

    def _where(self, target: Target, record: Record) -> str:
        """Return the beginning of an error: which part it is of, where that is not plain."""
        missing = _missing(target, record)
        is_plain = len(missing) == 1 and not record.parts
        parts = [target.label.strip(), "" if is_plain or not missing else missing[0]]
        return "".join(f"{part}: " for part in parts if part)

    def _show_progress(self, target: Target) -> None:
        try:
            phase, done, total = json.loads((target.spec.work_dir / PROGRESS).read_bytes())
        except FileNotFoundError:
            return
        shown = (self._phase(target, phase), done, total)
        if shown != self._shown:
            self._shown = shown
            self._store.progress(self._claim, phase=shown[0], done=done, total=total)

    @staticmethod
    def _phase(target: Target, phase: str) -> str:
        return f"{target.label}{phase}"[:_LONGEST_PHASE]


def _done(parts: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Mapping[str, Any]]:
    return {name: part for name, part in (parts or {}).items() if part["state"] == "done"}


def _missing(target: Target, record: Record) -> list[str]:
    return [part for part in part_ids(EvaluationPlan.from_dict(target.spec.plan)) if part not in record.parts]


def _written(target: Target, record: Record, failed: Mapping[str, str]) -> Measured:
    """Return what is written of a record; `failed` has the errors of parts."""
    parts: dict[str, dict[str, Any]] = {}
    for part in part_ids(EvaluationPlan.from_dict(target.spec.plan)):
        if part in record.parts:
            parts[part] = {"state": "done", "names": record.parts[part]} if record.parts[part] else {"state": "done"}
        elif part in failed:
            parts[part] = {"state": "failed", "error": failed[part]}
        else:
            parts[part] = {"state": "pending"}
    return Measured(
        fingerprint=target.fingerprint,
        artifact_job_id=target.artifact_job_id,
        settings=target.settings,
        metrics=record.metrics,
        parts=parts,
        is_complete=False,
    )
