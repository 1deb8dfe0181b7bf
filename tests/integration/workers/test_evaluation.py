"""Evaluate jobs through the dispatcher, with real storage, a real database and a real (tiny) model."""

import threading
import time

import pytest

from duquant.config import TextSource
from duquant.evaluation.perplexity import evaluate
from infra.artifact_keys import ArtifactKeys
from infra.jobs import JobState
from workers.measure import fetch_artifact

pytestmark = pytest.mark.integration

TEXT = {"kind": "file", "name": "text.txt", "part": "evaluation"}


def test_an_artifact_and_its_model_are_measured_as_the_command_line_does(side, pull, tmp_path, model_root, capfd):
    side.submit()
    made = side.run_one()
    artifact = pull(made, tmp_path / "artifact")
    source = TextSource(kind="file", name=str(model_root / "text.txt"), part="evaluation")
    for artifact_job, path in ((made, artifact), (None, model_root / "tiny")):
        side.submit_evaluation(artifact_job)
        job = side.run_one()
        assert job.state is JobState.SUCCEEDED, job.detail
        expected = evaluate(str(path), source, seq_len=32, windows=4, device="cpu", threads=1)
        metrics = job.result["metrics"]
        assert metrics["perplexity"] == expected.perplexity
        assert (metrics["tokens"], metrics["windows"], metrics["model_bytes"]) == (4 * 31, 4, expected.model_bytes)
        assert metrics["tokens_per_second"] > 0
        assert job.result["artifact_job_id"] == (artifact_job and artifact_job.id)
        assert (job.phase, job.progress_done, job.progress_total) == ("windows", 4, 4)
        assert not list((tmp_path / "work").glob("job_*")), "scratch files stay behind"
    assert "Loading weights" not in capfd.readouterr().err, "bars among the lines of the log"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": {**TEXT, "name": "../text.txt"}}, "plain name"),
        ({"text": {**TEXT, "name": "absent.txt"}}, "absent.txt"),
        ({"text": {"kind": "object", "name": "texts/other/t.txt"}}, "texts/default/"),
        ({"text": {"kind": "object", "name": "texts/default/absent.txt"}}, "absent.txt"),
        ({"text": {"kind": "hub", "name": "wikitext"}}, "switched off"),
        ({"text": {"kind": "random", "name": ""}}, "no text"),
        ({"seq_len": 100_000}, "text.txt"),
    ],
)
def test_bad_input_fails_at_once_with_its_reason(side, changes, words):
    side.submit_evaluation(**changes)
    job = side.run_one()
    assert (job.state, job.reason) == (JobState.FAILED, "bad_input"), job.detail
    assert words in job.detail


def test_a_job_without_an_artifact_cannot_be_measured(side):
    waiting = side.submit()
    side.store.cancel(waiting.id, tenant_id=None, actor="test")
    side.submit_evaluation(waiting)
    job = side.run_one()
    assert (job.state, job.reason) == (JobState.FAILED, "bad_input")
    assert "has no artifact" in job.detail


def test_a_damaged_artifact_is_refused_and_a_mended_one_measured(side):
    side.submit()
    made = side.run_one()
    row = side.store.layers(made.id)[1]
    whole = side.storage.get_bytes(row.key)
    side.storage.put_bytes(row.key, b"\0" * len(whole))
    side.submit_evaluation(made)
    job = side.run_one()
    assert (job.state, job.reason) == (JobState.FAILED, "error")
    assert row.key in job.detail
    side.storage.put_bytes(row.key, whole)
    side.submit_evaluation(made)
    assert side.run_one().state is JobState.SUCCEEDED


def test_files_that_are_there_are_not_fetched_again(side, tmp_path):
    side.submit()
    made = side.run_one()
    manifest = ArtifactKeys("default", made.id).manifest
    folder = fetch_artifact(side.storage, manifest, tmp_path / "artifact")
    shards = sorted(folder.glob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in shards]
    shards[0].write_bytes(b"damaged")
    fetch_artifact(side.storage, manifest, tmp_path / "artifact")
    assert [path.stat().st_mtime_ns for path in shards[1:]] == times[1:]
    assert shards[0].stat().st_size > len(b"damaged")


def test_a_cancel_stops_the_measuring_at_the_next_window(side, tmp_path, model_root):
    (model_root / "long.txt").write_text((model_root / "text.txt").read_text() * 200)
    job = side.submit_evaluation(text={"kind": "file", "name": "long.txt"}, windows=None)
    claim = side.store.claim("test-1", lease_seconds=60)
    dispatcher = threading.Thread(target=side.dispatcher().run_job, args=(claim,))
    dispatcher.start()
    deadline = time.monotonic() + 60
    while side.store.get(job.id).progress_done == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    side.store.cancel(job.id, tenant_id=None, actor="test")
    dispatcher.join(30)
    assert not dispatcher.is_alive()
    ended = side.store.get(job.id)
    assert ended.state is JobState.CANCELLED
    assert 0 < ended.progress_done < ended.progress_total
    assert not list((tmp_path / "work").glob("job_*"))


def test_a_stopping_dispatcher_gives_the_evaluation_back(side, model_root):
    (model_root / "long.txt").write_text((model_root / "text.txt").read_text() * 200)
    job = side.submit_evaluation(text={"kind": "file", "name": "long.txt"}, windows=20)
    dispatcher = side.dispatcher()
    claim = side.store.claim("test-1", lease_seconds=60)
    thread = threading.Thread(target=dispatcher.run_job, args=(claim,))
    thread.start()
    time.sleep(0.5)
    dispatcher.stop()
    thread.join(30)
    assert side.store.get(job.id).state is JobState.QUEUED
    assert side.run_one().state is JobState.SUCCEEDED
