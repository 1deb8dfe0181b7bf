"""Cancel, retry, release; the transition table and the events, on SQLite and on PostgreSQL."""

import pytest
from sqlalchemy import Engine, select, text, update
from sqlalchemy.exc import IntegrityError

from infra.database import read, write
from infra.errors import DatabaseUnusable, JobConflict, LeaseLost
from infra.jobs import ACTIVE, TRANSITIONS, Claim, Job, JobState, JobStore
from infra.schema import artifacts, jobs

LEASE = 60
TERMINAL = [state for state in JobState if state.is_terminal]


def test_a_waiting_job_is_cancelled_at_once(desk, store: JobStore) -> None:
    job = store.cancel(desk.add().id, tenant_id="default", actor="alice")
    assert job.state is JobState.CANCELLED
    assert job.finished_at is not None
    assert store.events(job.id)[-1].actor == "alice"
    assert store.claim("worker", lease_seconds=LEASE) is None


def test_a_running_job_is_cancelled_by_its_worker(desk, store: JobStore) -> None:
    desk.add()
    taken = desk.claim()
    assert store.cancel(taken.job.id, tenant_id="default", actor="alice").state is JobState.CANCELLING
    again = store.cancel(taken.job.id, tenant_id="default", actor="alice")
    assert again.state is JobState.CANCELLING
    with pytest.raises(JobConflict, match="cannot become succeeded"):
        store.complete(taken, {})
    assert store.finish_cancel(taken).state is JobState.CANCELLED
    assert desk.event_types(again) == ["enqueued", "claimed", "cancel_requested", "cancelled"]


@pytest.mark.parametrize("name", ["fail", "retry", "release"])
def test_whatever_ends_a_job_being_cancelled_cancels_it(desk, store: JobStore, worker_writes, name: str) -> None:
    desk.add()
    taken = desk.claim()
    store.cancel(taken.job.id, tenant_id="default", actor="alice")
    worker_writes[name](store, taken)
    assert store.get(taken.job.id).state is JobState.CANCELLED


def test_nobody_finishes_a_cancel_that_was_not_asked_for(desk, store: JobStore) -> None:
    desk.add()
    taken = desk.claim()
    with pytest.raises(JobConflict):
        store.finish_cancel(taken)
    assert store.get(taken.job.id).state is JobState.RUNNING


def test_a_retry_waits_for_its_time(desk, store: JobStore, clock) -> None:
    desk.add()
    waiting = store.fail(desk.claim(), "error", "S3 is away", retry_in_seconds=30)
    assert (waiting.state, waiting.run_at) == (JobState.SCHEDULED, clock.now + 30_000)
    assert (waiting.reason, waiting.detail) == ("error", "S3 is away")
    assert store.claim("worker", lease_seconds=LEASE) is None
    clock.advance(30)
    again = desk.claim()
    assert (again.job.attempt, again.fence, again.job.reason) == (2, 2, None)
    assert desk.event_types(waiting) == ["enqueued", "claimed", "retry_scheduled", "promoted", "claimed"]


def test_the_sweep_queues_what_is_due(desk, store: JobStore, clock) -> None:
    desk.add()
    job = store.fail(desk.claim(), "error", "no", retry_in_seconds=30)
    clock.advance(31)
    assert store.sweep() == 0
    assert store.get(job.id).state is JobState.QUEUED


def test_retries_run_out(desk, store: JobStore, clock) -> None:
    desk.add(max_attempts=2)
    store.fail(desk.claim(), "error", "first", retry_in_seconds=1)
    clock.advance(1)
    dead = store.fail(desk.claim(), "error", "second", retry_in_seconds=1)
    assert (dead.state, dead.reason, dead.detail) == (JobState.FAILED, "retries_exhausted", "second")


def test_bad_input_is_not_tried_again(desk, store: JobStore) -> None:
    desk.add()
    dead = store.fail(desk.claim(), "bad_input", "layer 3 holds NaN")
    assert (dead.state, dead.reason, dead.detail) == (JobState.FAILED, "bad_input", "layer 3 holds NaN")


def test_a_released_job_is_claimed_again_and_its_try_does_not_count(desk, store: JobStore) -> None:
    desk.add(max_attempts=1)
    released = store.release(desk.claim())
    assert (released.state, released.attempt, released.lease_losses) == (JobState.QUEUED, 0, 0)
    assert desk.claim().fence == 2


def test_a_cancelled_retry_does_not_come_back(desk, store: JobStore, clock) -> None:
    desk.add()
    job = store.fail(desk.claim(), "error", "no", retry_in_seconds=1)
    store.cancel(job.id, tenant_id="default", actor="alice")
    clock.advance(2)
    assert store.claim("worker", lease_seconds=LEASE) is None


def test_detail_without_nul_characters_reaches_the_database(desk, store: JobStore) -> None:
    desk.add()
    assert store.fail(desk.claim(), "error", "bad\0byte").detail == "badbyte"


def _force_state(engine: Engine, job: Job, state: JobState) -> None:
    """Put a job into a state by hand, within what the table's own constraints allow."""
    held = state in (JobState.RUNNING, JobState.CANCELLING)
    with write(engine) as connection:
        connection.execute(
            update(jobs)
            .where(jobs.c.id == job.id)
            .values(
                state=state,
                lease_until=2**50 if held else None,
                finished_at=1 if state.is_terminal else None,
                reason="error" if state is JobState.FAILED else None,
                detail="no",
                result={} if state is JobState.SUCCEEDED else None,
            )
        )


@pytest.mark.parametrize("start", list(JobState))
def test_only_the_edges_of_the_table_exist(
    desk, store: JobStore, engine: Engine, worker_writes, start: JobState
) -> None:
    """Every operation, tried in every state, takes an allowed edge or changes nothing."""
    job = desk.add()
    operations = {
        **worker_writes,
        "cancel": lambda store, _: store.cancel(job.id, tenant_id="default", actor="t"),
        "claim": lambda store, _: store.claim("w", lease_seconds=LEASE),
        "sweep": lambda store, _: store.sweep(),
    }
    for operation in operations.values():
        _force_state(engine, job, start)
        before = store.get(job.id)
        events = len(store.events(job.id))
        try:
            operation(store, Claim(job=before, fence=before.fence, owner="w"))
        except (JobConflict, LeaseLost):
            assert store.get(job.id) == before
            assert len(store.events(job.id)) == events
        reached = store.get(job.id).state
        if reached is not start:
            assert reached in TRANSITIONS[start] or (start, reached) == (JobState.SCHEDULED, JobState.RUNNING)
            last = store.events(job.id)[-1]
            assert last.data["to"] == reached


def test_terminal_states_never_change(desk, store: JobStore, engine: Engine) -> None:
    job = desk.add()
    for state in TERMINAL:
        _force_state(engine, job, state)
        with pytest.raises(JobConflict):
            store.cancel(job.id, tenant_id="default", actor="t")
    assert set(TERMINAL) == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    assert set(ACTIVE) | set(TERMINAL) == set(JobState)


def test_the_database_itself_refuses_half_states(desk, store: JobStore, engine: Engine) -> None:
    job = desk.add()
    for values in (
        {"state": "lost"},
        {"state": "running"},
        {"state": "succeeded", "finished_at": 1},
        {"state": "failed", "finished_at": 1},
        {"finished_at": 1},
    ):
        with pytest.raises(IntegrityError), write(engine) as connection:
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(**values))


def test_a_transition_whose_event_cannot_be_written_did_not_happen(desk, store: JobStore, engine: Engine) -> None:
    job = desk.add()
    taken = desk.claim()
    with write(engine) as connection:
        connection.execute(text("DROP TABLE job_events"))
    for operation in (
        lambda: store.complete(taken, {}),
        lambda: store.cancel(job.id, tenant_id="default", actor="alice"),
        lambda: store.release(taken),
    ):
        with pytest.raises(DatabaseUnusable):
            operation()
        assert store.get(job.id) == taken.job


def test_events_are_read_on_from_where_a_reader_stopped(desk, store: JobStore) -> None:
    job = desk.add()
    taken = desk.claim()
    for step in range(5):
        store.progress(taken, phase="p", done=step, total=5)
    everything = store.events(job.id)
    assert [event.id for event in everything] == sorted(event.id for event in everything)
    assert store.events(job.id, after=everything[2].id) == everything[3:]
    assert store.events(job.id, limit=2) == everything[:2]


def test_the_events_of_a_job_tell_its_whole_history(desk, store: JobStore, clock) -> None:
    job = desk.add()
    store.fail(desk.claim(), "error", "x", retry_in_seconds=1)
    clock.advance(1)
    desk.claim()
    desk.lose_lease()
    store.release(desk.claim())
    store.complete(desk.claim(), {})
    state = None
    for event in store.events(job.id):
        assert event.data.get("from") == state
        state = event.data["to"]
    assert state == store.get(job.id).state == JobState.SUCCEEDED


def test_a_plain_job_s_events_and_artifact_say_the_same_in_every_database(
    desk, store: JobStore, engine: Engine
) -> None:
    job = desk.add(model_name="m", recipe_name="r")
    taken = desk.claim()
    ended = store.complete(taken, {"artifact": {"manifest_key": "k", "size_bytes": 7, "summary": {"bits": 4}}})
    assert [(event.type, event.actor, event.data) for event in store.events(job.id)][1:] == [
        ("claimed", "worker", {"from": "queued", "to": "running", "fence": 1, "attempt": 1}),
        ("succeeded", "worker", {"from": "running", "to": "succeeded"}),
    ]
    with read(engine) as connection:
        made = dict(connection.execute(select(artifacts)).mappings().one())
    assert made.pop("id").startswith("art_")
    assert made == {
        **{name: getattr(job, name) for name in ("tenant_id", "fingerprint", "model_name", "recipe_name")},
        "job_id": job.id,
        "manifest_key": "k",
        "size_bytes": 7,
        "summary": {"bits": 4},
        "created_at": ended.finished_at,
        "expires_at": None,
        "deleted_at": None,
        "purged_at": None,
    }
