"""What a job measures, part by part, on each kind of database; cards that swing with it."""

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine

from infra.artifacts import ArtifactStore
from infra.errors import CardOutdated
from infra.evaluations import EvaluationStore
from infra.job_measures import measured_fingerprint
from infra.jobs import CardRevision, Claim, Job, JobState, JobStore, Measured, NewJob

pytestmark = pytest.mark.integration

PLAIN = {"text": {"kind": "builtin"}, "seq_len": 32, "windows": 2}
PARTS = {"perplexity": {"state": "done"}, "task quiz": {"state": "pending"}}


def evaluation_claim(store: JobStore, made: Job | None, fingerprint: str = "e", *, force: bool = False) -> Claim:
    """Take up a job that measures what a job made, or (none) its model."""
    spec = {
        "model_identity": "m",
        "artifact_job_id": None if made is None else made.id,
        "evaluation": PLAIN,
    }
    new = NewJob(tenant_id="default", kind="evaluate", spec=spec, fingerprint=fingerprint, model_name="llama/7b")
    job, _ = store.enqueue(new, force=force, actor="t")
    claim = store.claim("worker", lease_seconds=60)
    assert claim is not None
    assert claim.job.id == job.id
    return claim


def artifact(store: JobStore, desk: Any) -> Job:
    job = desk.add(model_name="llama/7b")
    made = {"manifest_key": f"artifacts/default/{job.id}/manifest.json", "size_bytes": 10, "summary": {}}
    return store.complete(desk.claim(), {"artifact": made})


def measured(claim: Claim, **changes: Any) -> Measured:
    plain = Measured(
        fingerprint=claim.job.fingerprint,
        artifact_job_id=claim.job.spec["artifact_job_id"],
        settings=PLAIN,
        metrics={"perplexity": 9.5},
        parts=PARTS,
        is_complete=False,
    )
    return replace(plain, **changes)


def test_parts_are_written_into_one_row_and_billed_as_they_come(store: JobStore, desk: Any, engine: Engine) -> None:
    made = artifact(store, desk)
    claim = evaluation_claim(store, made)
    first = store.record_measured(claim, measured(claim), slot=-2, seconds=2.0, device="gpu")
    assert (first.is_complete, first.metrics, first.parts) == (False, {"perplexity": 9.5}, PARTS)
    whole = measured(claim, metrics={"perplexity": 9.5, "tasks": {}}, parts={})
    second = store.record_measured(claim, whole, slot=-3, seconds=1.0, device="gpu")
    assert (second.id, second.created_at) == (first.id, first.created_at)
    assert store.get(claim.job.id).gpu_ms == 3000
    result = {
        "artifact_job_id": made.id,
        "metrics": dict(whole.metrics),
        "parts": {},
        "report_key": "r",
        "seconds": 3.0,
    }
    store.complete(claim, result)
    row = EvaluationStore(engine).get(claim.job.id, "default")
    assert (row.id, row.is_complete, row.report_key) == (first.id, True, "r")
    assert row.artifact_id == ArtifactStore(engine).get(made.id, "default").id
    assert store.get(claim.job.id).gpu_ms == 3000, "the same time is billed twice"


def test_a_job_goes_on_from_its_own_parts_and_from_those_of_others_unless_it_is_forced(
    store: JobStore, desk: Any
) -> None:
    made = artifact(store, desk)
    claim = evaluation_claim(store, made)
    kept = store.record_measured(claim, measured(claim))
    assert store.measured_before(claim.job, "e") == kept
    assert store.measured_before(claim.job, "another") is None
    store.fail(claim, "bad_input", "no such task")
    again = evaluation_claim(store, made)
    assert store.measured_before(again.job, "e") == kept
    store.fail(again, "bad_input", "no such task")
    forced = evaluation_claim(store, made, force=True)
    assert store.measured_before(forced.job, "e") is None
    assert store.measured_before(forced.job, "e", is_baseline=True) == kept


def test_a_card_swings_with_the_numbers_or_neither_is_written(store: JobStore, desk: Any, engine: Engine) -> None:
    made = artifact(store, desk)
    shelf, evaluations = ArtifactStore(engine), EvaluationStore(engine)
    before = shelf.get(made.id, "default")
    claims = [evaluation_claim(store, made, name) for name in ("a", "b")]
    cards = [
        CardRevision(artifact_id=before.id, replaces=before.manifest_key, manifest_key=name, size_bytes=size)
        for name, size in (("first", 11), ("second", 12))
    ]
    result = {"artifact_job_id": made.id, "metrics": {"perplexity": 9.5}, "seconds": 1.0}
    store.complete(claims[0], result, card=cards[0])
    with pytest.raises(CardOutdated):
        store.complete(claims[1], result, card=cards[1])
    after = shelf.get(made.id, "default")
    assert (after.manifest_key, after.size_bytes) == ("first", 11)
    assert store.get(claims[1].job.id).state is JobState.RUNNING
    assert len(evaluations.page("default", limit=9)) == 1

    store.complete(claims[1], result, card=replace(cards[1], replaces="first"))
    assert shelf.get(made.id, "default").manifest_key == "second"
    found = store.measured_on(claims[1].job, made.id)
    assert {each.evaluation.job_id for each in found} == {claim.job.id for claim in claims}


def test_an_artifact_that_was_deleted_meanwhile_has_no_card_and_keeps_no_job_from_its_end(
    store: JobStore, desk: Any, engine: Engine
) -> None:
    made = artifact(store, desk)
    shelf = ArtifactStore(engine)
    before = shelf.get(made.id, "default")
    claim = evaluation_claim(store, None)
    shelf.delete(before.id, tenant_id="default", actor="t")
    card = CardRevision(artifact_id=before.id, replaces="another", manifest_key="new", size_bytes=1)
    result = {"artifact_job_id": None, "metrics": {"perplexity": 9.5}, "seconds": 1.0}
    assert store.complete(claim, result, card=card).state is JobState.SUCCEEDED
    assert store.artifact_of(made.id) is None


def test_the_models_own_perplexity_stands_beside_that_of_the_artifact(store: JobStore, desk: Any) -> None:
    made = artifact(store, desk)
    spec = {"model_identity": "m", "evaluation": PLAIN}
    baseline = evaluation_claim(store, None, measured_fingerprint(spec, None))
    result = {"artifact_job_id": None, "metrics": {"perplexity": 7.5}, "seconds": 1.0}
    store.complete(baseline, result)
    claim = evaluation_claim(store, made, measured_fingerprint(spec, made.id))
    store.record_measured(claim, measured(claim))
    (found,) = store.measured_on(claim.job, made.id)
    assert found.evaluation.metrics == {"perplexity": 9.5}
    assert found.baseline is not None
    assert found.baseline.metrics == {"perplexity": 7.5}
    assert store.baseline_of(claim.job) == found.baseline
