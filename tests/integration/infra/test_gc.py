"""What the collector deletes and what it never touches, on a real database and a real object store."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import delete, insert, select, text, update

from infra.artifact_keys import REPORTS, ArtifactKeys, report_key, text_key
from infra.database import make_engine, read, write
from infra.gc import Collector, GcSettings, Report
from infra.ids import new_id
from infra.jobs import Claim, Job, JobState, JobStore, Measured, NewJob
from infra.schema import artifact_tags, artifacts, job_events, jobs, texts, usage_ledger
from infra.storage import ObjectInfo, ObjectStore
from infra.texts import TextStore

pytestmark = pytest.mark.integration

DAY_MS = 86_400_000


class House:
    """A database and a bucket, and jobs in every state with objects of theirs."""

    def __init__(self, url: str, storage: ObjectStore, home: Path) -> None:
        self.engine = make_engine(url)
        self.store = JobStore(self.engine)
        self.storage = storage
        # Nothing is old in a test: without a grace everything is.
        self.settings = GcSettings(
            home=home,
            database_url=url,
            s3_endpoint=storage.endpoint,
            s3_bucket=storage.bucket,
            s3_access_key=SecretStr("test-access-key"),
            s3_secret_key=SecretStr("test-secret-key-0123456789"),
            gc_grace_days=0,
            gc_unknown_days=0,
            gc_failed_days=0,
            gc_job_days=1,
        )

    def collect(self, *, dry_run: bool = False, **settings: float) -> Report:
        changed = self.settings.model_copy(update=settings)
        return Collector(self.engine, self.storage, changed, dry_run=dry_run).run()

    def keys(self, job: Job) -> set[str]:
        return {item.key for item in self.storage.list(ArtifactKeys("default", job.id).prefix)}

    def start(self, name: str) -> Claim:
        self.store.enqueue(NewJob(tenant_id="default", kind="quantize", spec={}, fingerprint=name), actor="t")
        taken = self.store.claim("worker", lease_seconds=60)
        assert taken is not None
        return taken

    def work(self, taken: Claim, layers: Sequence[int] = (0, 1)) -> list[str]:
        """Store and commit layers; each leaves a failed attempt's object beside it."""
        keys = ArtifactKeys("default", taken.job.id)
        self.store.plan(taken, layers)
        stored = []
        for layer in layers:
            row = self.store.start_layer(taken, layer, "node")
            self.storage.put_bytes(keys.layer(layer, fence=taken.fence, attempt=99), b"failed attempt")
            info = self.storage.put_bytes(keys.layer(layer, fence=taken.fence, attempt=row.attempt), b"layer")
            self.store.commit_layer(taken, replace(row, key=info.key, sha256=info.sha256, size_bytes=5, seconds=1.0))
            stored.append(info.key)
        return stored

    def artifact(self, name: str) -> tuple[Job, set[str]]:
        """Make an artifact; return its job and the keys that it consists of."""
        taken = self.start(name)
        stored = self.work(taken)
        manifest_key = ArtifactKeys("default", taken.job.id).manifest
        manifest = {"files": [{"name": key, "key": key} for key in stored]}
        self.storage.put_bytes(manifest_key, json.dumps(manifest).encode())
        made = {"manifest_key": manifest_key, "size_bytes": 10, "summary": {}}
        return self.store.complete(taken, {"artifact": made}), {*stored, manifest_key}

    def change_artifact(self, job: Job, **values: object) -> None:
        with write(self.engine) as connection:
            connection.execute(update(artifacts).where(artifacts.c.job_id == job.id).values(**values))

    def purged_at(self, job: Job) -> int | None:
        with read(self.engine) as connection:
            return connection.execute(select(artifacts.c.purged_at).where(artifacts.c.job_id == job.id)).scalar_one()


@pytest.fixture
def house(migrated_sqlite_url: str, object_store: ObjectStore, tmp_path: Path):
    house = House(migrated_sqlite_url, object_store, tmp_path)
    yield house
    house.engine.dispose()


@pytest.fixture
def any_house(database_url: str, object_store: ObjectStore, tmp_path: Path):
    """The same once for each kind of database."""
    house = House(database_url, object_store, tmp_path)
    yield house
    house.engine.dispose()


def everything(house: House) -> tuple[object, ...]:
    with read(house.engine) as connection:
        tables = [
            connection.execute(text(f"SELECT * FROM {name}")).all() for name in ("jobs", "artifacts", "audit_log")
        ]
    return (*tables, {item.key for item in house.storage.list("")})


def test_a_live_jobs_objects_are_never_touched(house: House) -> None:
    taken = house.start("running")
    house.work(taken)
    waiting = house.start("released")
    house.work(waiting)
    retried = house.start("retried")
    house.work(retried)
    house.store.fail(retried, "error", "no")
    house.store.retry(retried.job.id, tenant_id="default", actor="alice")
    house.store.release(waiting)
    before = everything(house)
    assert house.collect().objects == []
    assert everything(house) == before


def test_an_artifact_keeps_its_files_and_loses_failed_attempts(house: House) -> None:
    job, needed = house.artifact("a")
    report = house.collect()
    assert house.keys(job) == needed
    assert len(report.objects) == 2
    assert report.size_bytes == 2 * len(b"failed attempt")
    assert all("99" in key for key in report.objects)


def test_young_objects_are_left_alone(house: House) -> None:
    job, _ = house.artifact("a")
    before = house.keys(job)
    assert house.collect(gc_grace_days=1).objects == []
    assert house.keys(job) == before


def test_a_deleted_artifact_is_purged(house: House) -> None:
    job, _ = house.artifact("a")
    house.change_artifact(job, deleted_at=1)
    report = house.collect()
    assert house.keys(job) == set()
    assert house.purged_at(job) is not None
    assert len(report.artifacts_purged) == 1
    assert house.collect().artifacts_purged == []


def test_an_expired_artifact_goes_unless_it_is_tagged(house: House) -> None:
    gone, _ = house.artifact("gone")
    kept, needed = house.artifact("kept")
    for job in (gone, kept):
        house.change_artifact(job, expires_at=1)
    with write(house.engine) as connection:
        tagged = connection.execute(select(artifacts.c.id).where(artifacts.c.job_id == kept.id)).scalar_one()
        connection.execute(insert(artifact_tags).values(tenant_id="default", tag="stable", artifact_id=tagged))
    report = house.collect()
    assert "stable" in report.artifacts_kept[tagged]
    assert house.keys(gone) == set()
    assert house.keys(kept) == needed


def test_a_damaged_manifest_deletes_nothing(house: House) -> None:
    job, _ = house.artifact("a")
    house.storage.put_bytes(ArtifactKeys("default", job.id).manifest, b"{ not json")
    before = house.keys(job)
    report = house.collect()
    assert house.keys(job) == before
    assert "manifest" in report.problems[0]


def test_layers_of_a_failed_job_wait_for_a_retry_and_then_go(house: House) -> None:
    taken = house.start("bad")
    house.work(taken)
    job = house.store.fail(taken, "bad_input", "no")
    assert house.collect(gc_failed_days=1).objects == []
    assert len(house.keys(job)) == 4
    house.collect()
    assert house.keys(job) == set()
    # A retry knows that they are gone and does all of them anew.
    house.store.retry(job.id, tenant_id="default", actor="alice")
    again = house.store.claim("worker", lease_seconds=60)
    assert again is not None
    assert {row.state for row in house.store.plan(again, [0, 1])} == {"pending"}
    house.work(again)


def test_objects_of_unknown_jobs_go_later_and_other_objects_never(house: House) -> None:
    orphan = ArtifactKeys("default", "job_unknown").manifest
    for key in (orphan, "texts/default/mine.txt", "artifacts/readme"):
        house.storage.put_bytes(key, b"x")
    assert house.collect(gc_unknown_days=7).objects == []
    assert house.collect().objects == [orphan]
    assert {item.key for item in house.storage.list("")} == {"texts/default/mine.txt", "artifacts/readme"}


def lost_text(house: House, suffix: str = ".txt", tenant: str = "default") -> str:
    """Put an object as a process does that dies before it writes the row; return its key."""
    key = text_key(tenant, new_id("text"), suffix)
    house.storage.put_bytes(key, b"It was.")
    return key


def texts_left(house: House) -> set[str]:
    return {item.key for item in house.storage.list("texts/")}


def test_texts_that_a_crash_left_without_a_row_go_when_they_are_old(any_house: House, tmp_path: Path) -> None:
    house = any_house
    file = tmp_path / "text"
    file.write_text("It was a bright cold day.")
    stored, _ = TextStore(house.engine, house.storage).add("default", "mine", file, suffix=".txt", actor="alice")
    lost = {lost_text(house), lost_text(house, ".jsonl"), lost_text(house, tenant="gone")}
    assert house.collect(gc_unknown_days=7).objects == []
    assert house.collect(gc_grace_days=1).objects == []
    planned = house.collect(dry_run=True)
    assert texts_left(house) == {stored.key, *lost}
    done = house.collect()
    assert set(done.objects) == set(planned.objects) == lost
    assert done.size_bytes == planned.size_bytes == 3 * len(b"It was.")
    assert texts_left(house) == {stored.key}


def test_a_text_whose_object_outlived_its_row_goes(any_house: House, tmp_path: Path) -> None:
    house = any_house
    file = tmp_path / "text"
    file.write_text("It was a bright cold day.")
    stored, _ = TextStore(house.engine, house.storage).add("default", "mine", file, suffix=".txt", actor="alice")
    with write(house.engine) as connection:  # as a process that dies between the row and the object
        connection.execute(delete(texts))
    assert house.collect().objects == [stored.key]


def test_texts_that_operators_have_put_into_the_bucket_stay(any_house: House) -> None:
    house = any_house
    hexadecimal = "0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"
    names = [
        *("mine.txt", "text_.txt", f"text_{hexadecimal}", f"text_{hexadecimal[:-1]}.txt", f"text_{hexadecimal}0.txt"),
        *(f"Text_{hexadecimal}.txt", f"text_{hexadecimal.upper()}.txt", f"text_{hexadecimal}.txt.bak"),
        *(f"old/text_{hexadecimal}.txt", f"my_text_{hexadecimal}.txt"),
    ]
    keys = {f"texts/default/{name}" for name in names} | {f"texts/text_{hexadecimal}.txt"}
    for key in keys:
        house.storage.put_bytes(key, b"x")
    assert house.collect().objects == []
    assert texts_left(house) == keys


@pytest.mark.parametrize("what", ["recipe", "evaluation", "task", "gate"])
def test_a_text_without_a_row_stays_while_a_job_that_has_not_ended_names_it(any_house: House, what: str) -> None:
    house = any_house
    key, other = lost_text(house), lost_text(house)
    source = {"kind": "object", "name": key}
    spec = {
        "recipe": {"recipe": {"calibration": {"source": source}}},
        "evaluation": {"evaluation": {"text": source}},
        "task": {"evaluation": {"tasks": [source, {"kind": "file", "name": "piqa.jsonl"}]}},
        "gate": {"recipe": {"quality_gate": {"text": source}}, "note": "50% of texts/ \u2028 \\"},
    }[what]
    new = NewJob(tenant_id="default", kind="quantize", spec=spec, fingerprint=what)
    job, _ = house.store.enqueue(new, actor="alice")
    assert house.collect().objects == [other]
    assert house.store.claim("worker", lease_seconds=60) is not None
    assert house.collect().objects == []
    house.store.cancel(job.id, tenant_id=None, actor="alice")
    assert house.collect().objects == []  # its worker may be reading
    assert texts_left(house) == {key}


def test_a_text_that_only_an_ended_job_names_goes(any_house: House) -> None:
    house = any_house
    key = lost_text(house)
    spec = {"evaluation": {"text": {"kind": "object", "name": key}}}
    new = NewJob(tenant_id="default", kind="evaluate", spec=spec, fingerprint="e")
    job, _ = house.store.enqueue(new, actor="alice")
    house.store.cancel(job.id, tenant_id=None, actor="alice")
    assert house.collect().objects == [key]


def test_unfinished_uploads_are_aborted(house: House) -> None:
    begun = house.storage._client.create_multipart_upload(Bucket=house.storage.bucket, Key="artifacts/default/j/x")
    assert house.collect(gc_grace_days=1).uploads == []
    assert house.collect(dry_run=True).uploads == ["artifacts/default/j/x"]
    assert house.collect().uploads == ["artifacts/default/j/x"]
    assert house.collect().uploads == []
    assert begun["UploadId"]


def test_old_jobs_are_forgotten_and_their_bill_is_not(house: House) -> None:
    failed = house.start("failed")
    house.work(failed)
    house.store.fail(failed, "error", "no")
    kept, needed = house.artifact("kept")
    deleted, _ = house.artifact("deleted")
    house.change_artifact(deleted, deleted_at=1)
    active = house.start("active")
    with write(house.engine) as connection:
        connection.execute(update(jobs).where(jobs.c.finished_at.is_not(None)).values(finished_at=1))
    report = house.collect()
    assert set(report.jobs) == {failed.job.id, deleted.id}
    assert {job.id for job in house.store.list("default")} == {kept.id, active.job.id}
    assert house.keys(kept) == needed
    with read(house.engine) as connection:
        assert set(connection.execute(select(job_events.c.job_id).distinct()).scalars()) == {kept.id, active.job.id}
        assert len(connection.execute(select(usage_ledger)).all()) == 6


def test_a_dry_run_says_what_a_run_does_and_changes_nothing(house: House) -> None:
    expired, _ = house.artifact("expired")
    house.change_artifact(expired, expires_at=1)
    deleted, _ = house.artifact("deleted")
    house.change_artifact(deleted, deleted_at=1)
    failed = house.start("failed")
    house.work(failed)
    house.store.fail(failed, "error", "no")
    before = everything(house)
    planned = house.collect(dry_run=True)
    assert everything(house) == before
    done = house.collect()
    assert planned.objects == done.objects
    assert (planned.artifacts_expired, planned.size_bytes) == (done.artifacts_expired, done.size_bytes)
    assert house.store.get(failed.job.id).state is JobState.FAILED


def test_the_command_reports_as_json(house: House, s3) -> None:
    house.artifact("a")
    environment = {
        "DUQUANT_HOME": str(house.settings.home),
        "DUQUANT_DATABASE_URL": house.settings.database_url,
        "DUQUANT_S3_ENDPOINT": house.storage.endpoint,
        "DUQUANT_S3_BUCKET": house.storage.bucket,
        "DUQUANT_S3_ACCESS_KEY": s3.access_key,
        "DUQUANT_S3_SECRET_KEY": s3.secret_key,
        "DUQUANT_GC_GRACE_DAYS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "infra.gc", "--dry-run"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["dry_run"] is True
    assert len(report["objects"]) == 2


def revise(house: House, job: Job, name: str) -> set[str]:
    """Give a job's artifact another card, as an evaluation does; return the card's keys."""
    keys = ArtifactKeys("default", job.id)
    with read(house.engine) as connection:
        found = select(artifacts.c.manifest_key).where(artifacts.c.job_id == job.id)
        manifest = json.loads(house.storage.get_bytes(connection.execute(found).scalar_one()))
    card, key = (keys.card(file, job_id=name, fence=1, attempt=1) for file in ("README.md", "manifest.json"))
    files = [each for each in manifest["files"] if each["name"] != "README.md"]
    house.storage.put_bytes(card, b"card")
    house.storage.put_bytes(key, json.dumps({"files": [*files, {"name": "README.md", "key": card}]}).encode())
    house.change_artifact(job, manifest_key=key)
    return {card, key}


def test_a_replaced_card_goes_and_the_first_manifest_stays(house: House) -> None:
    job, first = house.artifact("a")
    old, new = revise(house, job, "job_old"), revise(house, job, "job_new")
    assert set(house.collect().objects) & old == old
    assert house.keys(job) == first | new
    assert house.collect().objects == []


def test_cards_stay_as_long_as_links_to_them_may_be_in_use(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = house.artifact("a")
    old, new = revise(house, job, "job_old"), revise(house, job, "job_new")
    listed = house.storage.list
    young = 10**15  # milliseconds: younger than any grace

    def with_a_young_card(prefix: str) -> Iterator[ObjectInfo]:
        """What the server says when the grace is over for everything but the last card."""
        return (replace(item, modified_at=young) if item.key in new else item for item in listed(prefix))

    monkeypatch.setattr(house.storage, "list", with_a_young_card)
    collected = house.collect().objects
    assert collected, "failed attempts are collected all the same"
    assert not old & set(collected)


def test_reports_stay_as_long_as_an_evaluation_names_them(house: House) -> None:
    taken = house.start("measured")
    kept, lost = (report_key("default", taken.job.id, name) for name in ("1-a.html", "2-b.html"))
    for key in (kept, lost):
        house.storage.put_bytes(key, b"<p>")
    measured = Measured(
        fingerprint="f", artifact_job_id=None, settings={}, metrics={}, parts={}, is_complete=False, report_key=kept
    )
    house.store.record_measured(taken, measured)
    house.store.fail(taken, "quality_gate", "too high")
    assert house.collect(gc_failed_days=99).objects == [lost]
    assert [item.key for item in house.storage.list(REPORTS)] == [kept]
