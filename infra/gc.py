"""The collector: deletes what nobody needs any more. `python -m infra.gc --dry-run` says what it would delete.

An object is deleted only when its job is known not to need it, and that is decided under a lock on the job's row: a job
that has not ended, and the files of an artifact that is not deleted, are never touched. Objects of jobs and texts that
the database does not know are left alone for a grace period, in case the wrong database was named; texts that operators
have put into the bucket by hand, for good.
"""

import argparse
import json
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from typing import NamedTuple

from pydantic import Field
from sqlalchemy import Connection, Engine, delete, exists, select, update

from infra.artifact_keys import REPORTS, TEXTS, ArtifactKeys, is_text_key, job_of
from infra.artifacts import ArtifactStore
from infra.database import make_engine, now_ms, read, transaction, write
from infra.errors import ArtifactConflict, ArtifactNotFound, ChecksumMismatch, InfraError, ObjectNotFound
from infra.job_model import JobState
from infra.logging import fail_with, setup_logging
from infra.migrate import upgrade_engine
from infra.schema import artifacts, evaluations, job_layers, jobs
from infra.settings import StorageSettings
from infra.storage import ObjectInfo, ObjectStore
from infra.texts import needed_texts

ACTOR = "collector"
_DAY_MS = 86_400_000
_ROOT = "artifacts/"
_ENDED_BADLY = (JobState.FAILED, JobState.CANCELLED)
_JOBS_AT_ONCE = 500
_OBJECTS_AT_ONCE = 500


class GcSettings(StorageSettings):
    """How long things are kept, from DUQUANT_* variables; the whole settings of `python -m infra.gc`."""

    gc_grace_days: float = Field(default=1, ge=0)
    """Objects and unfinished uploads younger than this are never deleted, whoever they belong to."""
    gc_unknown_days: float = Field(default=7, ge=0)
    """Objects of jobs, and of uploaded texts, that the database does not know are deleted when older than this."""
    gc_failed_days: float = Field(default=14, ge=0)
    """Finished layers of failed and cancelled jobs are kept for this long, for a retry to go on from."""
    gc_job_days: float = Field(default=365, ge=0)
    """Ended jobs without an artifact, with their events, are kept for this long."""


@dataclass
class Report:
    """What was deleted, or would be."""

    dry_run: bool
    artifacts_expired: list[str] = field(default_factory=list)
    artifacts_kept: dict[str, str] = field(default_factory=dict)
    """Expired ones that are kept, and why."""
    artifacts_purged: list[str] = field(default_factory=list)
    """Deleted ones whose objects are gone now, too."""
    objects: list[str] = field(default_factory=list)
    size_bytes: int = 0
    uploads: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class _Owner(NamedTuple):
    """What decides about a job's objects."""

    artifact_keys: ArtifactKeys
    state: JobState
    finished_at: int | None
    manifest_key: str | None
    """Of its artifact, if that is not deleted."""
    has_artifact: bool


class Collector:
    """One run over the database and the object store."""

    def __init__(self, engine: Engine, storage: ObjectStore, settings: GcSettings, *, dry_run: bool) -> None:
        self._engine, self._storage, self._settings = engine, storage, settings
        self._dry_run = dry_run
        self._report = Report(dry_run=dry_run)
        self._now = 0
        self._remaining: set[str | None] = set()
        """Jobs that still have objects."""

    def run(self) -> Report:
        """Collect everything once.

        Raises:
            InfraError: the database or the object store does not work.
        """
        with read(self._engine) as connection:
            self._now = connection.execute(select(now_ms(self._engine.dialect))).scalar_one()
        self._expire_artifacts()
        listed = self._storage.list(_ROOT)
        for job_id, found in groupby(listed, key=lambda item: job_of(item.key)):
            self._collect_objects(job_id, list(found))
        self._note_purged()
        # Reports on evaluations that there are no more, or that a job gave up; texts that a crash left without a row.
        self._collect_unnamed(REPORTS, lambda _: True, _needed_reports)
        self._collect_unnamed(TEXTS, is_text_key, needed_texts)
        self._abort_uploads()
        self._delete_jobs()
        return self._report

    def _before(self, days: float) -> int:
        return self._now - round(days * _DAY_MS)

    @contextmanager
    def _changes(self) -> Iterator[Connection]:
        """A transaction that a dry run rolls back."""
        try:
            with transaction(self._engine), write(self._engine) as connection:
                yield connection
                if self._dry_run:
                    raise _RollBack
        except _RollBack:
            pass

    def _expire_artifacts(self) -> None:
        expired = select(artifacts).where(artifacts.c.expires_at <= self._now, artifacts.c.deleted_at.is_(None))
        with read(self._engine) as connection:
            rows = connection.execute(expired.order_by(artifacts.c.id)).mappings().all()
        store = ArtifactStore(self._engine)
        for row in rows:
            try:
                with self._changes():
                    store.delete(row["id"], tenant_id=row["tenant_id"], actor=ACTOR)
                self._report.artifacts_expired.append(row["id"])
            except ArtifactNotFound:
                continue  # its owner was faster
            except ArtifactConflict as error:
                self._report.artifacts_kept[row["id"]] = str(error)

    def _collect_objects(self, job_id: str | None, found: Sequence[ObjectInfo]) -> None:
        """Delete the objects of one job that it does not need."""
        grace = self._before(self._settings.gc_grace_days)
        old = [item for item in found if item.modified_at is not None and item.modified_at < grace]
        if job_id is None or not old:
            self._remaining.add(job_id)
            return
        with read(self._engine) as connection:
            job = self._job(connection, job_id)
        useless = self._useless(job, old)
        if len(useless) < len(found):
            self._remaining.add(job_id)
        if not useless:
            return
        with self._changes() as connection:
            # Once more, and locked: nobody may retry the job while its layers go.
            if self._job(connection, job_id, lock=True) != job:
                return
            if job is not None and job.state in _ENDED_BADLY:
                _forget_layers(connection, job_id)
            if not self._dry_run:
                self._storage.delete_many([item.key for item in useless])
        self._report.objects += [item.key for item in useless]
        self._report.size_bytes += sum(item.size_bytes for item in useless)

    def _job(self, connection: Connection, job_id: str, *, lock: bool = False) -> _Owner | None:
        query = (
            select(
                *(jobs.c.tenant_id, jobs.c.state, jobs.c.finished_at),
                *(artifacts.c.id, artifacts.c.deleted_at, artifacts.c.manifest_key),
            )
            .select_from(jobs.outerjoin(artifacts, artifacts.c.job_id == jobs.c.id))
            .where(jobs.c.id == job_id)
        )
        if lock:
            query = query.with_for_update(key_share=True, of=jobs)
        row = connection.execute(query).one_or_none()
        if row is None:
            return None
        is_deleted = row.deleted_at is not None or row.id in self._report.artifacts_expired
        return _Owner(
            ArtifactKeys(row.tenant_id, job_id),
            JobState(row.state),
            row.finished_at,
            None if is_deleted else row.manifest_key,
            row.id is not None,
        )

    def _useless(self, job: _Owner | None, old: Sequence[ObjectInfo]) -> Sequence[ObjectInfo]:
        """Return those of a job's objects that nothing needs."""
        if job is None:
            limit = self._before(self._settings.gc_unknown_days)
            return [item for item in old if item.modified_at is not None and item.modified_at < limit]
        if job.state in _ENDED_BADLY:
            assert job.finished_at is not None
            return old if job.finished_at < self._before(self._settings.gc_failed_days) else []
        if job.state is not JobState.SUCCEEDED or not job.has_artifact:
            return []
        if job.manifest_key is None:
            return old
        # Attempts of workers that lost their lease, failed attempts, and model cards that newer ones have replaced.
        needed = self._needed(job.artifact_keys, job.manifest_key)
        if needed is None:
            return []
        # Whoever pulls the artifact may still hold links to the card before one that is young.
        has_young_card = job.manifest_key not in {item.key for item in old}
        return [
            item
            for item in old
            if item.key not in needed and not (has_young_card and item.key.startswith(job.artifact_keys.cards))
        ]

    def _needed(self, keys: ArtifactKeys, manifest_key: str) -> Container[str] | None:
        """Return the keys of an artifact's objects; none when a manifest cannot be read.

        They are those of its present manifest and of its first, which evaluations read and which has no numbers.
        """
        needed = set()
        for key in {keys.manifest, manifest_key}:
            try:
                manifest = json.loads(self._storage.get_bytes(key))
                needed |= {key, *(entry["key"] for entry in manifest["files"])}
            except (ObjectNotFound, ChecksumMismatch, ValueError, KeyError, TypeError) as error:
                self._report.problems.append(f"{key}: {error}")
                return None
        return needed

    def _collect_unnamed(
        self, prefix: str, is_ours: Callable[[str], bool], needed: Callable[[Connection, Sequence[str]], Container[str]]
    ) -> None:
        """Delete the old objects below a prefix that no row needs and that nobody else has put there."""
        limit = self._before(max(self._settings.gc_grace_days, self._settings.gc_unknown_days))
        old = (
            item
            for item in self._storage.list(prefix)
            if item.modified_at is not None and item.modified_at < limit and is_ours(item.key)
        )
        while found := list(islice(old, _OBJECTS_AT_ONCE)):
            with read(self._engine) as connection:
                kept = needed(connection, [item.key for item in found])
            useless = [item for item in found if item.key not in kept]
            if useless and not self._dry_run:
                self._storage.delete_many([item.key for item in useless])
            self._report.objects += [item.key for item in useless]
            self._report.size_bytes += sum(item.size_bytes for item in useless)

    def _note_purged(self) -> None:
        """Mark the deleted artifacts of which no object is left."""
        waiting = select(artifacts.c.id, artifacts.c.job_id)
        waiting = waiting.where(artifacts.c.deleted_at.is_not(None), artifacts.c.purged_at.is_(None))
        with self._changes() as connection:
            rows = connection.execute(waiting.order_by(artifacts.c.id)).all()
            gone = [row.id for row in rows if row.job_id not in self._remaining]
            connection.execute(update(artifacts).where(artifacts.c.id.in_(gone)).values(purged_at=self._now))
        self._report.artifacts_purged += gone

    def _abort_uploads(self) -> None:
        for upload in list(self._storage.stale_uploads(self._before(self._settings.gc_grace_days))):
            if not self._dry_run:
                self._storage.abort_upload(upload)
            self._report.uploads.append(upload.key)

    def _delete_jobs(self) -> None:
        """Forget jobs that ended long ago and left nothing, with their events. The usage ledger stays."""
        has_objects = exists().where(artifacts.c.job_id == jobs.c.id, artifacts.c.purged_at.is_(None))
        measured = artifacts.alias("measured")
        is_shown = exists().where(
            evaluations.c.job_id == jobs.c.id,
            measured.c.id == evaluations.c.artifact_id,
            measured.c.deleted_at.is_(None),
        )
        old = (
            select(jobs.c.id)
            .where(jobs.c.finished_at < self._before(self._settings.gc_job_days), ~has_objects, ~is_shown)
            .order_by(jobs.c.id)
            .limit(_JOBS_AT_ONCE)
        )
        after = ""
        while True:
            with self._changes() as connection:
                ids = connection.execute(old.where(jobs.c.id > after)).scalars().all()
                connection.execute(delete(artifacts).where(artifacts.c.job_id.in_(ids)))
                connection.execute(delete(jobs).where(jobs.c.id.in_(ids), jobs.c.finished_at.is_not(None)))
            self._report.jobs += ids
            if len(ids) < _JOBS_AT_ONCE:
                return
            after = ids[-1]


def _needed_reports(connection: Connection, keys: Sequence[str]) -> Container[str]:
    named = select(evaluations.c.report_key).where(evaluations.c.report_key.in_(keys))
    return set(connection.execute(named).scalars())


def _forget_layers(connection: Connection, job_id: str) -> None:
    """Make a retry do all layers anew: their objects are about to go."""
    values = {"state": "pending", "key": None, "sha256": None, "size_bytes": None, "finished_at": None}
    connection.execute(update(job_layers).where(job_layers.c.job_id == job_id).values(**values))


class _RollBack(Exception):  # noqa: N818  no error
    """Ends the transaction of a dry run."""


def main() -> None:
    """Collect once; print what was deleted as JSON. Exit status 1 when something could not be judged."""
    parser = argparse.ArgumentParser(prog="python -m infra.gc", description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="delete nothing; only say what would be deleted")
    dry_run = parser.parse_args().dry_run
    try:
        settings = GcSettings.load()
        secrets = (settings.s3_access_key, settings.s3_secret_key)
        log = setup_logging("gc", level=settings.log_level, fmt=settings.log_format, secrets=secrets)
        engine = make_engine(settings.database_url)
        upgrade_engine(engine)
        with ObjectStore.from_settings(settings) as storage:
            report = Collector(engine, storage, settings, dry_run=dry_run).run()
        engine.dispose()
    except InfraError as error:
        fail_with(error)
    counts = {name: len(value) for name, value in asdict(report).items() if isinstance(value, list | dict)}
    log.info("collected", dry_run=dry_run, size_bytes=report.size_bytes, **counts)
    json.dump(asdict(report), sys.stdout, indent=2)
    sys.stdout.write("\n")
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
