"""Evaluations as rows; a job that measures writes one when its first part is done, and again after each part."""

from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import Engine, or_, select, tuple_

from infra.artifacts import Evaluation
from infra.database import read
from infra.errors import EvaluationNotFound
from infra.schema import evaluations


class EvaluationStore:
    """Reads evaluations."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get(self, name: str, tenant_id: str) -> Evaluation:
        """Return the evaluation with this id, or of the job with this id.

        Raises:
            EvaluationNotFound: there is none, or it is another tenant's.
        """
        query = (
            select(evaluations)
            .where(evaluations.c.tenant_id == tenant_id)
            .where(or_(evaluations.c.id == name, evaluations.c.job_id == name))
            # A job with a quality gate may have measured its baseline, too: what it made comes first.
            .order_by(evaluations.c.artifact_job_id.is_(None), evaluations.c.id)
            .limit(1)
        )
        with read(self._engine) as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise EvaluationNotFound(f"there is no evaluation {name}", evaluation_id=name)
        return Evaluation.from_row(row)

    def of_jobs(self, job_ids: Iterable[str]) -> Mapping[str, Evaluation]:
        """Return what these jobs have measured, by the jobs' ids; of a quality gate, that on its artifact."""
        query = select(evaluations).where(evaluations.c.job_id.in_(list(job_ids)))
        # A later row takes the place of an earlier one.
        query = query.order_by(evaluations.c.artifact_job_id.is_not(None), evaluations.c.id)
        with read(self._engine) as connection:
            return {row["job_id"]: Evaluation.from_row(row) for row in connection.execute(query).mappings()}

    def page(
        self,
        tenant_id: str,
        *,
        artifact_id: str | None = None,
        model_name: str | None = None,
        limit: int,
        before: tuple[int, str] | None = None,
    ) -> Sequence[Evaluation]:
        """Return a tenant's evaluations, newest first; `before` is (created_at, id) of the last one before."""
        query = (
            select(evaluations)
            .where(evaluations.c.tenant_id == tenant_id)
            .order_by(evaluations.c.created_at.desc(), evaluations.c.id.desc())
            .limit(limit)
        )
        if artifact_id is not None:
            query = query.where(evaluations.c.artifact_id == artifact_id)
        if model_name is not None:
            query = query.where(evaluations.c.model_name == model_name)
        if before is not None:
            query = query.where(tuple_(evaluations.c.created_at, evaluations.c.id) < tuple_(*before))
        with read(self._engine) as connection:
            return [Evaluation.from_row(row) for row in connection.execute(query).mappings()]
