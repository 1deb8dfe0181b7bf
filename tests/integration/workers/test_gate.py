"""Quality gates: a quantize job that measures what it made before it may succeed."""

import json
from dataclasses import replace
from typing import Any

import pytest

from duquant.artifact import verify
from duquant.config import QualityGate, Recipe, TextSource
from infra.artifacts import ArtifactStore
from infra.errors import ArtifactNotFound
from infra.evaluations import EvaluationStore
from infra.jobs import JobState

pytestmark = pytest.mark.integration

TEXT = TextSource(kind="file", name="text.txt", part="evaluation")


def gated(recipe: Recipe, **limits: Any) -> Recipe:
    return replace(recipe, quality_gate=QualityGate(text=TEXT, seq_len=32, windows=4, **limits))


def weights(side: Any, job: Any) -> dict[str, str]:
    manifest = json.loads(side.storage.get_bytes(job.result["artifact"]["manifest_key"]))
    return {entry["name"]: entry["sha256"] for entry in manifest["files"] if entry["name"] != "README.md"}


def test_a_passed_gate_is_in_the_result_on_the_card_and_in_no_other_byte(side, pull, tmp_path):
    side.submit()
    plain = side.run_one()
    side.submit(gated(side.recipe, max_perplexity_increase=10.0))
    job = side.run_one()
    assert job.state is JobState.SUCCEEDED, job.detail
    (check,) = job.result["quality_gate"]["checks"]
    assert (check["passed"], check["limit"]) == (True, "at most 1000.0%")
    assert weights(side, job) == weights(side, plain)

    rows = EvaluationStore(side.engine).page("default", limit=9)
    artifact = ArtifactStore(side.engine).get(job.id, "default")
    assert {(row.artifact_id, row.is_complete) for row in rows} == {(None, True), (artifact.id, True)}
    mine, baseline = sorted(rows, key=lambda row: row.artifact_job_id is None)
    assert check["value"] == mine.metrics["perplexity"] / baseline.metrics["perplexity"] - 1
    assert EvaluationStore(side.engine).get(job.id, "default") == mine

    folder = pull(job, tmp_path / "artifact")
    report = verify(folder)
    assert report.ok, report.problems
    card = (folder / "README.md").read_text()
    assert f"| {mine.metrics['perplexity']:.4f} | {baseline.metrics['perplexity']:.4f} |" in card
    assert "| perplexity increase | at most 1000.0% |" in card
    assert "file `text.txt`, evaluation half" in card
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["evaluation"]["quality_gate"]["checks"] == [check]
    assert artifact.size_bytes == sum(entry["size_bytes"] for entry in manifest["files"])


def test_a_missed_gate_fails_the_job_for_good_and_keeps_what_was_measured(side):
    side.submit(gated(side.recipe, min_accuracy=0.6, tasks=("quiz.jsonl",)))
    job = side.run_one()
    assert (job.state, job.reason) == (JobState.FAILED, "quality_gate")
    assert job.detail == "acc of quiz.jsonl is 50.0%; the least is 60.0%"
    measured = EvaluationStore(side.engine).get(job.id, "default")
    assert (measured.artifact_job_id, measured.artifact_id, measured.is_complete) == (job.id, None, True)
    assert measured.parts == {"task quiz.jsonl": {"state": "done", "names": ["quiz"]}}
    assert b"0.5000" in side.storage.get_bytes(measured.report_key)
    with pytest.raises(ArtifactNotFound):
        ArtifactStore(side.engine).get(job.id, "default")

    # A retry has nothing to measure again, and comes to the same verdict.
    side.store.retry(job.id, tenant_id="default", actor="test")
    again = side.run_one()
    assert (again.reason, again.detail) == ("quality_gate", job.detail)
    assert again.gpu_ms == job.gpu_ms
    assert EvaluationStore(side.engine).get(job.id, "default") == measured


def test_the_model_is_measured_once_for_all_gates_on_the_same_text(side):
    for seed in (1, 2):
        side.submit(gated(replace(side.recipe, seed=seed), max_perplexity_increase=10.0))
        assert side.run_one().state is JobState.SUCCEEDED
    rows = EvaluationStore(side.engine).page("default", limit=9)
    assert sorted(row.artifact_id is None for row in rows) == [False, False, True]


def test_what_a_gate_cannot_measure_on_is_said_before_the_work(side):
    gone = QualityGate(max_perplexity_increase=1.0, text=TextSource(kind="file", name="absent.txt"))
    job = side.submit(replace(side.recipe, quality_gate=gone))
    ended = side.run_one()
    assert (ended.state, ended.reason) == (JobState.FAILED, "bad_input")
    assert "absent.txt" in ended.detail
    assert side.store.layers(job.id) == []
