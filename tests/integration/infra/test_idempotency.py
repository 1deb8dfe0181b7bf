"""Answers kept by key: once, for a day, and never for another request."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine

from infra.database import transaction
from infra.errors import IdempotencyInProgress, IdempotencyMismatch, InfraError
from infra.idempotency import Answer, IdempotencyStore, Ticket
from infra.jobs import JobStore, NewJob

DAY_MS = 24 * 3_600_000
ANSWER = Answer(status=201, headers={"Location": "/v1/jobs/job_1"}, body='{"id": "job_1"}')


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
def begin(keys: IdempotencyStore) -> Iterator[Callable[..., Ticket | Answer]]:
    def call(key: str = "k", route: str = "POST /v1/jobs", body_hash: str = "a" * 64) -> Ticket | Answer:
        return keys.begin("default", key, route=route, body_hash=body_hash)

    return call


def test_the_first_request_works_and_later_ones_get_its_answer(keys: IdempotencyStore, begin: Callable) -> None:
    ticket = begin()
    assert isinstance(ticket, Ticket)
    keys.finish(ticket, ANSWER)
    assert begin() == ANSWER
    assert begin() == ANSWER


def test_a_second_request_is_refused_while_the_first_is_worked_on(begin: Callable) -> None:
    begin()
    with pytest.raises(IdempotencyInProgress):
        begin()


@pytest.mark.parametrize("change", [{"body_hash": "b" * 64}, {"route": "POST /v1/batches"}])
@pytest.mark.parametrize("is_done", [True, False])
def test_a_key_is_not_for_another_request(
    keys: IdempotencyStore, begin: Callable, change: dict[str, str], is_done: bool
) -> None:
    ticket = begin()
    if is_done:
        keys.finish(ticket, ANSWER)
    with pytest.raises(IdempotencyMismatch):
        begin(**change)


def test_an_abandoned_key_is_free(keys: IdempotencyStore, begin: Callable) -> None:
    keys.abandon(begin())
    assert isinstance(begin(body_hash="b" * 64), Ticket)


def test_a_request_whose_server_died_is_taken_over_and_cannot_finish(
    keys: IdempotencyStore, begin: Callable, clock: Clock
) -> None:
    dead = begin()
    clock.now += 61_000
    taken_over = begin()
    assert isinstance(taken_over, Ticket)
    with pytest.raises(IdempotencyInProgress):
        keys.finish(dead, ANSWER)
    keys.abandon(dead)  # the key is no longer its own
    keys.finish(taken_over, ANSWER)
    assert begin() == ANSWER


def test_answers_are_forgotten_after_their_lifetime(keys: IdempotencyStore, begin: Callable, clock: Clock) -> None:
    keys.finish(begin("old"), ANSWER)
    clock.now += DAY_MS // 2
    keys.finish(begin("young"), ANSWER)
    clock.now += DAY_MS // 2 + 1
    assert isinstance(begin("old", body_hash="b" * 64), Ticket)  # also before anybody has cleaned up
    keys.abandon(begin("other"))
    assert keys.purge() == 0
    clock.now += DAY_MS // 2
    assert keys.purge() == 1
    assert isinstance(begin("young"), Ticket)


def test_of_many_requests_at_once_one_works(keys: IdempotencyStore, begin: Callable) -> None:
    start = threading.Barrier(8)

    def call() -> str:
        start.wait()
        try:
            return type(begin()).__name__
        except IdempotencyInProgress:
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        outcomes = [each.result() for each in [pool.submit(call) for _ in range(8)]]
    assert sorted(outcomes) == ["Ticket", *["refused"] * 7]


def _job(fingerprint: str = "f" * 64) -> NewJob:
    return NewJob(tenant_id="default", kind="quantize", spec={"model": "m"}, fingerprint=fingerprint)


def test_work_and_answer_are_kept_together_or_not_at_all(
    engine: Engine, keys: IdempotencyStore, begin: Callable
) -> None:
    jobs, ticket = JobStore(engine), begin()

    def work() -> None:
        with transaction(engine):
            jobs.enqueue(_job(), actor="test")
            keys.finish(ticket, ANSWER)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert jobs.list("default") == []
    with pytest.raises(IdempotencyInProgress):
        begin()


def test_inside_a_transaction_a_store_may_fail_and_go_on(engine: Engine) -> None:
    jobs = JobStore(engine)
    with transaction(engine):
        first, _ = jobs.enqueue(_job(), actor="test")
        with pytest.raises(InfraError):
            jobs.enqueue(NewJob(tenant_id="nobody", kind="quantize", spec={}, fingerprint="a" * 64), actor="test")
        assert jobs.get(first.id).id == first.id  # a read sees what the transaction did
    assert [job.id for job in jobs.list("default")] == [first.id]
