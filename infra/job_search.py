"""Lists of jobs by what people look for, a page at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, Engine, bindparam, case, exists, func, select, tuple_

from infra.database import read
from infra.job_model import ACTIVE, Job, JobState
from infra.job_rows import state_is
from infra.listing import between
from infra.prepared import Prepared
from infra.schema import artifacts, batch_items, job_deps, jobs

_EVALUATIONS = Prepared(
    select(jobs.c.id)
    .join(job_deps, job_deps.c.job_id == jobs.c.id)
    .where(job_deps.c.depends_on == bindparam("of_job"), jobs.c.kind == "evaluate")
    .where(jobs.c.spec["artifact_job_id"].as_string() == bindparam("of_job"))
    .order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
)
_DEPENDENCIES = Prepared(
    select(job_deps.c.depends_on).where(job_deps.c.job_id == bindparam("of_job")).order_by(job_deps.c.depends_on)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFilter:
    """What a listed job must be; what is left out does not matter. Times are milliseconds since 1970."""

    states: Sequence[JobState] = ()
    """It is in one of these."""
    kind: str | None = None
    model_name: str | None = None
    recipe_name: str | None = None
    queue: str | None = None
    batch_id: str | None = None
    fingerprint: str | None = None
    reason: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """It has all of these."""
    created_from: int | None = None
    created_until: int | None = None
    """It is older than this."""

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return what a row of the jobs table must fulfil."""
        equal = ("kind", "model_name", "recipe_name", "queue", "fingerprint", "reason")
        found = [jobs.c[name] == value for name in equal if (value := getattr(self, name)) is not None]
        found += [jobs.c.labels[name].as_string() == value for name, value in self.labels.items()]
        if self.batch_id is not None:
            # Also those that were there, or that somebody has asked for by themselves.
            of_batch = select(batch_items.c.job_id).where(batch_items.c.batch_id == self.batch_id)
            found.append(jobs.c.id.in_(of_batch))
        if self.states:
            found.append(state_is(*self.states))
        found += between(jobs.c.created_at, self.created_from, self.created_until)
        return found


class JobSearch:
    """Reads jobs, and nothing else."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def page(
        self, tenant_id: str, wanted: JobFilter, *, limit: int, before: tuple[int, str] | None = None
    ) -> Sequence[Job]:
        """Return a tenant's jobs, newest first; `before` is (created_at, id) of the last one on the page before."""
        query = (
            select(jobs)
            .where(jobs.c.tenant_id == tenant_id, *wanted.conditions())
            .order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
            .limit(limit)
        )
        if before is not None:
            query = query.where(tuple_(jobs.c.created_at, jobs.c.id) < tuple_(*before))
        with read(self._engine) as connection:
            return [Job.from_row(row) for row in connection.execute(query).mappings()]

    def held_by_owner(self) -> dict[str, int]:
        """Return how many jobs each dispatcher holds, of all tenants."""
        query = select(jobs.c.lease_owner, func.count().label("held")).where(jobs.c.lease_until.is_not(None))
        with read(self._engine) as connection:
            rows = connection.execute(query.group_by(jobs.c.lease_owner)).mappings().all()
        return {row["lease_owner"]: row["held"] for row in rows}

    def same_work(self, tenant_id: str, fingerprint: str) -> str | None:
        """Return the id of the job that would be returned if this work were submitted."""
        is_deleted = exists().where(artifacts.c.job_id == jobs.c.id, artifacts.c.deleted_at.is_not(None))
        query = (
            select(jobs.c.id)
            .where(jobs.c.tenant_id == tenant_id, jobs.c.fingerprint == fingerprint)
            .where(state_is(*ACTIVE, JobState.SUCCEEDED), ~is_deleted)
            .order_by(case((state_is(JobState.SUCCEEDED), 0), else_=1), jobs.c.created_at.desc(), jobs.c.id.desc())
            .limit(1)
        )
        with read(self._engine) as connection:
            return connection.execute(query).scalar_one_or_none()

    def evaluations_of(self, job_id: str) -> Sequence[str]:
        """Return the ids of the jobs that measure what this one makes, newest first."""
        with read(self._engine) as connection:
            return [row["id"] for row in _EVALUATIONS.rows(connection, {"of_job": job_id})]

    def dependencies(self, job_id: str) -> Sequence[str]:
        """Return the ids of the jobs that this one waits for, or has waited for."""
        with read(self._engine) as connection:
            return [row["depends_on"] for row in _DEPENDENCIES.rows(connection, {"of_job": job_id})]
