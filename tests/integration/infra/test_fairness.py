"""Who is served next: tenants by weight, a tenant's jobs by priority and age, nobody while paused or at a limit."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import Engine, insert, select, update

from infra.database import make_engine, read, transaction, write
from infra.errors import QuotaExceeded, TenantNotFound
from infra.job_quotas import holding
from infra.jobs import JobState, JobStore, NewJob
from infra.schema import artifacts, jobs, queues, tenants

LEASE = 60


@pytest.fixture
def set_tenant(engine: Engine):
    """Make a tenant, or change one."""

    def change(tenant_id: str, **values: object) -> None:
        with write(engine) as connection:
            if connection.execute(update(tenants).where(tenants.c.id == tenant_id).values(id=tenant_id)).rowcount == 0:
                connection.execute(insert(tenants).values(id=tenant_id, name=tenant_id, created_at=0))
            if values:
                connection.execute(update(tenants).where(tenants.c.id == tenant_id).values(**values))

    return change


def served(store: JobStore, times: int) -> list[str]:
    """Claim and finish; return whose jobs they were."""
    found = []
    for _ in range(times):
        taken = store.claim("worker", lease_seconds=LEASE)
        assert taken is not None
        store.complete(taken, {})
        found.append(taken.job.tenant_id)
    return found


def test_tenants_of_equal_weight_take_turns(desk, store: JobStore, set_tenant) -> None:
    set_tenant("other")
    for number in range(6):
        desk.add(f"mine {number}")
    for number in range(3):
        desk.add(f"theirs {number}", tenant_id="other")
    # The first by age, then in turns although all of mine are older.
    assert served(store, 6) == ["default", "other"] * 3


def test_weights_are_shares(desk, store: JobStore, set_tenant) -> None:
    set_tenant("double", weight=2.0)
    set_tenant("half", weight=0.5)
    for tenant in ("default", "double", "half"):
        for number in range(24):
            desk.add(f"{tenant} {number}", tenant_id=tenant)
    shares = Counter(served(store, 28))
    assert shares == {"double": 16, "default": 8, "half": 4}


def test_gpu_time_counts_not_only_jobs(desk, store: JobStore, set_tenant, clock) -> None:
    set_tenant("other")
    for number in range(4):
        desk.add(f"mine {number}")
        desk.add(f"theirs {number}", tenant_id="other")
    taken = desk.claim()
    assert taken.job.tenant_id == "default"
    store.plan(taken, [0])
    row = store.start_layer(taken, 0, "node")
    store.commit_layer(taken, desk.finished_layer(row), device="cpu")  # 1.5 s
    store.complete(taken, {})
    # 1 s for the claim and 1.5 s for the layer: two claims of the other tenant, and the third starts later.
    assert served(store, 4) == ["other", "other", "other", "default"]


def test_a_tenant_that_was_away_gets_no_credit(desk, store: JobStore, set_tenant) -> None:
    set_tenant("other")
    for number in range(20):
        desk.add(f"mine {number}")
    served(store, 10)
    for number in range(10):
        desk.add(f"theirs {number}", tenant_id="other")
    assert Counter(served(store, 8)) == {"default": 4, "other": 4}


def test_a_job_of_worse_priority_overtakes_newer_ones_in_the_end(desk, store: JobStore, clock) -> None:
    patient = desk.add("patient", priority=100)
    clock.advance(49 * 60)
    desk.add("urgent", priority=50)
    clock.advance(2 * 60)
    desk.add("late and urgent", priority=50)
    names = [desk.claim().job.fingerprint for _ in range(3)]
    assert names == ["urgent", "patient", "late and urgent"]
    assert store.get(patient.id).state is JobState.RUNNING


@pytest.mark.parametrize("what", ["tenant", "queue"])
def test_what_is_paused_starts_nothing_and_loses_nothing(
    desk, store: JobStore, engine: Engine, set_tenant, what: str
) -> None:
    def set_paused(paused: int) -> None:
        with write(engine) as connection:
            connection.execute(update(tenants if what == "tenant" else queues).values(paused=paused))

    job = desk.add()
    running = desk.claim()
    desk.add("second")
    set_paused(1)
    assert store.claim("worker", lease_seconds=LEASE) is None
    assert store.heartbeat(running, lease_seconds=LEASE) is None
    assert store.complete(running, {}).id == job.id
    set_paused(0)
    assert desk.claim().job.fingerprint == "second"


def test_running_slots_of_a_tenant_are_bounded(desk, store: JobStore, set_tenant) -> None:
    set_tenant("default", max_running=3)
    set_tenant("other")
    for name, gpus in (("two", 2), ("big", 2), ("small", 1), ("last", 1)):
        desk.add(name, gpus=gpus)
    first = desk.claim()
    # Two slots do not fit beside two of three; one does, and nothing after it.
    assert desk.claim().job.fingerprint == "small"
    assert store.claim("worker", lease_seconds=LEASE) is None
    desk.add("theirs", tenant_id="other")
    assert desk.claim().job.fingerprint == "theirs"
    store.complete(first, {})
    assert desk.claim().job.fingerprint == "big"


def test_running_slots_of_a_queue_are_bounded_over_all_tenants(
    desk, store: JobStore, engine: Engine, set_tenant
) -> None:
    set_tenant("other")
    with write(engine) as connection:
        connection.execute(update(queues).values(max_running=2))
        connection.execute(insert(queues).values(name="spare"))
    for tenant in ("default", "other"):
        for number in range(2):
            desk.add(f"{tenant} {number}", tenant_id=tenant)
    assert {desk.claim().job.tenant_id for _ in range(2)} == {"default", "other"}
    assert store.claim("worker", lease_seconds=LEASE) is None
    desk.add("elsewhere", queue="spare")
    assert desk.claim().job.queue == "spare"


def test_a_tenant_may_have_so_many_waiting_jobs(desk, store: JobStore, set_tenant) -> None:
    set_tenant("default", max_queued=2)
    desk.add("a")
    desk.add("b", run_at=2**43)
    with pytest.raises(QuotaExceeded) as refused:
        desk.add("c")
    assert refused.value.facts == {"quota": "max_queued", "limit": 2, "used": 2, "is_final": False}
    assert "has 2, and this would add 1" in str(refused.value)
    # The same work again is no more work.
    assert not store.enqueue(desk.new_job("a"), actor="tester")[1]
    desk.claim()
    desk.add("c")


def test_of_many_requests_at_once_only_as_many_as_the_quota_allows_get_in(desk, store: JobStore, set_tenant) -> None:
    set_tenant("default", max_queued=3)

    def submit(number: int) -> bool:
        try:
            desk.add(f"job {number}")
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(submit, range(6))) == 3


@pytest.mark.integration
def test_a_request_with_a_quota_holds_up_no_claim_and_no_layer(migrated_postgres_url: str, desk_job: NewJob) -> None:
    engine = make_engine(migrated_postgres_url)
    store = JobStore(engine)
    with write(engine) as connection:
        connection.execute(update(tenants).values(max_queued=100))
    for number in range(2):
        store.enqueue(replace(desk_job, fingerprint=f"there {number}"), actor="tester")
    taken = store.claim("worker", lease_seconds=LEASE)
    assert taken is not None
    row = store.start_layer(taken, store.plan(taken, [0])[0].layer, "node")

    def work() -> None:
        # Both move the tenant's virtual time on.
        store.commit_layer(taken, replace(row, key="k", sha256="a" * 64, size_bytes=1, metrics={}, seconds=1.0))
        assert store.claim("other", lease_seconds=LEASE) is not None

    with ThreadPoolExecutor(1) as pool, transaction(engine):
        store.enqueue(replace(desk_job, fingerprint="new"), actor="tester")
        pool.submit(work).result(timeout=10)
    engine.dispose()


def test_a_tenant_may_have_so_many_bytes_of_artifacts(desk, store: JobStore, engine: Engine, set_tenant) -> None:
    set_tenant("default", max_bytes=100)
    desk.add("a")
    artifact = {"manifest_key": "k", "size_bytes": 100, "summary": {}}
    job = store.complete(desk.claim(), {"artifact": artifact})
    with pytest.raises(QuotaExceeded, match="bytes"):
        desk.add("b")
    with write(engine) as connection:
        connection.execute(update(artifacts).where(artifacts.c.job_id == job.id).values(deleted_at=1))
    desk.add("b")


def test_a_job_that_could_never_run_is_refused(desk, set_tenant) -> None:
    set_tenant("default", max_running=2)
    with pytest.raises(QuotaExceeded, match="this job alone needs 3"):
        desk.add(gpus=3)


def test_what_a_tenant_holds_is_counted(desk, store: JobStore, engine: Engine) -> None:
    desk.add("a", gpus=2)
    desk.add("b")
    desk.add("c")
    desk.claim()
    store.complete(desk.claim(), {"artifact": {"manifest_key": "k", "size_bytes": 7, "summary": {}}})
    with read(engine) as connection:
        now = holding(connection, "default")
        assert (now.queued, now.running, now.size_bytes) == (1, 2, 7)
        assert connection.execute(select(artifacts.c.fingerprint)).scalars().all() == ["b"]


def test_an_unknown_tenant_has_no_quota(desk, store: JobStore) -> None:
    with pytest.raises(TenantNotFound):
        store.enqueue(desk.new_job(tenant_id="nobody"), actor="tester")


def test_the_place_in_the_queue_counts_what_others_get_meanwhile(desk, store: JobStore, set_tenant) -> None:
    set_tenant("double", weight=2.0)
    mine = [desk.add(f"mine {number}") for number in range(3)]
    for number in range(10):
        desk.add(f"theirs {number}", tenant_id="double")
    # Before my third come my two others, and four of a tenant that has twice my share.
    assert [store.queue_position(job) for job in mine] == [0, 3, 6]


@pytest.mark.integration
def test_claims_side_by_side_take_different_jobs_and_none_waits(migrated_postgres_url: str) -> None:
    engine = make_engine(migrated_postgres_url)
    store = JobStore(engine)
    try:
        for number in range(2):
            new = NewJob(tenant_id="default", kind="quantize", spec={}, fingerprint=f"{number}")
            store.enqueue(new, actor="tester")
        waiting = store.list("default")
        with write(engine) as connection:
            # As a claim that has its job and has not committed.
            first = select(jobs.c.id).order_by(jobs.c.turn_at, jobs.c.id).limit(1).with_for_update(key_share=True)
            taken = connection.execute(first).scalar_one()
            other = store.claim("worker", lease_seconds=LEASE)
            assert other is not None
            assert {taken, other.job.id} == {job.id for job in waiting}
            assert store.claim("worker", lease_seconds=LEASE) is None
        assert store.claim("worker", lease_seconds=LEASE) is not None  # the other one gave it up
    finally:
        engine.dispose()
