"""Batches on each kind of database: what they count, cancel and try again."""

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, delete, update

from infra.batches import REFUSED, BatchItem, BatchStore, NewItem
from infra.database import transaction, write
from infra.errors import BatchNotFound, QuotaExceeded
from infra.jobs import Job, JobState, JobStore
from infra.schema import jobs, tenants

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
    first = zoo.page("default", limit=2)
    rest = zoo.page("default", limit=2, before=(first[-1].created_at, first[-1].id))
    assert [batch.id for batch in (*first, *rest)] == ids[::-1]
    assert zoo.page("other", limit=2) == []
    for act in (
        lambda: zoo.get(ids[0], "other"),
        lambda: zoo.cancel(ids[0], tenant_id="other", actor=ACTOR),
        lambda: zoo.retry_failed(ids[0], tenant_id="other", actor=ACTOR),
    ):
        with pytest.raises(BatchNotFound):
            act()


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
    assert zoo.page("default", limit=5) == []
    assert store.list("default") == []
