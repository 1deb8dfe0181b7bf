"""Leases, fences and the sweep: a worker that lost its job changes nothing any more. On SQLite and on PostgreSQL."""

from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from infra.errors import LeaseLost
from infra.jobs import Claim, JobState, JobStore

LEASE = 60


def test_a_beat_extends_the_lease_and_brings_the_cancel_back(desk, store: JobStore, clock) -> None:
    desk.add()
    taken = desk.claim()
    clock.advance(50)
    assert not store.heartbeat(taken, lease_seconds=LEASE)
    clock.advance(50)
    assert store.sweep() == 0
    store.cancel(taken.job.id, tenant_id="default", actor="tester")
    assert store.heartbeat(taken, lease_seconds=LEASE)


def test_a_beat_is_no_change_that_readers_see(desk, store: JobStore) -> None:
    desk.add()
    taken = desk.claim()
    store.heartbeat(taken, lease_seconds=LEASE)
    assert store.get(taken.job.id).version == taken.job.version


def test_a_lease_holds_through_its_last_millisecond(desk, store: JobStore, clock) -> None:
    """The sweep and the worker agree on the moment: there is none at which both or neither may act."""
    desk.add()
    taken = desk.claim()
    clock.advance(LEASE)
    assert store.sweep() == 0
    assert not store.heartbeat(taken, lease_seconds=LEASE)
    clock.advance(LEASE + 0.001)
    assert store.sweep() == 1


def test_an_expired_lease_is_never_renewed_even_when_nobody_has_noticed(desk, store: JobStore, clock) -> None:
    desk.add()
    taken = desk.claim()
    clock.advance(LEASE + 0.001)
    with pytest.raises(LeaseLost):
        store.heartbeat(taken, lease_seconds=LEASE)
    assert store.get(taken.job.id).lease_until == taken.job.lease_until


def _expired(desk, clock, store: JobStore, taken: Claim) -> None:
    clock.advance(LEASE + 1)


def _swept(desk, clock, store: JobStore, taken: Claim) -> None:
    desk.lose_lease()


def _claimed_by_another(desk, clock, store: JobStore, taken: Claim) -> None:
    desk.lose_lease()
    # The same owner name: a restarted worker must not be taken for its zombie.
    second = desk.claim(taken.owner)
    store.plan(second, [0])
    store.start_layer(second, 0, "node")


def _succeeded(desk, clock, store: JobStore, taken: Claim) -> None:
    row = store.start_layer(taken, 0, "node")
    store.commit_layer(taken, desk.finished_layer(row))
    store.complete(taken, {})


@pytest.mark.parametrize("lose", [_expired, _swept, _claimed_by_another, _succeeded])
def test_a_zombie_changes_nothing(
    desk,
    clock,
    store: JobStore,
    worker_write: Callable[[JobStore, Claim], object],
    lose: Callable[..., None],
) -> None:
    job = desk.add()
    zombie = desk.claim()
    store.plan(zombie, [0])
    lose(desk, clock, store, zombie)
    before = (store.get(job.id), store.layers(job.id), store.events(job.id))
    with pytest.raises(LeaseLost):
        worker_write(store, zombie)
    assert (store.get(job.id), store.layers(job.id), store.events(job.id)) == before


def test_a_lost_lease_gives_the_job_back_without_counting_an_error(desk, store: JobStore, clock) -> None:
    job = desk.add()
    desk.claim("w1")
    assert store.sweep() == 0
    clock.advance(LEASE + 1)
    assert store.sweep() == 1
    assert store.sweep() == 0
    back = store.get(job.id)
    assert (back.state, back.lease_losses, back.attempt, back.lease_owner) == (JobState.QUEUED, 1, 0, None)
    assert store.events(job.id)[-1].data["owner"] == "w1"
    assert desk.claim().fence == 2


def test_a_job_that_kills_its_workers_fails_in_the_end(desk, store: JobStore, clock) -> None:
    job = desk.add()
    for _ in range(job.max_lease_losses + 1):
        assert store.get(job.id).state is JobState.QUEUED
        desk.claim()
        clock.advance(LEASE + 1)
        store.sweep()
    dead = store.get(job.id)
    assert (dead.state, dead.reason) == (JobState.FAILED, "lease_losses_exhausted")
    assert "worker" in (dead.detail or "")
    assert store.claim("worker", lease_seconds=LEASE) is None


def test_a_job_being_cancelled_whose_worker_vanished_is_cancelled(desk, store: JobStore, clock) -> None:
    job = desk.add()
    desk.claim()
    store.cancel(job.id, tenant_id="default", actor="tester")
    clock.advance(LEASE + 1)
    assert store.sweep() == 1
    assert store.get(job.id).state is JobState.CANCELLED


def test_without_a_clock_of_its_own_the_store_reads_the_databases(desk, engine: Engine) -> None:
    store = JobStore(engine)
    job, _ = store.enqueue(desk.new_job(), actor="tester")
    taken = store.claim("worker", lease_seconds=0)
    assert taken is not None
    assert taken.job.lease_until is not None
    assert 0 <= taken.job.lease_until - job.created_at < 60_000

    def beat_until_lost() -> None:
        # A lease of no length ends with the millisecond, by the database's clock alone.
        for _ in range(10_000):
            store.heartbeat(taken, lease_seconds=0)

    with pytest.raises(LeaseLost):
        beat_until_lost()
    assert store.sweep() == 1


def test_dispatchers_are_alive_while_they_beat(store: JobStore, clock) -> None:
    assert store.live_workers(30) == []
    store.worker_beat("w1", {"slots": 2})
    clock.advance(20)
    store.worker_beat("w2", {})
    store.worker_beat("w2", {"slots": 4})
    assert [(worker.owner, worker.info) for worker in store.live_workers(30)] == [
        ("w1", {"slots": 2}),
        ("w2", {"slots": 4}),
    ]
    clock.advance(20)
    assert [worker.owner for worker in store.live_workers(30)] == ["w2"]
    store.worker_gone("w2")
    assert store.live_workers(30) == []
