"""What a job measures, written part by part under its claim's fence: a worker that dies loses the part in progress."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, exists, insert, or_, select, update

from infra.artifacts import Artifact, Evaluation
from infra.database import read, write
from infra.errors import CardOutdated
from infra.fingerprints import evaluation_fingerprint
from infra.ids import new_id
from infra.job_model import CardRevision, Claim, Job, JobState, Measured
from infra.job_results import UNKNOWN_DEVICE, charge_usage
from infra.job_rows import JobRows, state_is
from infra.schema import artifacts, evaluations, jobs


@dataclass(frozen=True, slots=True)
class WithBaseline:
    """An evaluation, and the same measured on the unquantized model."""

    evaluation: Evaluation
    baseline: Evaluation | None


def measurement_of(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a job's spec that says what it measures: `evaluation`, `text_identity`, `task_identities`.

    An evaluate job does nothing else; a quantize job has it in its quality gate.
    """
    measurement: Mapping[str, Any] = spec.get("quality_gate") or spec
    return measurement


def measured_fingerprint(spec: Mapping[str, Any], artifact_job_id: str | None) -> str:
    """Return the fingerprint of what a job measures, on an artifact or (none) on the unquantized model."""
    return _fingerprint(spec, artifact_job_id, measurement_of(spec)["evaluation"])


def baseline_fingerprint(spec: Mapping[str, Any]) -> str:
    """Return the fingerprint of the unquantized model's perplexity on the text that a job measures on."""
    return _fingerprint(spec, None, baseline_settings(measurement_of(spec)["evaluation"]))


def baseline_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of evaluation settings that perplexity depends on."""
    return {name: settings[name] for name in ("text", "seq_len", "windows") if name in settings}


def _fingerprint(spec: Mapping[str, Any], artifact_job_id: str | None, settings: Mapping[str, Any]) -> str:
    measurement = measurement_of(spec)
    return evaluation_fingerprint(
        model_identity=spec["model_identity"],
        artifact_job_id=artifact_job_id,
        text_identity=measurement.get("text_identity"),
        settings=settings,
        task_identities=measurement.get("task_identities") if "tasks" in settings else None,
    )


class JobMeasures(JobRows):
    """Fenced writes to the evaluations of a claimed job."""

    def record_measured(
        self, claim: Claim, measured: Measured, *, slot: int = 0, seconds: float = 0.0, device: str = UNKNOWN_DEVICE
    ) -> Evaluation:
        """Write what has been measured so far in the place of what was written before, and bill the time it took.

        Args:
            claim: The claim under which it was measured.
            measured: All that is known by now, of this claim and of those before.
            slot: A number that this claim has billed nothing under yet.
            seconds: Slot time since the last record of this claim.
            device: What it ran on, for the bill.

        Raises:
            LeaseLost: the claim is stale.
        """
        with write(self._engine) as connection:
            job = self._held(connection, claim)
            now = self._now()
            if seconds:
                charge_usage(connection, job, layer=slot, fence=claim.fence, seconds=seconds, device=device, now=now)
            return self._put_measured(connection, job, measured)

    def _put_measured(self, connection: Connection, job: Job, measured: Measured) -> Evaluation:
        values = {
            "artifact_job_id": measured.artifact_job_id,
            "artifact_id": select(artifacts.c.id)
            .where(artifacts.c.job_id == measured.artifact_job_id)
            .scalar_subquery(),
            "settings": dict(measured.settings),
            "metrics": dict(measured.metrics),
            "parts": {name: dict(part) for name, part in measured.parts.items()},
            "is_complete": int(measured.is_complete),
            "report_key": measured.report_key,
        }
        known = (evaluations.c.job_id == job.id) & (evaluations.c.fingerprint == measured.fingerprint)
        row = connection.execute(update(evaluations).where(known).values(**values).returning(evaluations)).mappings()
        found = row.one_or_none()
        if found is None:
            new = insert(evaluations).values(
                id=new_id("eval"),
                tenant_id=job.tenant_id,
                job_id=job.id,
                model_name=job.model_name,
                fingerprint=measured.fingerprint,
                created_at=self._now(),
                **values,
            )
            found = connection.execute(new.returning(evaluations)).mappings().one()
        return Evaluation.from_row(found)

    def measured_before(self, job: Job, fingerprint: str, *, is_baseline: bool = False) -> Evaluation | None:
        """Return the evaluation with this fingerprint that a job may go on from, if there is one.

        What is complete comes before what is not, and the job's own work before that of other jobs of its tenant. A
        job that was forced takes nothing from others: somebody wants it measured anew, all but a baseline.
        """
        own = evaluations.c.job_id == job.id
        query = (
            select(evaluations)
            .where(evaluations.c.tenant_id == job.tenant_id, evaluations.c.fingerprint == fingerprint)
            .order_by(evaluations.c.is_complete.desc(), own.desc(), evaluations.c.created_at.desc())
            .limit(1)
        )
        if not is_baseline:
            is_forced = exists().where(jobs.c.id == job.id, jobs.c.forced == 1)
            query = query.where(or_(own, ~is_forced))
        with read(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else Evaluation.from_row(row)

    def artifact_of(self, job_id: str) -> Artifact | None:
        """Return the artifact that a job made; none where there is none (any more)."""
        query = select(artifacts).where(artifacts.c.job_id == job_id, artifacts.c.deleted_at.is_(None))
        with read(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else Artifact.from_row(row)

    def measured_on(self, job: Job, artifact_job_id: str) -> Sequence[WithBaseline]:
        """Return what was measured on what a job made, newest first: for its model card.

        What is complete counts, what the job that asks has measured, which is about to be, and the parts that were done
        before a job failed. A card is only sound if the artifact was read before: what is added in between then shows
        the card to be an old one.
        """
        query = (
            select(evaluations, jobs.c.spec)
            .join(jobs, jobs.c.id == evaluations.c.job_id)
            .where(evaluations.c.tenant_id == job.tenant_id, evaluations.c.artifact_job_id == artifact_job_id)
            .where(
                or_(
                    evaluations.c.is_complete == 1,
                    evaluations.c.job_id == job.id,
                    state_is(JobState.FAILED),
                )
            )
            .order_by(evaluations.c.created_at.desc(), evaluations.c.id.desc())
        )
        with read(self._engine) as connection:
            rows = connection.execute(query).mappings().all()
            # The same tasks may have been measured on the model, too; the perplexity alone is the next best.
            wanted = [(measured_fingerprint(row["spec"], None), baseline_fingerprint(row["spec"])) for row in rows]
            known = self._baselines(connection, job.tenant_id, [name for names in wanted for name in names])
        return [
            WithBaseline(Evaluation.from_row(row), known.get(same) or known.get(plain))
            for row, (same, plain) in zip(rows, wanted, strict=True)
        ]

    def baseline_of(self, job: Job) -> Evaluation | None:
        """Return what is known of the unquantized model, measured as a job measures; the perplexity if that is all."""
        same, plain = measured_fingerprint(job.spec, None), baseline_fingerprint(job.spec)
        with read(self._engine) as connection:
            known = self._baselines(connection, job.tenant_id, (same, plain))
        return known.get(same) or known.get(plain)

    def _baselines(self, connection: Connection, tenant_id: str, wanted: Sequence[str]) -> Mapping[str, Evaluation]:
        query = (
            select(evaluations)
            .where(evaluations.c.tenant_id == tenant_id, evaluations.c.fingerprint.in_(wanted))
            .where(evaluations.c.is_complete == 1)
            .order_by(evaluations.c.created_at, evaluations.c.id)
        )
        return {row["fingerprint"]: Evaluation.from_row(row) for row in connection.execute(query).mappings()}

    def put_card(self, claim: Claim, card: CardRevision) -> None:
        """Make a stored model card the artifact's, with what a job has measured before it fails.

        Raises:
            LeaseLost: the claim is stale.
            CardOutdated: the artifact has got another card since this one was made; nothing was written.
        """
        with write(self._engine) as connection:
            self._held(connection, claim)
            self._swing_card(connection, card)

    def _swing_card(self, connection: Connection, card: CardRevision) -> None:
        """Make a stored model card the artifact's, unless the artifact was deleted meanwhile.

        Raises:
            CardOutdated: it has another one than this was made from.
        """
        statement = (
            update(artifacts)
            .where(artifacts.c.id == card.artifact_id, artifacts.c.manifest_key == card.replaces)
            .values(manifest_key=card.manifest_key, size_bytes=card.size_bytes)
        )
        if connection.execute(statement).rowcount:
            return
        alive = select(artifacts.c.id).where(artifacts.c.id == card.artifact_id, artifacts.c.deleted_at.is_(None))
        if connection.execute(alive).one_or_none() is not None:
            raise CardOutdated(artifact_id=card.artifact_id)
