"""Answers kept by key: once, for a day, and never for another request."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import Engine, event

from infra.database import make_engine, transaction
from infra.errors import IdempotencyMismatch, InfraError
from infra.idempotency import Answer, IdempotencyStore, KeyedRequest
from infra.jobs import JobStore, NewJob

DAY_MS = 24 * 3_600_000
ANSWER = Answer(status=201, headers={"Location": "/v1/jobs/job_1"}, body='{"id": "job_1"}')
REQUEST = KeyedRequest("default", "k", "POST /v1/jobs", "a" * 64)


class Clock:
    now = 1_700_000_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(engine: Engine, clock: Clock) -> IdempotencyStore:
    return IdempotencyStore(engine, lifetime_ms=DAY_MS, clock=clock)


@pytest.fixture
def work(engine: Engine, keys: IdempotencyStore) -> Callable[..., Answer | None]:
    def call(request: KeyedRequest = REQUEST) -> Answer | None:
        """Work on a request; return the answer that was there before, if one was."""
        with transaction(engine):
            known = keys.take(request)
            if known is None:
                keys.keep(request, ANSWER)
            return known

    return call


def test_the_first_request_works_and_later_ones_get_its_answer(keys: IdempotencyStore, work: Callable) -> None:
    assert keys.find(REQUEST) is None
    assert work() is None
    assert work() == ANSWER
    assert work() == keys.find(REQUEST) == ANSWER


@pytest.mark.parametrize("change", [{"body_hash": "b" * 64}, {"route": "POST /v1/batches"}])
def test_a_key_is_not_for_another_request(keys: IdempotencyStore, work: Callable, change: dict[str, str]) -> None:
    work()
    for use in (work, keys.find):
        with pytest.raises(IdempotencyMismatch):
            use(replace(REQUEST, **change))


def test_a_request_that_was_refused_leaves_its_key_free(engine: Engine, keys: IdempotencyStore, work: Callable) -> None:
    def refuse() -> None:
        with transaction(engine):
            keys.take(REQUEST)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        refuse()
    assert keys.find(REQUEST) is None
    assert work(replace(REQUEST, body_hash="b" * 64)) is None


def test_answers_are_forgotten_after_their_lifetime(keys: IdempotencyStore, work: Callable, clock: Clock) -> None:
    work(replace(REQUEST, key="old"))
    clock.now += DAY_MS // 2
    work(replace(REQUEST, key="young"))
    clock.now += DAY_MS // 2 + 1
    again = replace(REQUEST, key="old", body_hash="b" * 64)
    assert keys.find(again) is None  # also before anybody has cleaned up
    assert work(again) is None
    assert keys.purge() == 0
    clock.now += DAY_MS // 2
    assert keys.purge() == 1
    assert work(replace(REQUEST, key="young")) is None


@pytest.mark.integration
def test_an_answer_that_is_over_gives_way_to_one_of_two(migrated_postgres_url: str, clock: Clock) -> None:
    engine, other = make_engine(migrated_postgres_url), make_engine(migrated_postgres_url)
    fresh = replace(ANSWER, body='{"id": "job_2"}')

    def work(on: Engine, answer: Answer) -> Answer | None:
        keys = IdempotencyStore(on, lifetime_ms=DAY_MS, clock=clock)
        with transaction(on):
            known = keys.take(REQUEST)
            if known is None:
                keys.keep(REQUEST, answer)
            return known

    assert work(engine, ANSWER) is None
    clock.now += DAY_MS + 1
    overtaken: list[Answer | None] = []

    def overtake(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        """Do the whole of the other request between the first one's look at the old row and its deletion."""
        if statement.startswith("DELETE FROM idempotency_keys") and not overtaken:
            with ThreadPoolExecutor(1) as pool:  # a thread of its own is in no transaction
                overtaken.append(pool.submit(work, other, fresh).result())

    event.listen(engine, "before_cursor_execute", overtake)
    assert work(engine, ANSWER) == fresh
    assert overtaken == [None]
    engine.dispose()
    other.dispose()


def test_of_many_requests_at_once_one_works_and_the_others_get_its_answer(work: Callable) -> None:
    start = threading.Barrier(8)

    def call() -> Answer | None:
        start.wait()
        return work()

    with ThreadPoolExecutor(8) as pool:
        outcomes = [each.result() for each in [pool.submit(call) for _ in range(8)]]
    assert sorted(outcome is None for outcome in outcomes) == [False] * 7 + [True]
    assert outcomes.count(ANSWER) == 7


def _job(fingerprint: str = "f" * 64) -> NewJob:
    return NewJob(tenant_id="default", kind="quantize", spec={"model": "m"}, fingerprint=fingerprint)


def test_work_and_answer_are_kept_together_or_not_at_all(engine: Engine, keys: IdempotencyStore) -> None:
    jobs = JobStore(engine)

    def work() -> None:
        with transaction(engine):
            keys.take(REQUEST)
            jobs.enqueue(_job(), actor="test")
            keys.keep(REQUEST, ANSWER)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert jobs.list("default") == []
    assert keys.find(REQUEST) is None


def test_inside_a_transaction_a_store_may_fail_and_go_on(engine: Engine) -> None:
    jobs = JobStore(engine)
    with transaction(engine):
        first, _ = jobs.enqueue(_job(), actor="test")
        with pytest.raises(InfraError):
            jobs.enqueue(NewJob(tenant_id="nobody", kind="quantize", spec={}, fingerprint="a" * 64), actor="test")
        assert jobs.get(first.id).id == first.id  # a read sees what the transaction did
    assert [job.id for job in jobs.list("default")] == [first.id]
