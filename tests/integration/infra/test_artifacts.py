"""Artifacts and evaluations as rows, on each kind of database."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, insert

from infra import audit
from infra.artifacts import ArtifactFilter, ArtifactStore
from infra.database import write
from infra.errors import ArtifactConflict, ArtifactNotFound, EvaluationNotFound
from infra.evaluations import EvaluationStore
from infra.jobs import Job, JobStore
from infra.schema import tenants

pytestmark = pytest.mark.integration

ACTOR = "tester"


@pytest.fixture
def shelf(engine: Engine) -> ArtifactStore:
    return ArtifactStore(engine)


def make(store: JobStore, desk: Any, fingerprint: str = "f", model: str = "llama/7b", recipe: str = "rtn") -> Job:
    """Add a quantize job and end it well."""
    job = desk.add(fingerprint, model_name=model, recipe_name=recipe)
    artifact = {"manifest_key": f"artifacts/default/{job.id}/manifest.json", "size_bytes": 10, "summary": {"a": 1}}
    return store.complete(desk.claim(), {"artifact": artifact})


def evaluate(store: JobStore, desk: Any, made: Job | None, fingerprint: str = "e") -> Job:
    spec = {"artifact_job_id": None if made is None else made.id}
    job = desk.add(fingerprint, kind="evaluate", spec=spec, model_name="llama/7b")
    result = {"artifact_job_id": spec["artifact_job_id"], "metrics": {"perplexity": 12.5}, "seconds": 2.0}
    claim = desk.claim()
    assert claim.job.id == job.id
    return store.complete(claim, result)


def test_a_job_that_succeeds_makes_an_artifact_with_two_names(store, desk, shelf):
    job = make(store, desk)
    artifact = shelf.get(job.id, "default")
    assert shelf.get(artifact.id, "default") == artifact
    assert (artifact.job_id, artifact.size_bytes, artifact.summary) == (job.id, 10, {"a": 1})
    assert shelf.of_jobs([job.id, "job_absent"]) == {job.id: artifact}


def test_other_tenants_see_and_change_nothing(store, desk, shelf, engine):
    with write(engine) as connection:
        connection.execute(insert(tenants).values(id="other", name="other", created_at=0))
    artifact = shelf.get(make(store, desk).id, "default")
    for change in (
        lambda: shelf.get(artifact.id, "other"),
        lambda: shelf.tag(artifact.id, "best", tenant_id="other", actor=ACTOR),
        lambda: shelf.untag(artifact.id, "best", tenant_id="other", actor=ACTOR),
        lambda: shelf.keep_until(artifact.id, 5, tenant_id="other", actor=ACTOR),
        lambda: shelf.delete(artifact.id, tenant_id="other", actor=ACTOR),
    ):
        with pytest.raises(ArtifactNotFound):
            change()
    assert shelf.page("other", ArtifactFilter(), limit=10) == []
    assert shelf.get(artifact.id, "default") == artifact


def test_lists_are_narrowed_and_paged(store, desk, shelf, clock):
    jobs = []
    for index, (model, recipe) in enumerate([("a", "rtn"), ("a", "duquant"), ("b_", "rtn"), ("bx", "rtn")]):
        jobs.append(make(store, desk, f"f{index}", model, recipe))
        clock.advance(1)
    ids = [shelf.get(job.id, "default").id for job in jobs]
    shelf.tag(ids[0], "prod/a", tenant_id="default", actor=ACTOR)
    shelf.tag(ids[2], "prod_", tenant_id="default", actor=ACTOR)

    def found(**wanted: Any) -> list[str]:
        return [each.id for each in shelf.page("default", ArtifactFilter(**wanted), limit=10)]

    assert found() == ids[::-1]
    assert found(model_name="a") == [ids[1], ids[0]]
    assert found(model_name="a", recipe_name="rtn") == [ids[0]]
    assert found(tag="prod/a") == [ids[0]]
    assert found(tag="prod*") == [ids[2], ids[0]]
    assert found(tag="prod_*") == [ids[2]], "an underscore is no wildcard"
    assert found(tag="prod") == []
    assert found(created_from=clock.now - 1000) == [ids[3]]
    assert found(created_until=clock.now - 3000) == [ids[0]]
    first = shelf.page("default", ArtifactFilter(), limit=2)
    rest = shelf.page("default", ArtifactFilter(), limit=9, before=(first[-1].created_at, first[-1].id))
    assert [each.id for each in (*first, *rest)] == ids[::-1]


def test_a_tag_is_on_one_artifact_and_moves(store, desk, shelf, engine):
    first, second = (shelf.get(make(store, desk, name).id, "default").id for name in ("f1", "f2"))
    for artifact_id in (first, first, second):
        shelf.tag(artifact_id, "best", tenant_id="default", actor=ACTOR)
    shelf.tag(second, "again", tenant_id="default", actor=ACTOR)
    assert shelf.tags([first, second]) == {second: ["again", "best"]}
    for _ in range(2):
        shelf.untag(second, "again", tenant_id="default", actor=ACTOR)
    shelf.untag(first, "best", tenant_id="default", actor=ACTOR)
    assert shelf.tags([first, second]) == {second: ["best"]}
    noted = [(entry.action, entry.target, entry.data) for entry in audit.entries(engine, tenant_id="default")]
    assert noted == [
        ("artifact.untagged", second, {"tag": "again"}),
        ("artifact.tagged", second, {"tag": "again", "from": None}),
        ("artifact.tagged", second, {"tag": "best", "from": first}),
        ("artifact.tagged", first, {"tag": "best", "from": None}),
    ]


def test_what_is_deleted_is_gone_and_its_work_can_be_done_anew(store, desk, shelf):
    job = make(store, desk)
    artifact = shelf.get(job.id, "default")
    shelf.delete(artifact.id, tenant_id="default", actor=ACTOR)
    with pytest.raises(ArtifactNotFound):
        shelf.get(artifact.id, "default")
    with pytest.raises(ArtifactNotFound):
        shelf.delete(artifact.id, tenant_id="default", actor=ACTOR)
    assert shelf.page("default", ArtifactFilter(), limit=5) == []
    again, is_new = store.enqueue(desk.new_job(), actor=ACTOR)
    assert is_new
    assert again.id != job.id


def test_a_tag_that_many_give_at_once_is_on_one_artifact(store, desk, shelf):
    made = [shelf.get(make(store, desk, str(number)).id, "default").id for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            list(pool.map(lambda name: shelf.tag(name, "best", tenant_id="default", actor=ACTOR), made))
    assert list(shelf.tags(made).values()) == [["best"]]


def test_a_tagged_artifact_is_deleted_by_force_only(store, desk, shelf):
    artifact = shelf.get(make(store, desk).id, "default")
    shelf.tag(artifact.id, "prod", tenant_id="default", actor=ACTOR)
    with pytest.raises(ArtifactConflict, match="prod"):
        shelf.delete(artifact.id, tenant_id="default", actor=ACTOR)
    shelf.delete(artifact.id, tenant_id="default", actor=ACTOR, force=True)
    assert shelf.tags([artifact.id]) == {}


def test_an_artifact_that_is_being_measured_stays(store, desk, shelf):
    job = make(store, desk)
    evaluation = desk.add("e", kind="evaluate", spec={"artifact_job_id": job.id})
    with pytest.raises(ArtifactConflict, match=evaluation.id):
        shelf.delete(job.id, tenant_id="default", actor=ACTOR, force=True)
    store.cancel(evaluation.id, tenant_id=None, actor=ACTOR)
    shelf.delete(job.id, tenant_id="default", actor=ACTOR)


def test_an_end_is_set_and_taken_away(store, desk, shelf):
    job = make(store, desk)
    assert shelf.keep_until(job.id, 5_000, tenant_id="default", actor=ACTOR).expires_at == 5_000
    assert shelf.keep_until(job.id, None, tenant_id="default", actor=ACTOR).expires_at is None


def test_evaluations_are_at_their_artifact_and_by_themselves(store, desk, shelf, engine, clock):
    made = make(store, desk)
    artifact = shelf.get(made.id, "default")
    jobs = []
    for index, of in enumerate((made, None, made)):
        clock.advance(1)
        jobs.append(evaluate(store, desk, of, f"e{index}"))
    measured = EvaluationStore(engine)
    assert [each.job_id for each in shelf.evaluations([artifact.id])[artifact.id]] == [jobs[2].id, jobs[0].id]
    assert [each.job_id for each in measured.page("default", limit=10)] == [job.id for job in jobs[::-1]]
    assert len(measured.page("default", artifact_id=artifact.id, limit=10)) == 2
    assert len(measured.page("default", model_name="llama/7b", limit=2)) == 2
    one = measured.get(jobs[1].id, "default")
    assert measured.get(one.id, "default") == one
    assert (one.artifact_id, one.metrics) == (None, {"perplexity": 12.5})
    for name, tenant in ((one.id, "other"), ("eval_absent", "default")):
        with pytest.raises(EvaluationNotFound):
            measured.get(name, tenant)
