"""Artifacts as rows: found, tagged, given an end, deleted. Their objects are the collector's to delete."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, delete, exists, or_, select, tuple_, update
from sqlalchemy.sql.elements import UnaryExpression

from infra import audit
from infra.database import now_ms, read, take_turns, write
from infra.errors import ArtifactConflict, ArtifactNotFound
from infra.job_model import ACTIVE, Job, Record
from infra.job_rows import state_is
from infra.listing import between
from infra.schema import artifact_tags, artifacts, evaluations, jobs


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact(Record):
    """A finished checkpoint."""

    id: str
    tenant_id: str
    job_id: str
    fingerprint: str
    model_name: str
    recipe_name: str
    manifest_key: str
    size_bytes: int
    summary: dict[str, Any]
    created_at: int
    expires_at: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(Record):
    """What was measured on an artifact, or on an unquantized model."""

    id: str
    tenant_id: str
    job_id: str
    artifact_id: str | None
    artifact_job_id: str | None
    """The job that made what was measured; none for an unquantized model."""
    model_name: str
    fingerprint: str
    """Of what was measured and how: a newer evaluation with the same one replaces an older."""
    settings: dict[str, Any] | None
    metrics: dict[str, Any]
    """The numbers of the parts that are done."""
    parts: dict[str, dict[str, Any]] | None
    is_complete: bool
    report_key: str | None
    created_at: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_complete", bool(self.is_complete))


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactFilter:
    """What a listed artifact must be; what is left out does not matter. Times are milliseconds since 1970."""

    model_name: str | None = None
    recipe_name: str | None = None
    tag: str | None = None
    """One of its tags; one that ends in * is a beginning."""
    created_from: int | None = None
    created_until: int | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return what a row of the artifacts table must fulfil."""
        found = []
        if self.model_name is not None:
            found.append(artifacts.c.model_name == self.model_name)
        if self.recipe_name is not None:
            found.append(artifacts.c.recipe_name == self.recipe_name)
        if self.tag is not None:
            found.append(exists().where(artifact_tags.c.artifact_id == artifacts.c.id, _tag_is(self.tag)))
        found += between(artifacts.c.created_at, self.created_from, self.created_until)
        return found


def _tag_is(pattern: str) -> ColumnElement[bool]:
    if pattern.endswith("*"):
        return artifact_tags.c.tag.startswith(pattern[:-1], autoescape=True)
    return artifact_tags.c.tag == pattern


class ArtifactStore:
    """Reads and changes artifacts that are not deleted. What is deleted is gone for every caller."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get(self, name: str, tenant_id: str) -> Artifact:
        """Return the artifact with this id, or of the job with this id.

        Raises:
            ArtifactNotFound: there is none, it is another tenant's, or it was deleted.
        """
        with read(self._engine) as connection:
            return self._find(connection, name, tenant_id)

    def _find(self, connection: Connection, name: str, tenant_id: str, *, lock: bool = False) -> Artifact:
        query = _live(tenant_id).where(or_(artifacts.c.id == name, artifacts.c.job_id == name))
        if lock:
            query = query.with_for_update(key_share=True)
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise ArtifactNotFound(f"no artifact {name}", artifact_id=name)
        return Artifact.from_row(row)

    def page(
        self, tenant_id: str, wanted: ArtifactFilter, *, limit: int, before: tuple[int, str] | None = None
    ) -> Sequence[Artifact]:
        """Return a tenant's artifacts, newest first; `before` is (created_at, id) of the last one before."""
        query = _live(tenant_id).where(*wanted.conditions()).order_by(*_newest_first()).limit(limit)
        if before is not None:
            query = query.where(tuple_(artifacts.c.created_at, artifacts.c.id) < tuple_(*before))
        with read(self._engine) as connection:
            return [Artifact.from_row(row) for row in connection.execute(query).mappings()]

    def of_jobs(self, job_ids: Iterable[str]) -> Mapping[str, Artifact]:
        """Return the artifacts that these jobs made, by the jobs' ids."""
        query = select(artifacts).where(artifacts.c.job_id.in_(list(job_ids)), artifacts.c.deleted_at.is_(None))
        with read(self._engine) as connection:
            return {row["job_id"]: Artifact.from_row(row) for row in connection.execute(query).mappings()}

    def makers(self, made: Iterable[Artifact]) -> Mapping[str, Job]:
        """Return the jobs that made these artifacts, by the jobs' ids."""
        query = select(jobs).where(jobs.c.id.in_([artifact.job_id for artifact in made]))
        with read(self._engine) as connection:
            return {row["id"]: Job.from_row(row) for row in connection.execute(query).mappings()}

    def tags(self, artifact_ids: Iterable[str]) -> Mapping[str, Sequence[str]]:
        """Return the tags of each of these artifacts, in order."""
        query = (
            select(artifact_tags.c.artifact_id, artifact_tags.c.tag)
            .where(artifact_tags.c.artifact_id.in_(list(artifact_ids)))
            .order_by(artifact_tags.c.tag)
        )
        found: dict[str, list[str]] = defaultdict(list)
        with read(self._engine) as connection:
            for artifact_id, tag in connection.execute(query):
                found[artifact_id].append(tag)
        return found

    def evaluations(self, artifact_ids: Iterable[str]) -> Mapping[str, Sequence[Evaluation]]:
        """Return what was measured on each of these artifacts, newest first."""
        query = (
            select(evaluations)
            .where(evaluations.c.artifact_id.in_(list(artifact_ids)))
            .order_by(evaluations.c.created_at.desc(), evaluations.c.id.desc())
        )
        found: dict[str, list[Evaluation]] = defaultdict(list)
        with read(self._engine) as connection:
            for row in connection.execute(query).mappings():
                found[row["artifact_id"]].append(Evaluation.from_row(row))
        return found

    def tag(self, name: str, tag: str, *, tenant_id: str, actor: str) -> Artifact:
        """Give an artifact a tag, which leaves the artifact that had it.

        Raises:
            ArtifactNotFound: no such artifact.
        """
        with write(self._engine) as connection:
            artifact = self._find(connection, name, tenant_id, lock=True)
            values = {"tenant_id": tenant_id, "tag": tag}
            # Two requests that give the same tag would both find it free.
            take_turns(connection, f"tag {tag} of {tenant_id}")
            had = connection.execute(
                delete(artifact_tags)
                .where(artifact_tags.c.tenant_id == tenant_id, artifact_tags.c.tag == tag)
                .returning(artifact_tags.c.artifact_id)
            ).scalar_one_or_none()
            connection.execute(artifact_tags.insert().values(artifact_id=artifact.id, **values))
            if had != artifact.id:
                self._audit(connection, artifact, actor, "artifact.tagged", {"tag": tag, "from": had})
            return artifact

    def untag(self, name: str, tag: str, *, tenant_id: str, actor: str) -> Artifact:
        """Take a tag away; one that is not there is no error.

        Raises:
            ArtifactNotFound: no such artifact.
        """
        with write(self._engine) as connection:
            artifact = self._find(connection, name, tenant_id)
            statement = delete(artifact_tags).where(
                artifact_tags.c.tenant_id == tenant_id,
                artifact_tags.c.tag == tag,
                artifact_tags.c.artifact_id == artifact.id,
            )
            if connection.execute(statement).rowcount:
                self._audit(connection, artifact, actor, "artifact.untagged", {"tag": tag})
            return artifact

    def keep_until(self, name: str, expires_at: int | None, *, tenant_id: str, actor: str) -> Artifact:
        """Say when an artifact may be deleted; none means never.

        Raises:
            ArtifactNotFound: no such artifact.
        """
        with write(self._engine) as connection:
            artifact = self._find(connection, name, tenant_id)
            statement = (
                update(artifacts)
                .where(artifacts.c.id == artifact.id)
                .values(expires_at=expires_at)
                .returning(artifacts)
            )
            changed = Artifact.from_row(connection.execute(statement).mappings().one())
            self._audit(connection, artifact, actor, "artifact.changed", {"expires_at": expires_at})
            return changed

    def delete(self, name: str, *, tenant_id: str, actor: str, force: bool = False) -> None:
        """Mark an artifact deleted; the collector deletes its objects later. The same work can be done anew at once.

        Raises:
            ArtifactNotFound: no such artifact.
            ArtifactConflict: it has tags and `force` is not set, or a job that has not ended needs it.
        """
        with write(self._engine) as connection:
            artifact = self._find(connection, name, tenant_id, lock=True)
            tagged = select(artifact_tags.c.tag).where(artifact_tags.c.artifact_id == artifact.id)
            tags = connection.execute(tagged.order_by(artifact_tags.c.tag)).scalars().all()
            if tags and not force:
                detail = f"{artifact.id} is tagged {', '.join(tags)}; take that away first, or use force (--force)"
                raise ArtifactConflict(detail, artifact_id=artifact.id)
            if (user := self._user(connection, artifact)) is not None:
                raise ArtifactConflict(f"{user} needs {artifact.id} and has not ended", artifact_id=artifact.id)
            connection.execute(delete(artifact_tags).where(artifact_tags.c.artifact_id == artifact.id))
            connection.execute(
                update(artifacts).where(artifacts.c.id == artifact.id).values(deleted_at=now_ms(self._engine.dialect))
            )
            self._audit(connection, artifact, actor, "artifact.deleted", {"tags": list(tags)})

    def _user(self, connection: Connection, artifact: Artifact) -> str | None:
        """Return a job that has not ended and needs the artifact, if there is one."""
        query = (
            select(jobs.c.id)
            .where(jobs.c.tenant_id == artifact.tenant_id, jobs.c.kind == "evaluate", state_is(*ACTIVE))
            .where(jobs.c.spec["artifact_job_id"].as_string() == artifact.job_id)
            .limit(1)
        )
        found: str | None = connection.execute(query).scalar_one_or_none()
        return found

    def _audit(
        self, connection: Connection, artifact: Artifact, actor: str, action: str, data: Mapping[str, Any]
    ) -> None:
        audit.record(
            connection, tenant_id=artifact.tenant_id, actor=actor, action=action, target=artifact.id, data=data
        )


def _live(tenant_id: str) -> Any:
    return select(artifacts).where(artifacts.c.tenant_id == tenant_id, artifacts.c.deleted_at.is_(None))


def _newest_first() -> tuple[UnaryExpression[Any], UnaryExpression[Any]]:
    return artifacts.c.created_at.desc(), artifacts.c.id.desc()
