"""Queues on each kind of database: made, bounded and deleted, also while jobs are submitted and claimed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any

import pytest
from sqlalchemy import Engine, select

from infra import audit
from infra.batches import BatchStore, NewItem
from infra.database import make_engine, read, transaction
from infra.errors import JobConflict, QueueChanged, QueueConflict, QueueNotFound, QuotaExceeded
from infra.jobs import JobState, JobStore
from infra.queue_metrics import QueueMetrics
from infra.queues import MAX_QUEUES, QueueStore
from infra.schema import jobs
from infra.schema import queues as queues_table

pytestmark = pytest.mark.integration

ACTOR = "operator"
LEASE = 60


@pytest.fixture
def queues(engine: Engine) -> QueueStore:
    return QueueStore(engine)


def names(queues: QueueStore) -> list[str]:
    return [each.name for each in queues.list()]


def stranded(engine: Engine) -> list[str]:
    """Jobs that have not ended and whose queue is gone."""
    there = select(queues_table.c.name)
    with read(engine) as connection:
        lost = select(jobs.c.id).where(jobs.c.finished_at.is_(None), jobs.c.queue.not_in(there))
        return list(connection.execute(lost).scalars())


def finished(work: Future[Any], within: float = 20) -> BaseException | None:
    return work.exception(timeout=within)


def waits(work: Future[Any]) -> bool:
    try:
        work.exception(timeout=0.3)
    except NotYet:
        return True
    return False


def test_a_queue_is_made_changed_and_deleted_and_the_audit_log_says_so(queues: QueueStore, engine: Engine) -> None:
    assert queues.put("express", max_running=2, actor=ACTOR)
    assert not queues.put("express", max_running=2, actor=ACTOR)  # nothing changes, nothing is noted
    assert not queues.put("express", max_running=None, actor=ACTOR)
    assert queues.get("express").max_running is None
    assert names(queues) == ["default", "express"]
    queues.delete("express", actor=ACTOR)
    assert names(queues) == ["default"]
    noted = [(entry.action, entry.target, entry.actor, entry.data) for entry in audit.entries(engine)]
    assert noted == [
        ("queue.deleted", "express", ACTOR, {}),
        ("queue.changed", "express", ACTOR, {"max_running": None}),
        ("queue.created", "express", ACTOR, {"max_running": 2}),
    ]


def test_a_change_of_the_bound_leaves_a_pause_alone(queues: QueueStore) -> None:
    queues.pause("default", actor=ACTOR)
    queues.put("default", max_running=3, actor=ACTOR)
    queue = queues.get("default")
    assert (queue.paused, queue.max_running) == (True, 3)


def test_what_is_only_to_be_made_or_only_to_be_changed_is_not_mistaken_for_the_other(queues: QueueStore) -> None:
    with pytest.raises(QueueChanged, match="there is no queue express"):
        queues.put("express", max_running=1, actor=ACTOR, exists=True)
    queues.put("express", max_running=1, actor=ACTOR, exists=False)
    with pytest.raises(QueueChanged, match="there is a queue express already"):
        queues.put("express", max_running=None, actor=ACTOR, exists=False)
    assert queues.get("express").max_running == 1


def test_there_are_only_so_many_queues_and_those_that_are_there_can_be_changed(queues: QueueStore) -> None:
    for number in range(MAX_QUEUES - 1):
        queues.put(f"q{number}", max_running=None, actor=ACTOR)
    with pytest.raises(QuotaExceeded, match=f"at most {MAX_QUEUES} queues"):
        queues.put("more", max_running=None, actor=ACTOR)
    assert not queues.put("q0", max_running=1, actor=ACTOR)
    queues.delete("q1", actor=ACTOR)
    assert queues.put("more", max_running=None, actor=ACTOR)


def test_requests_at_once_make_one_queue_and_no_more_than_there_may_be(queues: QueueStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: queues.put("same", max_running=1, actor=ACTOR), range(8)))
        assert sum(made) == 1
        tries = [pool.submit(queues.put, f"q{n}", max_running=None, actor=ACTOR) for n in range(MAX_QUEUES + 5)]
        refused = [each for each in tries if finished(each) is not None]
    assert {type(each.exception()) for each in refused} == {QuotaExceeded}
    assert (len(names(queues)), len(refused)) == (MAX_QUEUES, 7)


def test_a_queue_with_jobs_that_have_not_ended_stays(
    desk: Any, store: JobStore, queues: QueueStore, clock: Any
) -> None:
    queues.put("express", max_running=None, actor=ACTOR)
    waiting = desk.add("waiting", queue="express")
    later = desk.add("later", queue="express", run_at=clock.now + 1_000_000)
    blocked = desk.add("blocked", queue="express", depends_on=[waiting.id])
    with pytest.raises(QueueConflict, match="3 jobs that have not ended"):
        queues.delete("express", actor=ACTOR)
    for job in (blocked, later):
        store.cancel(job.id, tenant_id=None, actor=ACTOR)
    taken = desk.claim()
    with pytest.raises(QueueConflict, match="1 job that has not ended"):
        queues.delete("express", actor=ACTOR)
    store.complete(taken, {})
    queues.delete("express", actor=ACTOR)
    assert store.get(waiting.id).queue == "express"


def test_the_default_queue_stays_and_one_that_is_not_there_is_not_found(queues: QueueStore) -> None:
    with pytest.raises(QueueConflict):
        queues.delete("default", actor=ACTOR)
    with pytest.raises(QueueNotFound):
        queues.delete("express", actor=ACTOR)
    assert names(queues) == ["default"]


def test_a_job_cannot_wait_again_in_a_queue_that_is_gone(desk: Any, store: JobStore, queues: QueueStore) -> None:
    queues.put("express", max_running=None, actor=ACTOR)
    job = desk.add(queue="express")
    store.cancel(job.id, tenant_id=None, actor=ACTOR)
    queues.delete("express", actor=ACTOR)
    with pytest.raises(QueueNotFound, match=f"{job.id} was in the queue express, which is deleted"):
        store.retry(job.id, tenant_id=None, actor=ACTOR)
    assert store.get(job.id).state is JobState.CANCELLED
    queues.put("express", max_running=None, actor=ACTOR)
    store.retry(job.id, tenant_id=None, actor=ACTOR)
    assert desk.claim().job.id == job.id


def test_a_batch_whose_queue_is_gone_is_not_tried_again_in_part(
    desk: Any, store: JobStore, queues: QueueStore, engine: Engine
) -> None:
    zoo = BatchStore(engine, store)
    queues.put("express", max_running=None, actor=ACTOR)
    batch = zoo.add("default", "zoo", {})
    items = [
        NewItem(model_name="m", recipe_name=queue, job=desk.new_job(queue, queue=queue))
        for queue in ("default", "express")
    ]
    made = zoo.add_items(batch, items, actor=ACTOR)
    zoo.cancel(batch.id, tenant_id="default", actor=ACTOR)
    queues.delete("express", actor=ACTOR)
    with pytest.raises(QueueNotFound):
        zoo.retry_failed(batch.id, tenant_id="default", actor=ACTOR)
    assert {store.get(job.id).state for job in made if job is not None} == {JobState.CANCELLED}
    assert zoo.get(batch.id, "default").cancelled_at is not None


def _submit(store: JobStore, new: Any) -> Callable[[], object]:
    return lambda: store.enqueue(new, actor=ACTOR)


def test_a_queue_is_not_deleted_under_a_job_that_is_being_submitted(
    desk: Any, engine: Engine, queues: QueueStore
) -> None:
    store = JobStore(engine)
    queues.put("express", max_running=None, actor=ACTOR)
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine):
            store.enqueue(desk.new_job(queue="express"), actor=ACTOR)
            deletion = pool.submit(queues.delete, "express", actor=ACTOR)
            assert waits(deletion)
        assert isinstance(finished(deletion), QueueConflict)
    assert (names(queues), stranded(engine)) == (["default", "express"], [])


@pytest.mark.parametrize("again", [False, True], ids=["submitted", "retried"])
def test_a_job_that_comes_while_its_queue_is_being_deleted_is_refused(
    desk: Any, engine: Engine, queues: QueueStore, again: bool
) -> None:
    store = JobStore(engine)
    queues.put("express", max_running=None, actor=ACTOR)
    work: Callable[[], object] = _submit(store, desk.new_job(queue="express"))
    if again:
        job, _ = store.enqueue(desk.new_job(queue="express"), actor=ACTOR)
        store.cancel(job.id, tenant_id=None, actor=ACTOR)
        work = lambda: store.retry(job.id, tenant_id=None, actor=ACTOR)  # noqa: E731
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine):
            queues.delete("express", actor=ACTOR)
            coming = pool.submit(work)
            assert waits(coming)
        assert isinstance(finished(coming), QueueNotFound)
    assert stranded(engine) == []


def test_no_job_is_left_without_its_queue_however_often_that_is_made_and_deleted(
    desk: Any, engine: Engine, queues: QueueStore
) -> None:
    store = JobStore(engine)

    def operate(_: int) -> None:
        for _ in range(15):
            queues.put("express", max_running=None, actor=ACTOR)
            try:
                queues.delete("express", actor=ACTOR)
            except (QueueConflict, QueueNotFound):
                continue

    def use(worker: int) -> int:
        refused = 0
        for number in range(25):
            try:
                job, _ = store.enqueue(desk.new_job(f"{worker} {number}", queue="express"), actor=ACTOR)
            except QueueNotFound:
                refused += 1
                continue
            assert stranded(engine) == []
            store.cancel(job.id, tenant_id=None, actor=ACTOR)
        return refused

    with ThreadPoolExecutor(6) as pool:
        operators = [pool.submit(operate, n) for n in range(2)]
        users = [pool.submit(use, n) for n in range(4)]
        assert {finished(each, 60) for each in (*operators, *users)} == {None}
    assert stranded(engine) == []
    assert sum(store.counts().values()) == 100 - sum(each.result() for each in users)


def test_a_pause_and_claims_do_not_wait_for_a_job_that_is_being_submitted(
    desk: Any, migrated_postgres_url: str
) -> None:
    # Not on SQLite, where all writers take turns.
    engine = make_engine(migrated_postgres_url)
    try:
        store, queues = JobStore(engine), QueueStore(engine)
        store.enqueue(desk.new_job("first"), actor=ACTOR)
        with ThreadPoolExecutor(1) as pool, transaction(engine):
            store.enqueue(desk.new_job("second"), actor=ACTOR)
            queue_work = [
                pool.submit(queues.put, "default", max_running=1, actor=ACTOR),
                pool.submit(store.claim, "worker", lease_seconds=LEASE),
                pool.submit(queues.pause, "default", actor=ACTOR),
            ]
            assert [finished(each, 5) for each in queue_work] == [None] * 3
            claim = queue_work[1].result()
            assert claim is not None
            assert claim.job.fingerprint == "first"
    finally:
        engine.dispose()


def test_claims_at_once_take_no_more_slots_of_a_queue_than_it_has(
    desk: Any, engine: Engine, queues: QueueStore, clock: Any
) -> None:
    store = JobStore(engine, clock)
    queues.put("express", max_running=3, actor=ACTOR)
    for number in range(8):
        desk.add(f"now {number}", queue="express")
        desk.add(f"due {number}", queue="express", run_at=clock.now + 1000)
    clock.advance(2)
    for _ in range(3):
        with ThreadPoolExecutor(6) as pool:
            tries = pool.map(lambda n: store.claim(f"worker {n}", lease_seconds=LEASE), range(12))
            taken = [each for each in tries if each is not None]
        assert len(taken) == 3
        for each in taken:
            store.complete(each, {})


def test_a_bound_that_is_lowered_stops_nothing_and_starts_nothing_until_there_is_room(
    desk: Any, store: JobStore, queues: QueueStore
) -> None:
    for name in ("a", "b", "c"):
        desk.add(name)
    first, second = desk.claim(), desk.claim()
    queues.put("default", max_running=1, actor=ACTOR)
    assert store.heartbeat(first, lease_seconds=LEASE) is None
    store.complete(first, {})
    assert store.claim("worker", lease_seconds=LEASE) is None
    store.complete(second, {})
    assert desk.claim().job.fingerprint == "c"
    queues.put("default", max_running=None, actor=ACTOR)


@pytest.mark.parametrize("state", ["queued", "scheduled", "blocked"])
def test_work_that_waits_in_a_paused_queue_moves_to_an_open_one_that_asks_for_it(
    desk: Any, store: JobStore, queues: QueueStore, clock: Any, state: str
) -> None:
    queues.put("slow", max_running=None, actor=ACTOR)
    first = desk.add("first")
    when: dict[str, Any] = {
        "queued": {},
        "scheduled": {"run_at": clock.now + 5000},
        "blocked": {"depends_on": [first.id]},
    }[state]
    job = desk.add("work", queue="slow", **when)
    queues.pause("slow", actor=ACTOR)
    joined, created = store.enqueue(desk.new_job("work", **when), actor="hasty")
    assert (joined.id, created, joined.queue, joined.state) == (job.id, False, "default", state)
    event = store.events(job.id)[-1]
    assert (event.type, event.actor, event.data) == ("changed", "hasty", {"changes": {"queue": "default"}})
    store.complete(desk.claim(), {})
    clock.advance(10)
    assert desk.claim().job.id == job.id
    queues.delete("slow", actor=ACTOR)  # nothing is left in it


@pytest.mark.parametrize("paused", [(), ("express",), ("default", "express")], ids=["none", "the other", "both"])
def test_work_stays_where_it_waits_when_that_is_open_or_the_other_queue_is_paused_too(
    desk: Any, store: JobStore, queues: QueueStore, paused: tuple[str, ...]
) -> None:
    queues.put("express", max_running=None, actor=ACTOR)
    job = desk.add()
    for name in paused:
        queues.pause(name, actor=ACTOR)
    assert store.enqueue(desk.new_job(queue="express"), actor="hasty") == (job, False)
    assert desk.event_types(job) == ["enqueued"]


@pytest.fixture
def full(desk: Any, queues: QueueStore) -> str:
    """A queue whose one slot is taken, beside the default queue, which has no bound."""
    queues.put("full", max_running=1, actor=ACTOR)
    desk.add("running", queue="full")
    desk.claim()
    return "full"


@pytest.mark.parametrize("becomes", ["due", "unblocked"])
def test_work_that_waits_in_a_full_queue_moves_to_one_without_a_bound_that_asks_for_it(
    desk: Any, store: JobStore, clock: Any, full: str, becomes: str
) -> None:
    for number in range(3):
        desk.add(f"ahead {number}", queue=full)
    if becomes == "unblocked":
        job = desk.add("work", queue=full, depends_on=[store.list("default")[0].id])
    else:
        job = desk.add("work", queue=full, run_at=clock.now + 5000)
    joined, created = store.enqueue(desk.new_job("work"), actor="hasty")
    assert (joined.id, created, joined.queue, joined.state) == (job.id, False, "default", "queued")
    event = store.events(job.id)[-1]
    assert (event.type, event.actor, event.data["changes"]["queue"]) == ("changed", "hasty", "default")
    assert desk.claim().job.id == job.id
    assert store.claim("worker", lease_seconds=LEASE) is None


def test_work_for_which_a_queue_has_too_few_slots_left_counts_as_in_a_full_one(
    desk: Any, store: JobStore, queues: QueueStore, full: str
) -> None:
    queues.put(full, max_running=2, actor=ACTOR)
    wide = desk.add("wide", queue=full, gpus=2)
    narrow = desk.add("narrow", queue=full)
    assert store.enqueue(desk.new_job("wide", gpus=2), actor="hasty")[0].queue == "default"
    assert store.enqueue(desk.new_job("narrow"), actor="hasty")[0].queue == full
    assert {desk.claim().job.id, desk.claim().job.id} == {wide.id, narrow.id}


@pytest.mark.parametrize("why", ["is bounded", "is paused", "later", "blocked", "not full"])
def test_work_stays_in_a_full_queue_where_it_would_not_surely_start_sooner_elsewhere(
    desk: Any, store: JobStore, queues: QueueStore, clock: Any, full: str, why: str
) -> None:
    queues.put("express", max_running=3 if why == "is bounded" else None, actor=ACTOR)
    if why == "is paused":
        queues.pause("express", actor=ACTOR)
    if why == "not full":
        queues.put(full, max_running=2, actor=ACTOR)
    when: dict[str, Any] = {
        "later": {"run_at": clock.now + 5000},
        "blocked": {"depends_on": [store.list("default")[0].id]},
    }.get(why, {})
    job = desk.add("work", queue=full, **when)
    assert store.enqueue(desk.new_job("work", queue="express", **when), actor="hasty") == (job, False)


def test_work_that_runs_stays_in_its_queue_and_takes_its_slot(desk: Any, store: JobStore, queues: QueueStore) -> None:
    queues.put("slow", max_running=1, actor=ACTOR)
    desk.add(queue="slow")
    running = desk.claim().job
    queues.pause("slow", actor=ACTOR)
    assert store.enqueue(desk.new_job(), actor="hasty") == (running, False)
    with pytest.raises(JobConflict, match="is running"):
        store.change(running.id, {"queue": "default"}, tenant_id="default", actor="hasty")


def test_a_waiting_job_is_put_into_another_queue(desk: Any, store: JobStore, queues: QueueStore) -> None:
    queues.put("full", max_running=1, actor=ACTOR)
    desk.add("first", queue="full")
    job = desk.add("second", queue="full")
    desk.claim()
    assert store.claim("worker", lease_seconds=LEASE) is None
    with pytest.raises(QueueNotFound):
        store.change(job.id, {"queue": "nowhere"}, tenant_id="default", actor="alice")
    assert store.get(job.id) == job
    moved = store.change(job.id, {"queue": "default"}, tenant_id="default", actor="alice", version=job.version)
    assert (moved.queue, moved.version, moved.run_at) == ("default", job.version + 1, job.run_at)
    assert store.events(job.id)[-1].data == {"changes": {"queue": "default"}}
    assert desk.claim().job.id == job.id


@pytest.mark.parametrize("how", ["changed", "joined"])
def test_a_job_does_not_move_into_a_queue_that_is_being_deleted(
    desk: Any, engine: Engine, queues: QueueStore, how: str
) -> None:
    store = JobStore(engine)
    queues.put("slow", max_running=None, actor=ACTOR)
    queues.put("express", max_running=None, actor=ACTOR)
    job, _ = store.enqueue(desk.new_job(queue="slow"), actor=ACTOR)
    queues.pause("slow", actor=ACTOR)
    work: Callable[[], object] = _submit(store, desk.new_job(queue="express"))
    if how == "changed":
        work = lambda: store.change(job.id, {"queue": "express"}, tenant_id=None, actor=ACTOR)  # noqa: E731
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine):
            queues.delete("express", actor=ACTOR)
            moving = pool.submit(work)
            assert waits(moving)
        assert isinstance(finished(moving), QueueNotFound)
    assert store.get(job.id).queue == "slow"
    with ThreadPoolExecutor(1) as pool:
        queues.put("express", max_running=None, actor=ACTOR)
        with transaction(engine):
            work()
            deletion = pool.submit(queues.delete, "express", actor=ACTOR)
            assert waits(deletion)
        assert isinstance(finished(deletion), QueueConflict)
    assert (store.get(job.id).queue, stranded(engine)) == ("express", [])


def test_a_job_that_is_claimed_while_it_moves_is_claimed_once(desk: Any, engine: Engine, queues: QueueStore) -> None:
    store = JobStore(engine)
    queues.put("express", max_running=None, actor=ACTOR)
    made = [store.enqueue(desk.new_job(str(n)), actor=ACTOR)[0] for n in range(20)]

    def move(job: Any) -> bool:
        try:
            store.change(job.id, {"queue": "express"}, tenant_id=None, actor=ACTOR)
        except JobConflict:
            return False
        return True

    def claim(worker: int) -> list[tuple[str, str]]:
        found = []
        while (claimed := store.claim(f"worker {worker}", lease_seconds=LEASE)) is not None:
            found.append((claimed.job.id, claimed.job.queue))
        return found

    with ThreadPoolExecutor(4) as pool:
        claims = [pool.submit(claim, n) for n in range(2)]
        moves = [pool.submit(move, job) for job in made]
        moved = {job.id for job, each in zip(made, moves, strict=True) if each.result(60)}
        taken = [pair for each in claims for pair in each.result(60)]
    taken += claim(9)
    assert sorted(job_id for job_id, _ in taken) == sorted(job.id for job in made)
    assert {job_id for job_id, queue in taken if queue == "express"} == moved


def test_metrics_name_every_queue_also_the_empty_ones(desk: Any, engine: Engine, queues: QueueStore) -> None:
    queues.put("express", max_running=None, actor=ACTOR)
    desk.add()
    (depth,) = (each for each in QueueMetrics(engine).collect() if each.name == "duquant_queue_depth")
    assert {sample.labels["queue"]: sample.value for sample in depth.samples} == {"default": 1, "express": 0}
