"""Batches on each kind of database: what they count, cancel and try again."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, get_args

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, delete, event, insert, select, update

from infra.batch_endings import note_finished_batches
from infra.batch_progress import REFUSED, BatchState, progress_of
from infra.batch_search import BatchFilter
from infra.batches import Batch, BatchItem, BatchStore, NewItem
from infra.database import read, transaction, write
from infra.errors import BatchNotFound, QuotaExceeded
from infra.job_search import JobFilter, JobSearch
from infra.jobs import Job, JobState, JobStore
from infra.schema import batch_items, jobs, tenants, webhook_deliveries
from infra.webhooks.store import WebhookStore

pytestmark = pytest.mark.integration

ACTOR = "tester"


@pytest.fixture
def zoo(engine: Engine, store: JobStore) -> BatchStore:
    return BatchStore(engine, store)


def item(desk: Any, fingerprint: str, **changes: Any) -> NewItem:
    return NewItem(model_name="m", recipe_name=fingerprint, job=desk.new_job(fingerprint, **changes))


def batch_of(zoo: BatchStore, *items: NewItem, force: bool = False) -> tuple[str, list[Job | None]]:
    batch = zoo.add("default", "zoo", {"models": ["m"]})
    return batch.id, list(zoo.add_items(batch, items, force=force, actor=ACTOR))


def succeed(store: JobStore, desk: Any, job: Job) -> None:
    claim = desk.claim()
    assert claim.job.id == job.id
    artifact = {"manifest_key": f"artifacts/default/{job.id}/manifest.json", "size_bytes": 1, "summary": {}}
    store.complete(claim, {"artifact": artifact})


def states(zoo: BatchStore, batch_id: str) -> list[str]:
    return [REFUSED if job is None else str(job.state) for _, job in zoo.items(batch_id)]


def test_a_batch_holds_its_items_in_order_and_reuses_what_is_there(store, desk, zoo):
    there = desk.add("a")
    refused = NewItem(model_name="absent", recipe_name="rtn", detail="no such model")
    batch_id, jobs = batch_of(zoo, item(desk, "a"), item(desk, "b"), refused)
    assert [job and job.id for job in jobs] == [there.id, jobs[1].id, None]
    assert (jobs[0].batch_id, jobs[1].batch_id) == (None, batch_id)
    found = [entry for entry, _ in zoo.items(batch_id)]
    assert [(entry.idx, entry.recipe_name, entry.reused) for entry in found] == [
        (0, "a", True),
        (1, "b", False),
        (2, "rtn", False),
    ]
    assert (found[2].job_id, found[2].detail) == (None, "no such model")
    assert isinstance(found[0], BatchItem)
    assert zoo.tallies([batch_id, "batch_absent"]) == {batch_id: {("quantize", "queued"): 2, ("quantize", REFUSED): 1}}
    assert zoo.reused([batch_id]) == {batch_id: 1}


def test_a_forced_batch_reuses_nothing(desk, zoo):
    desk.add("a")
    batch_id, _ = batch_of(zoo, item(desk, "a"), force=True)
    assert zoo.reused([batch_id]) == {}


def test_batches_are_paged_and_other_tenants_see_none(zoo, desk):
    ids = [batch_of(zoo)[0] for _ in range(3)]
    first = zoo.page("default", BatchFilter(), limit=2)
    rest = zoo.page("default", BatchFilter(), limit=2, before=(first[-1].created_at, first[-1].id))
    assert [batch.id for batch in (*first, *rest)] == ids[::-1]
    assert zoo.page("other", BatchFilter(), limit=2) == []
    for act in (
        lambda: zoo.get(ids[0], "other"),
        lambda: zoo.cancel(ids[0], tenant_id="other", actor=ACTOR),
        lambda: zoo.retry_failed(ids[0], tenant_id="other", actor=ACTOR),
    ):
        with pytest.raises(BatchNotFound):
            act()


def test_batches_are_found_by_the_state_that_they_are_shown_with(store, desk, zoo, engine):
    made = [desk.add(name) for name in ("succeeded", "failed", "cancelled", "running")]
    succeed(store, desk, made[0])
    store.fail(desk.claim(), "bad_input", "on purpose")
    store.cancel(made[2].id, tenant_id="default", actor=ACTOR)
    desk.claim()
    # With those that were refused, and whose job the collector has forgotten.
    kinds = [(job.id, None) for job in made] + [(None, "no such model"), (None, None)]
    expected = {}
    for chosen in itertools.product([False, True], repeat=len(kinds)):
        batch = zoo.add("default", "zoo", {})
        rows = [
            {
                "batch_id": batch.id,
                "idx": idx,
                "job_id": job_id,
                "detail": detail,
                "model_name": "m",
                "recipe_name": "r",
            }
            for idx, (job_id, detail) in enumerate(itertools.compress(kinds, chosen))
        ]
        with write(engine) as connection:
            for row in rows:
                connection.execute(insert(batch_items).values(row))
        expected[batch.id] = progress_of(zoo.tallies([batch.id]).get(batch.id, {})).state
    assert set(expected.values()) == set(get_args(BatchState))
    for states in [(state,) for state in get_args(BatchState)] + [("failed", "partial")]:
        found = zoo.page("default", BatchFilter(states=states), limit=100)
        assert [batch.id for batch in found] == [each for each in reversed(expected) if expected[each] in states]


def test_batches_are_found_by_name_work_and_time(desk, zoo, store):
    def add(name: str, *work: tuple[str, str]) -> Batch:
        batch = zoo.add("default", name, {})
        items = [
            NewItem(model_name=model, recipe_name=recipe, job=desk.new_job(model + recipe)) for model, recipe in work
        ]
        zoo.add_items(batch, items, actor=ACTOR)
        return batch

    first = add("nightly", ("a", "rtn"), ("b", "duquant"))
    second = add("nightly", ("a", "duquant"))
    third = add("zoo", ("c", "rtn"))

    def found(**wanted: Any) -> list[str]:
        return [each.id for each in zoo.page("default", BatchFilter(**wanted), limit=9)]

    assert found(name="nightly") == [second.id, first.id]
    assert found(name="night") == []
    assert found(model_name="a") == [second.id, first.id]
    assert found(model_name="a", recipe_name="duquant") == [second.id]  # of one piece of work
    assert found(recipe_name="rtn") == [third.id, first.id]
    assert found(recipe_name="rtn", name="nightly", states=["running"]) == [first.id]
    assert found(created_from=third.created_at + 1) == []
    assert found(created_until=first.created_at) == []
    assert found(created_from=first.created_at, created_until=third.created_at + 1) == [third.id, second.id, first.id]
    # A page goes on where the one before ended, in the narrowed list.
    page = zoo.page("default", BatchFilter(recipe_name="rtn"), limit=1)
    rest = zoo.page("default", BatchFilter(recipe_name="rtn"), limit=9, before=(page[0].created_at, page[0].id))
    assert [each.id for each in (*page, *rest)] == [third.id, first.id]


def test_cancelling_spares_what_was_there_and_what_has_ended(store, desk, zoo):
    there = desk.add("there")
    batch_id, jobs = batch_of(zoo, item(desk, "there"), item(desk, "done"), item(desk, "waiting"))
    store.cancel(there.id, tenant_id=None, actor=ACTOR)  # out of the way of the claim
    succeed(store, desk, jobs[1])
    store.retry(there.id, tenant_id=None, actor=ACTOR)
    evaluation = desk.new_job("e", kind="evaluate", depends_on=[jobs[2].id])
    zoo.add_items(zoo.get(batch_id, "default"), [replace(item(desk, "x"), job=evaluation)], actor=ACTOR)
    batch = zoo.cancel(batch_id, tenant_id="default", actor=ACTOR)
    assert batch.cancelled_at is not None
    assert states(zoo, batch_id) == ["queued", "succeeded", "cancelled", "cancelled"]
    zoo.cancel(batch_id, tenant_id="default", actor=ACTOR)


@pytest.mark.parametrize("is_noted", [False, True])
def test_a_batch_that_has_ended_is_not_cancelled_any_more(store, desk, zoo, engine, is_noted):
    refused = NewItem(model_name="absent", recipe_name="rtn", detail="no such model")
    batch_id, jobs = batch_of(zoo, item(desk, "ok"), item(desk, "bad"), refused)
    succeed(store, desk, jobs[0])
    store.fail(desk.claim(), "bad_input", "on purpose")
    if is_noted:
        note_finished_batches(engine)
    before = zoo.get(batch_id, "default")
    assert zoo.cancel(batch_id, tenant_id="default", actor=ACTOR) == before
    assert zoo.get(batch_id, "default") == before
    assert (before.cancelled_at, states(zoo, batch_id)) == (None, ["succeeded", "failed", REFUSED])
    # It does count again where something of it was tried again.
    store.retry(jobs[1].id, tenant_id="default", actor=ACTOR)
    assert zoo.cancel(batch_id, tenant_id="default", actor=ACTOR).cancelled_at is not None
    assert states(zoo, batch_id) == ["succeeded", "cancelled", REFUSED]


def test_a_batch_is_cancelled_once_until_something_of_it_is_tried_again(store, desk, zoo, engine):
    batch_id, jobs = batch_of(zoo, item(desk, "runs"), item(desk, "waits"))
    running = desk.claim()
    first = zoo.cancel(batch_id, tenant_id="default", actor=ACTOR)
    time.sleep(0.01)
    # One has yet to stop; asking again changes nothing, nor does it afterwards.
    assert states(zoo, batch_id) == ["cancelling", "cancelled"]
    assert zoo.cancel(batch_id, tenant_id="default", actor=ACTOR) == first
    store.finish_cancel(running)
    assert zoo.cancel(batch_id, tenant_id="default", actor=ACTOR) == first
    store.retry(jobs[1].id, tenant_id="default", actor=ACTOR)
    again = zoo.cancel(batch_id, tenant_id="default", actor=ACTOR)
    assert again.cancelled_at > first.cancelled_at
    assert states(zoo, batch_id) == ["cancelled", "cancelled"]


def test_a_batch_whose_last_job_is_stopping_by_itself_is_cancelled_all_the_same(store, desk, zoo):
    batch_id, jobs = batch_of(zoo, item(desk, "runs"))
    desk.claim()
    store.cancel(jobs[0].id, tenant_id="default", actor=ACTOR)
    assert zoo.cancel(batch_id, tenant_id="default", actor=ACTOR).cancelled_at is not None


def test_refused_work_is_counted_as_such_and_has_nothing_to_retry(store, desk, zoo, engine, told):
    refused = NewItem(model_name="absent", recipe_name="rtn", detail="no such model")
    batch_id, jobs = batch_of(zoo, item(desk, "bad"), refused, refused)
    store.fail(desk.claim(), "bad_input", "on purpose")
    counts = progress_of(zoo.tallies([batch_id])[batch_id]).jobs
    assert (counts.total, counts.failed, counts.refused) == (3, 3, 2)
    assert zoo.retry_failed(batch_id, tenant_id="default", actor=ACTOR)[1] == counts.failed - counts.refused
    succeed(store, desk, jobs[0])
    assert note_finished_batches(engine) == 1
    ended = zoo.get(batch_id, "default")
    assert zoo.retry_failed(batch_id, tenant_id="default", actor=ACTOR) == (ended, 0)
    # Nothing waits again, so nobody is told of its end again.
    assert note_finished_batches(engine) == 0
    assert [(each["state"], each["jobs"]["failed"], each["jobs"]["refused"]) for each in told()] == [("partial", 2, 2)]


def test_work_of_two_batches_is_cancelled_with_the_last_of_them(desk, zoo):
    first, _ = batch_of(zoo, item(desk, "both"), item(desk, "mine"))
    second, _ = batch_of(zoo, item(desk, "both"), item(desk, "yours"))
    zoo.cancel(first, tenant_id="default", actor=ACTOR)
    assert states(zoo, first) == ["queued", "cancelled"]
    assert states(zoo, second) == ["queued", "queued"]
    zoo.cancel(second, tenant_id="default", actor=ACTOR)
    assert states(zoo, first) == states(zoo, second) == ["cancelled", "cancelled"]


def test_work_that_somebody_has_asked_for_by_itself_is_not_cancelled_with_its_batch(store, desk, zoo, engine):
    batch_id, made = batch_of(zoo, item(desk, "both"), item(desk, "mine"))
    job, is_new = store.enqueue(desk.new_job("both"), actor=ACTOR)
    assert not is_new
    zoo.cancel(batch_id, tenant_id="default", actor=ACTOR)
    assert states(zoo, batch_id) == ["queued", "cancelled"]
    listed = JobSearch(engine).page("default", JobFilter(batch_id=batch_id), limit=10)
    assert {each.id for each in listed} == {each.id for each in made}
    assert job.id in {each.id for each in listed}


def test_only_what_failed_or_was_cancelled_is_tried_again(store, desk, zoo):
    batch_id, jobs = batch_of(zoo, item(desk, "ok"), item(desk, "bad"), item(desk, "off"))
    succeed(store, desk, jobs[0])
    store.fail(desk.claim(), "bad_input", "on purpose")
    zoo.cancel(batch_id, tenant_id="default", actor=ACTOR)
    assert states(zoo, batch_id) == ["succeeded", "failed", "cancelled"]
    batch, count = zoo.retry_failed(batch_id, tenant_id="default", actor=ACTOR)
    assert (count, batch.cancelled_at) == (2, None)
    assert states(zoo, batch_id) == ["succeeded", "queued", "queued"]
    assert zoo.retry_failed(batch_id, tenant_id="default", actor=ACTOR)[1] == 0


def test_an_evaluation_is_tried_again_with_what_it_waits_for(store, desk, zoo):
    batch_id, jobs = batch_of(zoo, item(desk, "bad"))
    evaluation = desk.new_job("e", kind="evaluate", depends_on=[jobs[0].id])
    zoo.add_items(zoo.get(batch_id, "default"), [replace(item(desk, "bad"), job=evaluation)], actor=ACTOR)
    store.fail(desk.claim(), "error", "on purpose")
    assert states(zoo, batch_id) == ["failed", "failed"]
    assert zoo.retry_failed(batch_id, tenant_id="default", actor=ACTOR)[1] == 2
    assert states(zoo, batch_id) == ["queued", "blocked"]


def test_where_somebody_else_does_the_work_by_now_the_batch_takes_that_over(store, desk, zoo):
    batch_id, jobs = batch_of(zoo, item(desk, "a"))
    store.fail(desk.claim(), "error", "on purpose")
    other = desk.add("a")
    zoo.retry_failed(batch_id, tenant_id="default", actor=ACTOR)
    ((entry, job),) = zoo.items(batch_id)
    assert (job.id, entry.reused) == (other.id, True)
    assert store.get(jobs[0].id).state is JobState.FAILED


def test_work_that_is_being_cancelled_stops_no_batch(store, desk, zoo):
    first, jobs = batch_of(zoo, item(desk, "a"), item(desk, "b"))
    store.fail(desk.claim(), "error", "on purpose")
    leaving = desk.add("a")
    store.cancel(jobs[1].id, tenant_id="default", actor=ACTOR)
    desk.claim()
    store.cancel(leaving.id, tenant_id="default", actor=ACTOR)
    second, made = batch_of(zoo, item(desk, "a"), item(desk, "c"))
    (refused, _), (taken, _) = zoo.items(second)
    assert (made[0], refused.job_id, taken.job_id) == (None, None, made[1].id)
    assert f"{leaving.id} does this work and is being cancelled" in refused.detail
    # Nor does it stop the rest of a batch from being tried again.
    assert zoo.retry_failed(first, tenant_id="default", actor=ACTOR)[1] == 1
    assert states(zoo, first) == ["failed", "queued"]


def test_what_the_collector_has_forgotten_is_not_counted(store, desk, zoo, engine):
    refused = NewItem(model_name="absent", recipe_name="rtn", detail="no such model")
    batch_id, made = batch_of(zoo, item(desk, "old"), item(desk, "new"), refused)
    store.fail(desk.claim(), "bad_input", "on purpose")
    with write(engine) as connection:
        connection.execute(delete(jobs).where(jobs.c.id == made[0].id))
    assert [entry.recipe_name for entry, _ in zoo.items(batch_id)] == ["new", "rtn"]
    assert zoo.tallies([batch_id])[batch_id] == {("quantize", "queued"): 1, ("quantize", REFUSED): 1}


def test_a_batch_over_the_quota_leaves_nothing(store, desk, zoo, engine):
    with write(engine) as connection:
        connection.execute(update(tenants).values(max_queued=2))
    with pytest.raises(QuotaExceeded), transaction(engine):
        batch_of(zoo, item(desk, "a"), item(desk, "b"), item(desk, "c"))
    assert zoo.page("default", BatchFilter(), limit=5) == []
    assert store.list("default") == []


@pytest.fixture
def told(engine: Engine) -> Callable[[], list[dict[str, Any]]]:
    """What the default tenant's webhook is told of batches, in order; two other webhooks hear nothing of them."""
    with write(engine) as connection:
        connection.execute(insert(tenants).values(id="other", name="other", created_at=0))
    hooks = WebhookStore(engine, SecretStr("pepper"))
    hook = hooks.create("default", "https://example.com", ["batch.finished"], actor=ACTOR)[0]
    deaf = [hooks.create("default", "https://example.com", ["job.failed"], actor=ACTOR)[0].id]
    deaf.append(hooks.create("other", "https://example.com", [], actor=ACTOR)[0].id)

    def read_messages() -> list[dict[str, Any]]:
        with read(engine) as connection:
            rows = connection.execute(select(webhook_deliveries).order_by(webhook_deliveries.c.id)).mappings().all()
        of_batches = [row for row in rows if row["event"] == "batch.finished"]
        assert not {row["webhook_id"] for row in of_batches} & set(deaf)
        assert {row["webhook_id"] for row in of_batches} <= {hook.id}
        return [row["payload"]["data"] for row in of_batches]

    return read_messages


def test_the_end_of_a_batch_is_told_once_and_again_after_a_retry(store, desk, zoo, engine, told):
    batch_id, jobs = batch_of(zoo, item(desk, "ok"), item(desk, "bad"))
    succeed(store, desk, jobs[0])
    assert note_finished_batches(engine) == 0
    store.fail(desk.claim(), "bad_input", "on purpose")
    assert zoo.get(batch_id, "default").finished_at is None
    assert [note_finished_batches(engine) for _ in range(3)] == [1, 0, 0]
    (first,) = told()
    assert (first["batch_id"], first["name"], first["state"]) == (batch_id, "zoo", "partial")
    assert (first["jobs"]["total"], first["jobs"]["succeeded"], first["jobs"]["failed"]) == (2, 1, 1)
    assert first["finished_at"] == zoo.get(batch_id, "default").finished_at > first["created_at"]
    store.retry(jobs[1].id, tenant_id="default", actor=ACTOR)
    assert zoo.get(batch_id, "default").finished_at is None
    assert note_finished_batches(engine) == 0
    succeed(store, desk, jobs[1])
    assert note_finished_batches(engine) == 1
    assert [message["state"] for message in told()] == ["partial", "succeeded"]


def test_a_batch_that_reuses_all_or_is_refused_all_has_ended_at_once(store, desk, zoo, engine, told):
    there = desk.add("a")
    succeed(store, desk, there)
    batch_of(zoo, item(desk, "a"))
    batch_of(zoo, NewItem(model_name="absent", recipe_name="rtn", detail="no such model"))
    waiting = desk.add("b")
    batch_of(zoo, item(desk, "b"))
    assert note_finished_batches(engine) == 2
    assert sorted(message["state"] for message in told()) == ["failed", "succeeded"]
    store.cancel(waiting.id, tenant_id="default", actor=ACTOR)
    assert note_finished_batches(engine) == 1
    assert told()[-1]["state"] == "cancelled"


def test_processes_that_look_at_the_same_moment_tell_of_a_batch_once(desk, zoo, engine, told):
    for number in range(8):
        batch_of(zoo, NewItem(model_name=str(number), recipe_name="rtn", detail="no such model"))
    with ThreadPoolExecutor(4) as pool:
        noted = sum(pool.map(lambda _: note_finished_batches(engine), range(4)))
    assert noted == len(told()) == 8


def test_a_wide_batch_lets_other_writers_in_while_it_is_cancelled_and_retried(store, desk, zoo, engine):
    batch_id, _ = batch_of(zoo, *(item(desk, f"wide-{number}") for number in range(120)))
    turns = []

    def count(connection: Any) -> None:
        turns.append(1)

    event.listen(engine, "commit", count)
    zoo.cancel(batch_id, tenant_id="default", actor=ACTOR)
    assert set(states(zoo, batch_id)) == {"cancelled"}
    assert len(turns) >= 3
    turns.clear()
    assert zoo.retry_failed(batch_id, tenant_id="default", actor=ACTOR)[1] == 120
    assert set(states(zoo, batch_id)) == {"queued"}
    assert len(turns) >= 3
    event.remove(engine, "commit", count)


def test_two_batches_of_the_same_work_in_another_order_do_not_wait_for_each_other(desk, zoo):
    def slowly(*names: str) -> Iterator[NewItem]:
        for name in names:
            yield item(desk, name)
            time.sleep(0.1)  # the other has its first job by now, unless it waits for all of ours

    def add(names: tuple[str, str]) -> set[str]:
        batch = zoo.add("default", "zoo", {"models": ["m"]})
        return {job.id for job in zoo.add_items(batch, slowly(*names), actor=ACTOR) if job is not None}

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(add, [("a", "b"), ("b", "a")])
    assert first == second
    assert len(first) == 2


def test_retrying_more_than_the_quota_allows_queues_nothing(desk, zoo, engine):
    batch_id, _ = batch_of(zoo, item(desk, "a"), item(desk, "b"), item(desk, "c"))
    zoo.cancel(batch_id, tenant_id="default", actor=ACTOR)
    with write(engine) as connection:
        connection.execute(update(tenants).values(max_queued=2))
    with pytest.raises(QuotaExceeded):
        zoo.retry_failed(batch_id, tenant_id="default", actor=ACTOR)
    assert states(zoo, batch_id) == ["cancelled"] * 3
