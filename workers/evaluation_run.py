"""EvaluationRun: takes one claimed evaluate job from its artifact or model to its numbers."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import structlog

from duquant.errors import DuQuantError
from infra.artifact_keys import ArtifactKeys
from infra.errors import CardOutdated, InfraError, JobNotFound, LeaseLost, TransientError
from infra.jobs import CardRevision, Job, JobState
from workers.cards import put_card, results_of
from workers.endings import JobFailed
from workers.measuring import MeasuringRun, Target

_T = TypeVar("_T")

log = structlog.stdlib.get_logger(__name__)

_MOST_CARDS = 20
"""Cards made for one evaluation: each but the last was overtaken by another evaluation of the artifact."""


class EvaluationRun(MeasuringRun):
    """One claim of one evaluate job."""

    def run(self) -> dict[str, Any]:
        """Measure what has not been measured yet; return the job's result."""
        try:
            target = self._target()
        except DuQuantError as err:
            raise JobFailed("bad_input", str(err)) from err
        try:
            measured = self._measured(target)
        except JobFailed:
            self._card_of_what_is_done(target)
            raise
        return {
            "artifact_job_id": target.artifact_job_id,
            "metrics": dict(measured.metrics),
            "parts": dict(measured.parts),
            "report_key": measured.report_key,
            "seconds": measured.metrics["seconds"],
        }

    def complete(self, result: dict[str, Any]) -> Job:
        """End the job well, with a model card that has its numbers and those of all others."""
        return self._with_card(lambda card: self._store.complete(self._claim, result, card=card), is_whole=True)

    def _card_of_what_is_done(self, target: Target) -> None:
        """Put the numbers of the parts before the one that failed on the model card."""
        try:
            known = self._store.measured_before(self._claim.job, target.fingerprint)
            if known is not None and known.metrics:
                self._with_card(self._put_card, is_whole=False)
        except LeaseLost:
            raise
        except (InfraError, DuQuantError, OSError) as err:
            # How the job ended matters more than its card; a retry makes another.
            log.warning("card_not_made", error=str(err))

    def _put_card(self, card: CardRevision | None) -> None:
        if card is not None:
            self._store.put_card(self._claim, card)

    def _with_card(self, store: Callable[[CardRevision | None], _T], *, is_whole: bool) -> _T:
        """Make a card and store it; make another as long as other evaluations are faster."""
        for attempt in range(1, _MOST_CARDS + 1):
            try:
                return store(self._card(attempt, is_whole=is_whole))
            except CardOutdated:
                continue
        raise TransientError("the artifact's model card changes faster than it can be made anew")

    def _target(self) -> Target:
        job = self._claim.job
        artifact_job: str | None = job.spec.get("artifact_job_id")
        manifest_key = None if artifact_job is None else self._manifest_key(artifact_job)
        spec = self._evaluation_spec(job.spec, self._work_dir, manifest_key=manifest_key)
        # As the service computes it; a row has the fingerprint of its job.
        return Target(job.fingerprint, job.spec["evaluation"], spec, artifact_job_id=artifact_job)

    def _manifest_key(self, artifact_job: str) -> str:
        """Return the key of the first manifest: it never changes, and has the same weights as all later ones."""
        try:
            made_by = self._store.get(artifact_job, self._claim.job.tenant_id)
        except JobNotFound as err:
            raise JobFailed("bad_input", str(err)) from err
        if made_by.state is not JobState.SUCCEEDED:
            raise JobFailed("bad_input", f"{artifact_job} is {made_by.state} and has no artifact")
        return ArtifactKeys(made_by.tenant_id, made_by.id).manifest

    def _card(self, attempt: int, *, is_whole: bool) -> CardRevision | None:
        """Store a card with what is measured by now; none where there is no artifact (any more)."""
        job = self._claim.job
        artifact_job = job.spec.get("artifact_job_id")
        artifact = None if artifact_job is None else self._store.artifact_of(artifact_job)
        if artifact is None:
            return None
        document = json.loads(self._storage.get_bytes(artifact.manifest_key))
        own = job.id if is_whole else None
        results = results_of(self._store.measured_on(job, artifact.job_id), whole=own)
        evaluation = {**document.get("evaluation", {}), "results": results}
        keys = ArtifactKeys(artifact.tenant_id, artifact.job_id)
        key, revised = put_card(self._storage, document, evaluation, keys=keys, claim=self._claim, attempt=attempt)
        return CardRevision(
            artifact_id=artifact.id,
            replaces=artifact.manifest_key,
            manifest_key=key,
            size_bytes=sum(entry["size_bytes"] for entry in revised["files"]),
        )
