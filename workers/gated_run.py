"""GatedRun: a quantize job that may have a quality gate, which it passes before it may succeed."""

import json
from collections.abc import Mapping
from typing import Any

from duquant.config import QualityGate, Recipe
from duquant.errors import DuQuantError
from infra.job_measures import baseline_fingerprint, baseline_settings, measured_fingerprint
from infra.jobs import Measured
from workers import gate
from workers.cards import put_card, results_of
from workers.endings import JobFailed
from workers.job_run import JobRun
from workers.measuring import MeasuringRun, Target


class GatedRun(JobRun, MeasuringRun):
    """One claim of one quantize job. With a quality gate the artifact is measured when it is stored, and then judged.

    What was measured is written before the verdict, and stays when the job fails for it.
    """

    def run(self) -> dict[str, Any]:
        """Make the artifact, and see what it is worth; return the job's result."""
        wanted = self._gate()
        if wanted is None:
            return super().run()
        # Before the work: what cannot be measured is said at once.
        artifact = self._target(is_baseline=False)
        baseline = None if wanted.max_perplexity_increase is None else self._target(is_baseline=True)
        result = super().run()
        before = None if baseline is None else self._measured_for_good(baseline)
        measured = self._measured_for_good(artifact)
        checks = gate.check(wanted, measured.metrics, measured.parts, None if before is None else before.metrics)
        missed = [check.words for check in checks if not check.passed]
        if missed:
            raise JobFailed("quality_gate", "; ".join(missed))
        verdict = {"checks": [check.to_dict() for check in checks]}
        return {**result, "artifact": self._carded(result["artifact"], verdict), "quality_gate": verdict}

    def _gate(self) -> QualityGate | None:
        try:
            return Recipe.from_dict(self._claim.job.spec["recipe"]).quality_gate
        except DuQuantError as err:
            raise JobFailed("bad_input", str(err)) from err

    def _target(self, *, is_baseline: bool) -> Target:
        job = self._claim.job
        measurement: Mapping[str, Any] = job.spec["quality_gate"]
        if is_baseline:
            measurement = {**measurement, "evaluation": baseline_settings(measurement["evaluation"])}
        folder = self._work_dir / ("baseline" if is_baseline else "gate")
        try:
            spec = self._evaluation_spec(measurement, folder, manifest_key=None if is_baseline else self._keys.manifest)
        except DuQuantError as err:
            raise JobFailed("bad_input", f"quality gate: {err}") from err
        return Target(
            baseline_fingerprint(job.spec) if is_baseline else measured_fingerprint(job.spec, job.id),
            measurement["evaluation"],
            spec,
            artifact_job_id=None if is_baseline else job.id,
            label="baseline " if is_baseline else "gate ",
        )

    def _measured_for_good(self, target: Target) -> Measured:
        """Measure, unless somebody has; write that it is complete, unless that is somebody else's row."""
        known = self._store.measured_before(self._claim.job, target.fingerprint, is_baseline=True)
        measured = self._measured(target, is_baseline=True)
        if known is None or not known.is_complete:
            self._store.record_measured(self._claim, measured)
        return measured

    def _carded(self, artifact: Mapping[str, Any], verdict: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the job has made with the model card that has its numbers."""
        job = self._claim.job
        document = json.loads(self._storage.get_bytes(self._keys.manifest))
        evaluation = {"results": results_of(self._store.measured_on(job, job.id)), "quality_gate": dict(verdict)}
        key, revised = put_card(self._storage, document, evaluation, keys=self._keys, claim=self._claim, attempt=1)
        size = sum(entry["size_bytes"] for entry in revised["files"])
        return {**artifact, "manifest_key": key, "size_bytes": size}
