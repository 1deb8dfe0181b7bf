"""A database of the first release, with jobs in every state, goes on under this one. On SQLite and on PostgreSQL."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Engine, select, text

from infra.database import make_engine, migration_lock, read, write
from infra.jobs import Claim, JobState, JobStore, NewJob
from infra.migrate import _config, is_current, upgrade_engine
from infra.schema import artifacts, jobs, queues, tenants

NOW = 1_700_000_000_000
SPEC = {"model": {"source": "demo", "name": "smollm2-135m"}, "recipe": {"name": "duquant"}}
RESULT = {"artifact": {"manifest_key": "artifacts/default/done/manifest.json", "size_bytes": 5, "summary": {"bits": 4}}}
COLUMNS = (
    "id, tenant_id, kind, state, reason, detail, spec, fingerprint, forced, priority, created_at, run_at, started_at, "
    "finished_at, attempt, max_attempts, lease_losses, max_lease_losses, lease_owner, lease_until, fence, phase, "
    "progress_done, progress_total, result, version"
)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.integration)])
def old_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A database that the first migration has made."""
    url = f"sqlite:///{tmp_path / 'old.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    engine = make_engine(url)
    with migration_lock(engine) as connection:
        command.upgrade(_config(connection=connection), "0001")
    yield engine
    engine.dispose()


def add(engine: Engine, job_id: str, state: str, **changes: object) -> None:
    """Insert a job as the first release did, by SQL of its time."""
    values: dict[str, object] = dict.fromkeys(name.strip() for name in COLUMNS.split(","))
    values |= {"id": job_id, "tenant_id": "default", "kind": "quantize", "state": state, "spec": json.dumps(SPEC)}
    values |= {"fingerprint": job_id, "forced": 0, "priority": 100, "created_at": NOW, "run_at": NOW, "attempt": 0}
    values |= {"max_attempts": 3, "lease_losses": 0, "max_lease_losses": 5, "fence": 0, "phase": "", "version": 1}
    values |= {"progress_done": 0, "progress_total": 0, **changes}
    casts = {"spec": "CAST(:spec AS JSONB)", "result": "CAST(:result AS JSONB)"}
    is_postgres = engine.dialect.name == "postgresql"
    marks = ", ".join(casts.get(name, f":{name}") if is_postgres else f":{name}" for name in values)
    with write(engine) as connection:
        connection.execute(text(f"INSERT INTO jobs ({', '.join(values)}) VALUES ({marks})"), values)
        event = "INSERT INTO job_events (job_id, at, type, actor, data) VALUES (:job, :at, 'enqueued', 'old', '{}')"
        connection.execute(text(event), {"job": job_id, "at": NOW})


@pytest.fixture
def upgraded(old_engine: Engine) -> Engine:
    add(old_engine, "waiting", "queued", priority=50)
    add(old_engine, "later", "scheduled", run_at=NOW + 60_000, attempt=1, reason="error", detail="S3 was away")
    held = {"lease_owner": "gone", "lease_until": NOW + 30_000, "fence": 3, "attempt": 1, "started_at": NOW}
    add(old_engine, "running", "running", **held)
    add(old_engine, "stopping", "cancelling", **held)
    add(old_engine, "done", "succeeded", finished_at=NOW, fence=1, attempt=1, result=json.dumps(RESULT))
    add(old_engine, "dead", "failed", finished_at=NOW, reason="bad_input", detail="no", spec='{"model": "m"}')
    layer = "INSERT INTO job_layers (job_id, layer, state, attempt, fence, key, sha256, size_bytes, metrics) VALUES "
    with write(old_engine) as connection:
        connection.execute(text(layer + f"('running', 0, 'done', 1, 3, 'k', '{'a' * 64}', 5, '{{}}')"))
        connection.execute(text(layer + "('running', 1, 'running', 1, 3, NULL, NULL, NULL, '{}')"))
    upgrade_engine(old_engine)
    return old_engine


def finish(store: JobStore, taken: Claim) -> None:
    for row in store.plan(taken, [0, 1]):
        if row.state != "done":
            started = store.start_layer(taken, row.layer, "node")
            store.commit_layer(taken, replace(started, key="k", sha256="b" * 64, size_bytes=5, seconds=1.0))
    artifact = {"manifest_key": f"artifacts/default/{taken.job.id}/manifest.json", "size_bytes": 5, "summary": {}}
    store.complete(taken, {"artifact": artifact})


def test_open_jobs_of_the_first_release_finish(upgraded: Engine) -> None:
    assert is_current(upgraded)
    now = NOW + 10_000
    store = JobStore(upgraded, lambda: now)
    # Its dispatcher may still be at work while the new release starts.
    old_claim = Claim(job=store.get("running"), fence=3, owner="gone")
    assert store.heartbeat(old_claim, lease_seconds=20) is None
    now = NOW + 61_000
    assert store.sweep() == 2
    order = []
    while (taken := store.claim("new", lease_seconds=60)) is not None:
        order.append(taken.job.id)
        finish(store, taken)
    assert order == ["waiting", "running", "later"]
    states = {job.id: job.state for job in store.list("default")}
    assert states == {
        "waiting": JobState.SUCCEEDED,
        "later": JobState.SUCCEEDED,
        "running": JobState.SUCCEEDED,
        "done": JobState.SUCCEEDED,
        "stopping": JobState.CANCELLED,
        "dead": JobState.FAILED,
    }
    # The layer that the old release had finished was not done again.
    assert [row.sha256 for row in store.layers("running")] == ["a" * 64, "b" * 64]


def test_what_old_rows_lack_is_filled_in(upgraded: Engine) -> None:
    with read(upgraded) as connection:
        rows = {row["id"]: row for row in connection.execute(select(jobs)).mappings()}
        made = connection.execute(select(artifacts)).mappings().one()
        assert connection.execute(select(queues.c.name, queues.c.paused)).all() == [("default", 0)]
        assert connection.execute(select(tenants.c.weight, tenants.c.max_queued)).all() == [(1.0, None)]
    assert (rows["done"]["model_name"], rows["done"]["recipe_name"]) == ("smollm2-135m", "duquant")
    assert (rows["dead"]["model_name"], rows["dead"]["recipe_name"]) == ("", "")
    assert {row["queue"] for row in rows.values()} == {"default"}
    assert rows["waiting"]["turn_at"] == NOW + 50 * 60_000
    assert (made["job_id"], made["size_bytes"], made["summary"], made["created_at"]) == ("done", 5, {"bits": 4}, NOW)


def test_a_finished_job_of_the_first_release_is_reused_and_a_failed_one_retried(upgraded: Engine) -> None:
    store = JobStore(upgraded)
    same = NewJob(tenant_id="default", kind="quantize", spec=SPEC, fingerprint="done")
    assert store.enqueue(same, actor="t")[0].id == "done"
    assert store.retry("dead", tenant_id="default", actor="alice").state is JobState.QUEUED


def test_the_way_back_keeps_the_jobs(upgraded: Engine) -> None:
    with migration_lock(upgraded) as connection:
        command.downgrade(_config(connection=connection), "0001")
    with read(upgraded) as connection:
        ids = set(connection.execute(text("SELECT id FROM jobs")).scalars())
    assert ids == {"waiting", "later", "running", "stopping", "done", "dead"}
    upgrade_engine(upgraded)
    assert JobStore(upgraded).get("later").run_at == NOW + 60_000
