"""Evaluate jobs through the dispatcher, with real storage, a real database and a real (tiny) model."""

import functools
import json
import threading
import time
from dataclasses import replace

import pytest

from duquant.artifact import read_manifest, verify
from duquant.config import TextSource
from duquant.evaluation import speed as speed_module
from duquant.evaluation.perplexity import evaluate
from duquant.evaluation.timing import ceilings
from infra.artifact_keys import ArtifactKeys
from infra.evaluations import EvaluationStore
from infra.jobs import JobState
from workers.executors.local import LocalExecutor
from workers.layer_worker import LayerWorker
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
        assert job.result["parts"] == {"perplexity": {"state": "done"}}
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


QUIZ = {"kind": "file", "name": "quiz.jsonl", "num_fewshot": None, "limit": None}


def test_numbers_are_on_the_card_and_in_the_manifest_that_is_pulled(side, pull, tmp_path):
    side.submit_evaluation(windows=2)
    baseline = side.run_one()
    side.submit()
    made = side.run_one()
    pull(made, tmp_path / "before")
    side.submit_evaluation(made, windows=2, tasks=[QUIZ])
    job = side.run_one()
    assert job.state is JobState.SUCCEEDED, job.detail

    folder = pull(made, tmp_path / "after")
    report = verify(folder)
    assert report.ok, report.problems
    (result,) = read_manifest(folder).evaluation["results"]
    metrics = job.result["metrics"]
    assert (result["perplexity"], result["tasks"]) == (metrics["perplexity"], metrics["tasks"])
    assert result["baseline"]["perplexity"] == baseline.result["metrics"]["perplexity"]
    assert (result["text"]["name"], result["windows"], result["seq_len"], result["device"]) == (
        "text.txt",
        2,
        32,
        "cpu",
    )
    card = (folder / "README.md").read_text()
    increase = f"{metrics['perplexity'] / result['baseline']['perplexity'] - 1:+.1%}"
    for words in (f"| {metrics['perplexity']:.4f} |", increase, "file `text.txt`", "2 of 32 tokens", "| cpu |"):
        assert words in card
    assert f"| `quiz` | acc | {metrics['tasks']['quiz']['acc']:.4f}" in card
    assert result["measured_at"][:10] in card
    unchanged = {path.name for path in folder.iterdir()} - {"README.md", "manifest.json"}
    assert all((folder / name).read_bytes() == (tmp_path / "before" / name).read_bytes() for name in unchanged)
    page = side.storage.get_bytes(job.result["report_key"]).decode()
    assert f"{metrics['perplexity']:.4f}" in page
    assert f"{result['baseline']['perplexity']:.4f}" in page


def test_evaluations_that_end_at_once_are_all_on_the_card_and_the_newest_of_each_kind_counts(side, pull, tmp_path):
    side.submit()
    made = side.run_one()
    for windows in (1, 2, 3, 1):
        side.submit_evaluation(made, windows=windows)
    claims = [side.store.claim(f"test-{n}", lease_seconds=60) for n in range(4)]
    threads = [threading.Thread(target=side.dispatcher().run_job, args=(claim,)) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    ended = [side.store.get(claim.job.id) for claim in claims]
    assert {job.state for job in ended} == {JobState.SUCCEEDED}, [job.detail for job in ended]
    folder = pull(made, tmp_path / "artifact")
    assert verify(folder).ok
    results = read_manifest(folder).evaluation["results"]
    assert sorted(result["windows"] for result in results) == [1, 2, 3]
    rows = EvaluationStore(side.engine).page("default", limit=9)
    newest, _ = (row.id for row in rows if row.metrics["windows"] == 1)
    assert newest in {result["id"] for result in results}


def test_parts_done_before_one_that_fails_are_on_the_card(side, pull, tmp_path, model_root):
    (model_root / "broken.yaml").write_text("task: broken\n")
    side.submit()
    made = side.run_one()
    side.submit_evaluation(made, windows=1, tasks=[{**QUIZ, "name": "broken.yaml"}])
    failed = side.run_one()
    assert failed.state is JobState.FAILED
    folder = pull(made, tmp_path / "failed")
    assert verify(folder).ok
    (result,) = read_manifest(folder).evaluation["results"]
    assert result["perplexity"] > 1
    assert "tasks" not in result
    # They stay when another evaluation ends.
    side.submit_evaluation(made, windows=2)
    side.run_one()
    results = read_manifest(pull(made, tmp_path / "after")).evaluation["results"]
    assert sorted(each["windows"] for each in results) == [1, 2]


def test_what_is_whole_stays_on_the_card_when_the_same_fails_later(side, pull, tmp_path, model_root):
    quiz = model_root / "passing.jsonl"
    quiz.write_bytes((model_root / QUIZ["name"]).read_bytes())
    settings = {"windows": 1, "tasks": [{**QUIZ, "name": quiz.name}]}
    side.submit()
    made = side.run_one()
    side.submit_evaluation(made, **settings)
    assert side.run_one().state is JobState.SUCCEEDED
    quiz.write_text("broken\n")
    side.submit_evaluation(made, **settings)
    assert side.run_one().state is JobState.FAILED
    (result,) = read_manifest(pull(made, tmp_path / "after")).evaluation["results"]
    assert "tasks" in result


def test_the_kernel_benchmark_is_a_part_like_others(side, pull, tmp_path, monkeypatch):
    # Big copies and products take seconds, and say nothing here.
    monkeypatch.setattr(speed_module, "ceilings", functools.partial(ceilings, copy_bytes=1 << 20, side=64))
    monkeypatch.setitem(speed_module._FLUSH_BYTES, "cpu", 1 << 20)
    side.submit()
    made = side.run_one()
    speed = {"prefill_tokens": 8, "decode_batches": [1], "context": 8, "seconds": 1.0}
    side.submit_evaluation(made, text=..., speed=speed)
    job = side.run_one()
    assert job.state is JobState.SUCCEEDED, job.detail
    assert job.result["parts"] == {"speed": {"state": "done"}}
    measured = job.result["metrics"]["speed"]
    assert measured["layer"][0]["times"][measured["artifact"]]["median_ms"] > 0
    (result,) = read_manifest(pull(made, tmp_path / "artifact")).evaluation["results"]
    assert result["speed"][0]["tokens_per_second"] > 0


def test_a_part_that_fails_leaves_those_before_it_and_a_retry_goes_on_from_them(side, model_root):
    broken = model_root / "broken.yaml"
    broken.write_text("task: broken\n")
    side.submit_evaluation(tasks=[QUIZ, {**QUIZ, "name": "broken.yaml"}])
    job = side.run_one()
    assert (job.state, job.reason) == (JobState.FAILED, "bad_input")
    assert job.detail.startswith("task broken.yaml: ")
    store = EvaluationStore(side.engine)
    kept = store.get(job.id, "default")
    assert not kept.is_complete
    assert {name: part["state"] for name, part in kept.parts.items()} == {
        "perplexity": "done",
        "task quiz.jsonl": "done",
        "task broken.yaml": "failed",
    }
    assert kept.parts["task broken.yaml"]["error"].startswith("task file broken.yaml: output_type is None")
    assert kept.metrics["perplexity"] > 1
    assert kept.metrics["tasks"]["quiz"]["samples"] == 4
    assert job.gpu_ms == pytest.approx(kept.metrics["seconds"] * 1000, abs=3)

    broken.write_text(
        "task: mended\ndataset_path: json\ndataset_kwargs: {data_files: {test: quiz.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{goal}}'\ndoc_to_choice: '{{[sol1, sol2]}}'\n"
        "doc_to_target: label\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    side.store.retry(job.id, tenant_id="default", actor="test")
    again = side.run_one()
    assert again.state is JobState.SUCCEEDED, again.detail
    whole = store.get(job.id, "default")
    assert (whole.id, whole.is_complete) == (kept.id, True)
    assert set(whole.metrics["tasks"]) == {"quiz", "mended"}
    # What was measured before was neither measured nor billed again.
    assert {**whole.metrics, "seconds": 0, "tasks": {}} == {**kept.metrics, "seconds": 0, "tasks": {}}
    assert whole.metrics["tasks"]["quiz"] == kept.metrics["tasks"]["quiz"]
    assert again.gpu_ms == pytest.approx(whole.metrics["seconds"] * 1000, abs=5)


class Killed(LayerWorker):
    """Dies like a killed process when it comes to a task."""

    def do(self, task):
        ended = super().do(replace(task, run=replace(task.run, plan={**task.run.plan, "tasks": []})))
        assert ended.kind == "ok"
        raise KeyboardInterrupt


def test_a_killed_worker_costs_the_part_in_progress_alone(side, tmp_path):
    job = side.submit_evaluation(tasks=[QUIZ])
    claim = side.store.claim("test-1", lease_seconds=60)
    with pytest.raises(KeyboardInterrupt):
        side.dispatcher(LocalExecutor(Killed(side.storage, threads=1))).run_job(claim)
    side.store.heartbeat(claim, lease_seconds=0.1)
    while side.store.sweep() == 0:
        time.sleep(0.05)
    (left,) = (tmp_path / "work").glob(f"{job.id}.*/metrics.json")
    before = json.loads(left.read_bytes())["metrics"]
    ended = side.run_one()
    assert ended.state is JobState.SUCCEEDED, ended.detail
    after = EvaluationStore(side.engine).get(job.id, "default")
    assert after.is_complete
    assert after.metrics["tokens_per_second"] == before["tokens_per_second"], "perplexity was measured again"
    assert after.metrics["tasks"]["quiz"]["samples"] == 4


def test_a_task_file_that_is_an_object_and_no_perplexity(side):
    key = "texts/default/text_1.jsonl"
    side.storage.put_bytes(key, b'{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n' * 3)
    plain = {"text": ..., "seq_len": ..., "windows": ...}
    side.submit_evaluation(**plain, tasks=[{**QUIZ, "kind": "object", "name": key}])
    job = side.run_one()
    assert job.state is JobState.SUCCEEDED, job.detail
    assert "perplexity" not in job.result["metrics"]
    assert job.result["metrics"]["tasks"]["text_1"]["samples"] == 3
