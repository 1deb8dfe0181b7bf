"""Layers: the unit of resume, on SQLite and on PostgreSQL."""

from dataclasses import replace

import pytest

from infra.errors import JobConflict
from infra.jobs import JobState, JobStore


def test_layers_are_planned_once_and_kept(desk, store: JobStore) -> None:
    desk.add()
    taken = desk.claim()
    rows = store.plan(taken, [-1, 0, 1, 1])
    assert [(row.layer, row.state, row.attempt) for row in rows] == [
        (-1, "pending", 0),
        (0, "pending", 0),
        (1, "pending", 0),
    ]
    assert store.plan(taken, [-1, 0, 1]) == rows
    assert store.layers(taken.job.id) == rows


def test_a_layer_is_started_and_committed(desk, store: JobStore, clock) -> None:
    desk.add()
    taken = desk.claim()
    store.plan(taken, [0])
    started = store.start_layer(taken, 0, "node-1")
    assert (started.state, started.attempt, started.fence, started.node) == ("running", 1, 1, "node-1")
    clock.advance(2)
    done = store.commit_layer(taken, desk.finished_layer(started))
    assert (done.state, done.key, done.metrics, done.finished_at) == ("done", "k", {"mse": 0.25}, clock.now)
    assert desk.event_types(taken.job)[-2:] == ["layer_started", "layer_done"]


def test_committing_the_same_layer_again_changes_nothing(desk, store: JobStore) -> None:
    desk.add()
    taken = desk.claim()
    store.plan(taken, [0])
    row = desk.finished_layer(store.start_layer(taken, 0, "n"))
    done = store.commit_layer(taken, row)
    events = store.events(taken.job.id)
    assert store.commit_layer(taken, row) == done
    assert store.events(taken.job.id) == events


def test_a_done_layer_keeps_its_bytes(desk, store: JobStore) -> None:
    desk.add()
    taken = desk.claim()
    store.plan(taken, [0])
    row = desk.finished_layer(store.start_layer(taken, 0, "n"))
    store.commit_layer(taken, row)
    with pytest.raises(JobConflict):
        store.commit_layer(taken, replace(row, sha256="b" * 64))
    with pytest.raises(JobConflict):
        store.start_layer(taken, 0, "n")
    with pytest.raises(JobConflict):
        store.fail_layer(taken, 0, "late")


def test_only_the_latest_attempt_at_a_layer_commits(desk, store: JobStore) -> None:
    desk.add()
    taken = desk.claim()
    store.plan(taken, [0])
    slow = store.start_layer(taken, 0, "slow")
    store.fail_layer(taken, 0, "time-out")
    fast = store.start_layer(taken, 0, "fast")
    with pytest.raises(JobConflict, match="attempt 1"):
        store.commit_layer(taken, desk.finished_layer(slow))
    assert store.commit_layer(taken, desk.finished_layer(fast)).attempt == 2


def test_layers_that_were_not_planned_do_not_exist(desk, store: JobStore, worker_writes) -> None:
    desk.add()
    taken = desk.claim()
    for name in ("start_layer", "commit_layer", "fail_layer", "reopen_layer"):
        with pytest.raises(JobConflict):
            worker_writes[name](store, taken)


def test_a_new_claim_keeps_done_layers_and_resets_the_rest(desk, store: JobStore, clock) -> None:
    desk.add()
    first = desk.claim()
    store.plan(first, [0, 1, 2])
    store.commit_layer(first, desk.finished_layer(store.start_layer(first, 0, "n")))
    store.start_layer(first, 1, "n")
    desk.lose_lease()
    second = desk.claim()
    rows = store.plan(second, [0, 1, 2])
    assert [(row.state, row.attempt) for row in rows] == [("done", 1), ("pending", 1), ("pending", 0)]
    again = store.start_layer(second, 1, "n")
    assert (again.attempt, again.fence) == (2, 2)


def test_a_damaged_layer_is_done_again(desk, store: JobStore) -> None:
    desk.add()
    taken = desk.claim()
    store.plan(taken, [0])
    store.commit_layer(taken, desk.finished_layer(store.start_layer(taken, 0, "n")))
    reopened = store.reopen_layer(taken, 0, "object is missing")
    assert (reopened.state, reopened.sha256, reopened.attempt) == ("pending", None, 1)
    assert store.start_layer(taken, 0, "n").attempt == 2


def test_a_job_with_unfinished_layers_does_not_succeed(desk, store: JobStore) -> None:
    desk.add()
    taken = desk.claim()
    store.plan(taken, [0])
    with pytest.raises(JobConflict, match="1 layers are not done"):
        store.complete(taken, {})
    assert store.get(taken.job.id).state is JobState.RUNNING


def test_progress_is_shown_and_told(desk, store: JobStore) -> None:
    desk.add()
    taken = desk.claim()
    store.progress(taken, phase="calibrate", done=3, total=30)
    job = store.get(taken.job.id)
    assert (job.phase, job.progress_done, job.progress_total) == ("calibrate", 3, 30)
    assert store.events(job.id)[-1].data == {"phase": "calibrate", "done": 3, "total": 30}
    assert job.version > taken.job.version
