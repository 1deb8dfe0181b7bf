"""Times, deadlines, dependencies, retries and changes, and what is told of them. On SQLite and on PostgreSQL."""

import itertools
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, insert, select, text

from infra.database import read, transaction, write
from infra.errors import DependencyFailed, DependencyNotFound, JobChanged, JobConflict, QueueNotFound
from infra.jobs import Job, JobState, JobStore
from infra.schema import artifacts, evaluations, tenants, usage_ledger, webhook_deliveries, webhooks

LEASE = 60
MADE = {"artifact": {"manifest_key": "k", "size_bytes": 9, "summary": {}}}


def state(store: JobStore, job: Job) -> JobState:
    return store.get(job.id).state


# Times


def test_a_job_waits_for_its_time(desk, store: JobStore, clock) -> None:
    job = desk.add(run_at=clock.now + 30_000)
    assert job.state is JobState.SCHEDULED
    assert store.claim("worker", lease_seconds=LEASE) is None
    clock.advance(30)
    assert desk.claim().job.id == job.id


def test_a_time_in_the_past_is_no_way_to_the_front(desk, clock) -> None:
    first = desk.add("first")
    clock.advance(1)
    sly = desk.add("sly", run_at=1)
    assert (sly.state, sly.run_at) == (JobState.QUEUED, clock.now)
    assert desk.claim().job.id == first.id


def test_a_queue_has_to_exist(desk) -> None:
    with pytest.raises(QueueNotFound):
        desk.add(queue="nowhere")


# Deadlines


def test_a_waiting_job_fails_at_its_deadline(desk, store: JobStore, clock) -> None:
    jobs = [desk.add("a", deadline_at=clock.now + 10_000)]
    jobs.append(desk.add("b", deadline_at=clock.now + 10_000, run_at=clock.now + 60_000))
    jobs.append(desk.add("c", deadline_at=clock.now + 10_000, depends_on=[jobs[0].id]))
    later = desk.add("d", deadline_at=clock.now + 20_000)
    clock.advance(10)
    # Nobody may start it any more, swept or not.
    assert desk.claim().job.id == later.id
    assert store.sweep() == 0
    ended = [store.get(job.id) for job in jobs]
    assert {(job.state, job.reason) for job in ended[:2]} == {(JobState.FAILED, "deadline")}
    assert ended[2].reason in ("deadline", "dependency_failed")


def test_a_running_job_is_told_of_its_deadline_at_the_beat(desk, store: JobStore, clock) -> None:
    job = desk.add(deadline_at=clock.now + 10_000)
    taken = desk.claim()
    assert store.heartbeat(taken, lease_seconds=LEASE) is None
    clock.advance(10)
    assert store.heartbeat(taken, lease_seconds=LEASE) == "deadline"
    store.sweep()
    assert state(store, job) is JobState.RUNNING
    assert store.fail(taken, "deadline", "too late").reason == "deadline"


def test_work_that_is_done_after_the_deadline_is_done(desk, store: JobStore, clock) -> None:
    desk.add(deadline_at=clock.now + 10_000)
    taken = desk.claim()
    clock.advance(11)
    assert store.complete(taken, {}).state is JobState.SUCCEEDED


# Dependencies


def test_a_job_waits_for_all_that_it_depends_on(desk, store: JobStore) -> None:
    first, second = desk.add("a"), desk.add("b")
    after = desk.add("c", depends_on=[first.id, second.id, first.id])
    assert after.state is JobState.BLOCKED
    store.complete(desk.claim(), MADE)
    assert state(store, after) is JobState.BLOCKED
    store.complete(desk.claim(), {})
    assert state(store, after) is JobState.QUEUED
    assert desk.event_types(after) == ["enqueued", "unblocked"]


@pytest.mark.parametrize("end", ["makes an artifact", "makes none", "fails"])
def test_a_job_that_ends_while_another_is_added_behind_it_is_still_waited_for(
    desk, store: JobStore, engine: Engine, end: str
) -> None:
    first = desk.add("a")
    taken = desk.claim()

    def finish() -> None:
        if end == "fails":
            store.fail(taken, "error", "broken")
        else:
            store.complete(taken, MADE if end == "makes an artifact" else {})

    with ThreadPoolExecutor(1) as pool:
        with transaction(engine):
            after = desk.add("b", depends_on=[first.id])
            assert after.state is JobState.BLOCKED
            ending = pool.submit(finish)
            _await_lock(engine, ending)
        ending.result(timeout=30)
    assert state(store, after) is (JobState.FAILED if end == "fails" else JobState.QUEUED)


def _await_lock(engine: Engine, work: "Future[None]") -> None:
    """Wait until somebody else's statement waits for a row. SQLite's writers have waited since they began."""
    if engine.dialect.name == "sqlite":
        return
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not work.done():
        with engine.connect() as connection:
            if connection.execute(waiting).scalar_one():
                return
        time.sleep(0.01)
    raise AssertionError("the job ended without waiting for the one that was being added")


def test_what_has_succeeded_blocks_nothing(desk, store: JobStore) -> None:
    first = desk.add("a")
    store.complete(desk.claim(), {})
    assert desk.add("b", depends_on=[first.id]).state is JobState.QUEUED


def test_an_unblocked_job_still_waits_for_its_time(desk, store: JobStore, clock) -> None:
    first = desk.add("a")
    after = desk.add("b", depends_on=[first.id], run_at=clock.now + 60_000)
    store.complete(desk.claim(), {})
    assert state(store, after) is JobState.SCHEDULED


@pytest.mark.parametrize("end", ["fail", "cancel"])
def test_a_failure_takes_a_whole_chain_along(desk, store: JobStore, end: str) -> None:
    # Longer than Python's stack would carry.
    chain = [desk.add("0")]
    for number in range(1, 12):
        chain.append(desk.add(str(number), depends_on=[chain[-1].id]))
    if end == "fail":
        store.fail(desk.claim(), "bad_input", "no")
    else:
        store.cancel(chain[0].id, tenant_id="default", actor="alice")
    for before, job in itertools.pairwise(chain):
        ended = store.get(job.id)
        assert (ended.state, ended.reason) == (JobState.FAILED, "dependency_failed")
        assert before.id in (ended.detail or "")


def test_only_own_jobs_that_may_succeed_can_be_waited_for(desk, store: JobStore, engine: Engine) -> None:
    with write(engine) as connection:
        connection.execute(insert(tenants).values(id="other", name="Other", created_at=0))
    theirs = desk.add("theirs", tenant_id="other")
    for missing in ("job_missing", theirs.id):
        with pytest.raises(DependencyNotFound):
            desk.add("mine", depends_on=[missing])
    store.cancel(theirs.id, tenant_id="other", actor="t")
    with pytest.raises(DependencyFailed):
        desk.add("theirs too", tenant_id="other", depends_on=[theirs.id])
    assert store.counts("default")[JobState.BLOCKED] == 0


# Retry of a job that has ended


def test_a_retried_job_goes_on_from_its_finished_layers(desk, store: JobStore) -> None:
    job = desk.add(max_attempts=1)
    taken = desk.claim()
    store.plan(taken, [0, 1])
    store.commit_layer(taken, desk.finished_layer(store.start_layer(taken, 0, "n")))
    store.fail(taken, "bad_input", "layer 1 holds NaN")
    again = store.retry(job.id, tenant_id="default", actor="alice")
    assert (again.state, again.attempt, again.reason, again.finished_at) == (JobState.QUEUED, 0, None, None)
    second = desk.claim()
    assert second.fence == 2
    assert [row.state for row in store.plan(second, [0, 1])] == ["done", "pending"]
    assert desk.event_types(job)[3:6] == ["layer_started", "layer_done", "failed"]
    assert store.events(job.id)[6].data == {"from": "failed", "to": "queued", "reason": "bad_input"}


def test_a_cancelled_job_can_be_retried_and_others_cannot(desk, store: JobStore) -> None:
    job = desk.add()
    with pytest.raises(JobConflict, match="only a failed or cancelled"):
        store.retry(job.id, tenant_id="default", actor="alice")
    store.cancel(job.id, tenant_id="default", actor="alice")
    store.retry(job.id, tenant_id="default", actor="alice")
    store.complete(desk.claim(), {})
    with pytest.raises(JobConflict, match="is succeeded"):
        store.retry(job.id, tenant_id="default", actor="alice")


def test_the_same_work_is_not_retried_beside_itself(desk, store: JobStore) -> None:
    failed = desk.add()
    store.fail(desk.claim(), "error", "no")
    desk.add()
    with pytest.raises(JobConflict, match="doing the work"):
        store.retry(failed.id, tenant_id="default", actor="alice")
    assert state(store, failed) is JobState.FAILED


def test_a_retry_drops_a_deadline_that_has_passed(desk, store: JobStore, clock) -> None:
    job = desk.add(deadline_at=clock.now + 1000)
    clock.advance(1)
    store.sweep()
    assert store.retry(job.id, tenant_id="default", actor="alice").deadline_at is None
    store.sweep()
    assert state(store, job) is JobState.QUEUED


def test_a_dependent_is_retried_after_what_it_depends_on(desk, store: JobStore) -> None:
    first = desk.add("a")
    after = desk.add("b", depends_on=[first.id])
    store.fail(desk.claim(), "error", "no")
    with pytest.raises(DependencyFailed):
        store.retry(after.id, tenant_id="default", actor="alice")
    store.retry(first.id, tenant_id="default", actor="alice")
    assert store.retry(after.id, tenant_id="default", actor="alice").state is JobState.BLOCKED
    store.complete(desk.claim(), {})
    assert state(store, after) is JobState.QUEUED


# Changes


def test_a_waiting_jobs_priority_and_time_can_be_changed(desk, store: JobStore, clock) -> None:
    desk.add("a")
    job = desk.add("b")
    sooner = store.change(job.id, {"priority": 1}, tenant_id="default", actor="alice", version=job.version)
    assert (sooner.priority, sooner.version, store.queue_position(sooner)) == (1, job.version + 1, 0)
    later = store.change(job.id, {"run_at": clock.now + 5000}, tenant_id="default", actor="alice")
    assert later.state is JobState.SCHEDULED
    assert desk.claim().job.fingerprint == "a"
    assert store.change(job.id, {"run_at": 0}, tenant_id="default", actor="alice").state is JobState.QUEUED
    assert desk.claim().job.id == job.id


def test_a_change_on_top_of_an_unseen_one_is_refused(desk, store: JobStore) -> None:
    job = desk.add()
    store.change(job.id, {"priority": 1}, tenant_id="default", actor="alice")
    with pytest.raises(JobChanged):
        store.change(job.id, {"priority": 2}, tenant_id="default", actor="bob", version=job.version)


def test_only_the_deadline_of_a_running_job_can_be_changed(desk, store: JobStore, clock) -> None:
    desk.add()
    taken = desk.claim()
    with pytest.raises(JobConflict):
        store.change(taken.job.id, {"priority": 1}, tenant_id="default", actor="alice")
    store.change(taken.job.id, {"deadline_at": clock.now}, tenant_id="default", actor="alice")
    assert store.heartbeat(taken, lease_seconds=LEASE) == "deadline"
    store.complete(taken, {})
    with pytest.raises(JobConflict):
        store.change(taken.job.id, {"deadline_at": None}, tenant_id="default", actor="alice")


@pytest.mark.parametrize("end", ["waiting", "running", "succeeded"])
def test_labels_are_replaced_whatever_the_job_does(desk, store: JobStore, end: str) -> None:
    job = desk.add(labels={"team": "search", "run": "1"})
    if end != "waiting":
        taken = desk.claim()
    if end == "succeeded":
        store.complete(taken, MADE)
    before = store.get(job.id)
    changed = store.change(job.id, {"labels": {"run": "2"}}, tenant_id="default", actor="alice", version=before.version)
    assert (changed.labels, changed.state, changed.version) == ({"run": "2"}, before.state, before.version + 1)
    event = store.events(job.id)[-1]
    assert (event.type, event.actor, event.data) == ("changed", "alice", {"changes": {"labels": {"run": "2"}}})
    assert store.change(job.id, {"labels": {}}, tenant_id="default", actor="alice").labels == {}
    with pytest.raises(JobChanged):
        store.change(job.id, {"labels": {}}, tenant_id="default", actor="bob", version=before.version)
    if end == "succeeded":
        with pytest.raises(JobConflict):
            store.change(job.id, {"labels": {}, "deadline_at": None}, tenant_id="default", actor="alice")
        with pytest.raises(JobConflict):
            store.change(job.id, {}, tenant_id="default", actor="alice")


@pytest.mark.parametrize("changes", [{"labels": {"a": "b"}}, {"deadline_at": None}], ids=["labels", "deadline"])
def test_a_job_that_waits_for_another_try_keeps_its_place_when_it_is_changed(
    desk, store: JobStore, clock, changes: dict
) -> None:
    desk.add("first", deadline_at=clock.now + 3_600_000)
    store.fail(desk.claim(), "error", "outage", retry_in_seconds=30)
    clock.advance(10)
    desk.add("second")
    first = store.list("default")[-1]
    store.change(first.id, changes, tenant_id="default", actor="alice")
    clock.advance(30)
    assert desk.claim().job.id == first.id


# What a job leaves behind


def test_an_artifact_is_listed_from_the_moment_its_job_succeeds(desk, store: JobStore, engine: Engine) -> None:
    desk.add(model_name="tiny", recipe_name="rtn")
    artifact = {"manifest_key": "k", "size_bytes": 9, "summary": {"bits": 4}, "files": 3}
    job = store.complete(desk.claim(), {"artifact": artifact})
    with read(engine) as connection:
        row = connection.execute(select(artifacts)).mappings().one()
    assert row["id"].startswith("art_")
    assert {name: row[name] for name in ("job_id", "model_name", "recipe_name", "size_bytes", "summary")} == {
        "job_id": job.id,
        "model_name": "tiny",
        "recipe_name": "rtn",
        "size_bytes": 9,
        "summary": {"bits": 4},
    }
    assert row["created_at"] == job.finished_at


def test_work_whose_artifact_was_deleted_is_done_again(desk, store: JobStore, engine: Engine) -> None:
    first = desk.add()
    store.complete(desk.claim(), MADE)
    assert store.enqueue(desk.new_job(), actor="t") == (store.get(first.id), False)
    with write(engine) as connection:
        connection.execute(artifacts.update().values(deleted_at=1))
    again, created = store.enqueue(desk.new_job(), actor="t")
    assert created
    assert again.id != first.id


def test_an_evaluation_belongs_to_its_artifact(desk, store: JobStore, engine: Engine) -> None:
    quantized = desk.add("q")
    store.complete(desk.claim(), MADE)
    desk.add("e", kind="evaluate", model_name="tiny")
    metrics = {"perplexity": 7.5, "device": "cpu"}
    job = store.complete(desk.claim(), {"artifact_job_id": quantized.id, "metrics": metrics, "seconds": 2.5})
    with read(engine) as connection:
        row = connection.execute(select(evaluations)).mappings().one()
        assert row["artifact_id"] == connection.execute(select(artifacts.c.id)).scalar_one()
        assert (row["job_id"], row["metrics"]) == (job.id, metrics)


def test_a_layer_is_billed_once_however_often_it_is_reported(desk, store: JobStore, engine: Engine) -> None:
    desk.add()
    taken = desk.claim()
    store.plan(taken, [0])
    row = desk.finished_layer(store.start_layer(taken, 0, "n"))
    store.commit_layer(taken, row, device="H200")
    store.commit_layer(taken, row, device="H200")
    with read(engine) as connection:
        (bill,) = connection.execute(select(usage_ledger)).mappings().all()
    assert (bill["job_id"], bill["layer"], bill["fence"], bill["gpu_ms"], bill["device"]) == (
        taken.job.id,
        0,
        1,
        1500,
        "H200",
    )
    assert store.get(taken.job.id).gpu_ms == 1500


def test_webhooks_are_told_in_the_transaction_of_the_change(desk, store: JobStore, engine: Engine) -> None:
    def hook(name: str, **values: object) -> None:
        plain = {"tenant_id": "default", "url": "https://x", "secret": "s", "events": [], "created_at": 0}
        with write(engine) as connection:
            connection.execute(insert(webhooks).values(id=name, **{**plain, **values}))

    hook("all")
    hook("ends", events=["job.failed", "job.cancelled"])
    hook("off", enabled=0)
    job = desk.add()
    store.fail(desk.claim(), "bad_input", "no")
    with read(engine) as connection:
        rows = connection.execute(select(webhook_deliveries).order_by(webhook_deliveries.c.id)).mappings().all()
    assert sorted((row["webhook_id"], row["event"]) for row in rows) == [
        ("all", "job.failed"),
        ("all", "job.started"),
        ("ends", "job.failed"),
    ]
    told = rows[-1]["payload"]["data"]
    assert (told["job_id"], told["reason"], told["detail"]) == (job.id, "bad_input", "no")


def test_dead_letters_are_grouped_by_reason(desk, store: JobStore, clock) -> None:
    for number in range(3):
        desk.add(f"bad {number}")
        store.fail(desk.claim(), "bad_input", f"NaN in {number}")
        clock.advance(1)
    desk.add("bug")
    dead = store.fail(desk.claim(), "error", "oops")
    groups = [(group.reason, group.count, group.latest_detail) for group in store.failures("default")]
    assert groups == [("bad_input", 3, "NaN in 2"), ("error", 1, "oops")]
    assert store.failures("default")[1].latest_job_id == dead.id
    assert store.failures("other") == []
