"""Adding, looking and claiming, on SQLite and on PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, insert
from sqlalchemy.exc import StatementError

from infra.database import transaction, write
from infra.errors import DependencyNotFound, InfraError, JobConflict, JobNotFound, QueueNotFound
from infra.job_model import MAX_LABELS
from infra.job_reads import FARTHEST_PLACE
from infra.jobs import JobState, JobStore
from infra.schema import tenants

LEASE = 60


def test_a_new_job_is_queued_with_one_event(desk, store: JobStore) -> None:
    job = desk.add()
    assert (job.state, job.attempt, job.fence, job.version) == (JobState.QUEUED, 0, 0, 1)
    assert store.get(job.id) == job
    (event,) = store.events(job.id)
    assert (event.type, event.actor, event.data["to"]) == ("enqueued", "tester", "queued")


def test_the_same_work_is_one_job_while_it_is_active(desk, store: JobStore) -> None:
    first = desk.add()
    again, created = store.enqueue(desk.new_job(), actor="other")
    assert not created
    assert again.id == first.id


def test_a_waiting_job_serves_the_more_impatient_of_two_requests(desk, store: JobStore, clock) -> None:
    hour = 3_600_000
    other = desk.add("other")
    calm = desk.add(
        run_at=clock.now + 72 * hour,
        deadline_at=clock.now + 80 * hour,
        priority=900,
        labels={"team": "a"},
        depends_on=[other.id],
    )
    assert calm.state is JobState.BLOCKED
    hasty, created = store.enqueue(desk.new_job(priority=1, labels={"team": "b", "run": "2"}), actor="hasty")
    assert (hasty.id, created, hasty.state) == (calm.id, False, JobState.QUEUED)
    assert (hasty.priority, hasty.run_at, hasty.deadline_at) == (1, clock.now, None)
    assert hasty.labels == {"team": "a", "run": "2"}
    event = store.events(calm.id)[-1]
    assert (event.type, event.actor, event.data["depends_on"]) == ("changed", "hasty", [])
    # The other way round nothing changes.
    again, _ = store.enqueue(desk.new_job(priority=900, run_at=clock.now + hour), actor="calm")
    assert again == hasty


def test_a_job_has_only_so_many_labels_however_many_requests_it_serves(desk, store: JobStore) -> None:
    desk.add(labels={f"first-{number}": "x" for number in range(15)})
    for request in range(3):
        labels = {f"more-{request}-{number}": "x" for number in range(10)}
        job, _ = store.enqueue(desk.new_job(labels=labels), actor="other")
    assert len(job.labels) == MAX_LABELS
    assert {f"first-{number}" for number in range(15)} < job.labels.keys()


def test_a_running_job_outlives_its_deadline_for_somebody_else(desk, store: JobStore, clock) -> None:
    desk.add(deadline_at=clock.now + 1000)
    running = desk.claim().job
    later, _ = store.enqueue(desk.new_job(deadline_at=clock.now + 5000, priority=1), actor="other")
    assert (later.deadline_at, later.priority) == (clock.now + 5000, running.priority)


def test_work_that_is_being_cancelled_is_not_promised(desk, store: JobStore) -> None:
    job = desk.add()
    taken = desk.claim()
    store.cancel(job.id, tenant_id="default", actor="tester")
    with pytest.raises(JobConflict, match="being cancelled"):
        store.enqueue(desk.new_job(), actor="other")
    store.finish_cancel(taken)
    assert desk.add().id != job.id


def test_a_request_that_names_what_is_not_there_is_refused_also_for_finished_work(desk, store: JobStore) -> None:
    desk.add()
    store.complete(desk.claim(), {})
    with pytest.raises(QueueNotFound):
        store.enqueue(desk.new_job(queue="nope"), actor="other")
    with pytest.raises(DependencyNotFound):
        store.enqueue(desk.new_job(depends_on=["job_nope"]), actor="other")


def test_a_finished_job_is_returned_for_the_same_work(desk, store: JobStore) -> None:
    first = desk.add()
    store.complete(desk.claim(), {"artifact": "a"})
    again, created = store.enqueue(desk.new_job(), actor="other")
    assert (again.id, again.state, created) == (first.id, JobState.SUCCEEDED, False)


def test_force_makes_a_new_job_beside_the_same_work(desk, store: JobStore) -> None:
    first = desk.add()
    forced, created = store.enqueue(desk.new_job(), force=True, actor="tester")
    assert created
    assert forced.id != first.id
    twice, created = store.enqueue(desk.new_job(), force=True, actor="tester")
    assert created
    assert twice.id not in {first.id, forced.id}


def test_failed_and_cancelled_work_is_done_again(desk, store: JobStore) -> None:
    first = desk.add()
    store.fail(desk.claim(), "bad_input", "no such tensor")
    second = desk.add()
    store.cancel(second.id, tenant_id="default", actor="tester")
    third = desk.add()
    assert len({first.id, second.id, third.id}) == 3


def test_other_tenants_and_fingerprints_are_other_work(desk, store: JobStore, engine: Engine) -> None:
    with write(engine) as connection:
        connection.execute(insert(tenants).values(id="other", name="Other", created_at=0))
    mine = desk.add()
    theirs, created = store.enqueue(desk.new_job(tenant_id="other"), actor="tester")
    assert created
    assert desk.add("g").id not in {mine.id, theirs.id}


def test_enqueueing_for_an_unknown_tenant_is_refused(desk, store: JobStore) -> None:
    with pytest.raises(InfraError, match="no project nobody"):
        store.enqueue(desk.new_job(tenant_id="nobody"), actor="tester")


def test_concurrent_enqueues_of_the_same_work_make_one_job(desk, engine: Engine) -> None:
    store = JobStore(engine)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: store.enqueue(desk.new_job(), actor="tester"), range(16)))
    assert len({job.id for job, _ in results}) == 1
    assert sum(created for _, created in results) == 1


def test_numbers_that_json_does_not_know_are_refused_on_both_databases(desk, store: JobStore) -> None:
    with pytest.raises((StatementError, ValueError), match="not JSON compliant"):
        desk.add(spec={"value": float("nan")})
    assert store.counts()[JobState.QUEUED] == 0


def test_another_tenants_job_is_not_found(desk, store: JobStore) -> None:
    job = desk.add()
    with pytest.raises(JobNotFound):
        store.get(job.id, "other")
    with pytest.raises(JobNotFound):
        store.cancel(job.id, tenant_id="other", actor="thief")
    with pytest.raises(JobNotFound):
        store.get("job_missing")
    assert store.list("other") == []
    assert store.get(job.id, "default") == job


def test_listing_pages_through_all_jobs_newest_first(desk, store: JobStore, clock) -> None:
    added = []
    for number in range(7):
        added.append(desk.add(str(number)).id)
        clock.advance(number % 2)  # some share a millisecond
    seen: list[str] = []
    before: tuple[int, str] | None = None
    while page := store.list("default", limit=3, before=before):
        seen += [job.id for job in page]
        before = (page[-1].created_at, page[-1].id)
    assert seen == sorted(added, reverse=True)


def test_listing_filters_by_state_and_counts_add_up(desk, store: JobStore) -> None:
    desk.add("a")
    desk.add("b")
    desk.claim()
    assert [job.fingerprint for job in store.list("default", state=JobState.RUNNING)] == ["a"]
    counts = store.counts("default")
    assert (counts[JobState.QUEUED], counts[JobState.RUNNING], sum(counts.values())) == (1, 1, 2)
    assert sum(store.counts("other").values()) == 0


def test_queue_position_counts_what_is_claimed_first(desk, store: JobStore) -> None:
    first, second, urgent = desk.add("a"), desk.add("b"), desk.add("c", priority=1)
    assert [store.queue_position(job) for job in (urgent, first, second)] == [0, 1, 2]
    assert store.queue_position(store.get(desk.claim().job.id)) is None


def test_a_queue_position_is_counted_so_far_and_no_farther(desk, store: JobStore, engine: Engine) -> None:
    with transaction(engine):
        jobs = [desk.add(str(number)) for number in range(FARTHEST_PLACE + 2)]
    places = [store.queue_position(job) for job in (jobs[0], jobs[1], *jobs[-4:])]
    assert places == [0, 1, *[FARTHEST_PLACE - 2, *[FARTHEST_PLACE - 1] * 3]]


def test_jobs_are_claimed_by_priority_then_age(desk, store: JobStore, clock) -> None:
    names = []
    for name, priority in (("a", 100), ("b", 50), ("c", 100), ("d", 50)):
        desk.add(name, priority=priority)
        clock.advance(1)
    while (taken := store.claim("worker", lease_seconds=LEASE)) is not None:
        names.append(taken.job.fingerprint)
    assert names == ["b", "d", "a", "c"]


def test_a_claim_takes_the_lease_and_raises_the_fence(desk, store: JobStore, clock) -> None:
    desk.add()
    taken = desk.claim("w1")
    job = taken.job
    assert (job.state, job.attempt, job.fence, taken.fence) == (JobState.RUNNING, 1, 1, 1)
    assert (job.lease_owner, job.lease_until) == ("w1", clock.now + LEASE * 1000)
    assert job.started_at == clock.now
    assert desk.event_types(job) == ["enqueued", "claimed"]


def test_only_jobs_of_the_wanted_kinds_are_claimed(desk, store: JobStore) -> None:
    desk.add(kind="evaluate")
    assert store.claim("worker", lease_seconds=LEASE, kinds=("quantize",)) is None
    assert store.claim("worker", lease_seconds=LEASE, kinds=("evaluate",)) is not None


def test_an_empty_queue_gives_nothing(store: JobStore) -> None:
    assert store.claim("worker", lease_seconds=LEASE) is None
