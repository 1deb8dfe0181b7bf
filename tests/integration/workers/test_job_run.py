"""One job through the dispatcher, with real storage, a real database and a real (tiny) model."""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sqlalchemy import select

from duquant.artifact import verify
from duquant.config import TextSource
from duquant.inference import load
from duquant.pipeline import quantize_model
from infra.database import read
from infra.jobs import JobState
from infra.schema import usage_ledger
from infra.storage import ObjectStore
from infra.usage import UsageStore
from workers.executors.local import LocalExecutor
from workers.layer_worker import LayerWorker
from workers.tasks import Completion, Task

pytestmark = pytest.mark.integration


def shards_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def test_a_job_gives_a_verified_artifact_that_loads(side, pull, tmp_path):
    side.submit()
    job = side.run_one()
    assert job.state is JobState.SUCCEEDED, job.detail
    artifact = pull(job, tmp_path / "artifact")
    assert verify(artifact).ok
    model, tokenizer = load(artifact)
    ids = tokenizer("hello world", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()
    assert job.progress_done == job.progress_total == 4
    assert {row.layer for row in side.store.layers(job.id)} == {-1, 0, 1, 2, 3}
    assert not list((tmp_path / "work").glob("job_*")), "scratch files stay behind"


def test_sweeps_and_layers_are_on_the_bill(side):
    side.submit()
    job = side.run_one()
    of_layers = sum(row.seconds for row in side.store.layers(job.id))
    bill = UsageStore(side.engine).totals("default", by="job", since=0, until=2**62)
    assert [(row.key, row.gpu_ms) for row in bill] == [(job.id, job.gpu_ms)]
    with read(side.engine) as connection:
        slots = connection.execute(select(usage_ledger.c.layer)).scalars().all()
    assert [slot for slot in sorted(slots) if slot >= -1] == [-1, 0, 1, 2, 3]
    assert len(slots) >= 5 + 3, "each shard of the text goes through the model"
    assert job.gpu_ms / 1000 > of_layers


def test_the_service_and_the_command_line_give_the_same_bytes(side, pull, tmp_path, model_root):
    side.submit()
    artifact = pull(side.run_one(), tmp_path / "served")
    source = TextSource(kind="file", name=str(model_root / "text.txt"))
    recipe = replace(side.recipe, calibration=replace(side.recipe.calibration, source=source))
    local = quantize_model(str(model_root / "tiny"), tmp_path / "local", recipe, device="cpu", threads=1)
    assert shards_of(local.artifact) == shards_of(artifact)


class DyingWorker(LayerWorker):
    """Dies like a killed process once `after` shards are stored."""

    def __init__(self, storage: ObjectStore, after: int) -> None:
        super().__init__(storage, threads=1)
        self.left = after
        self.stored: list[int] = []

    def do(self, task: Task) -> Completion:
        if task.step.kind == "quantize":
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.stored.append(task.step.layer)
        return super().do(task)


def bury(side, claim) -> None:
    """Let a dispatcher's lease end now: a short one might end too early on a busy machine."""
    side.store.heartbeat(claim, lease_seconds=0.1)
    while side.store.sweep() == 0:
        time.sleep(0.05)


def test_a_job_whose_dispatcher_died_goes_on_where_it_was(side, pull, tmp_path):
    side.submit()
    undisturbed = pull(side.run_one(), tmp_path / "undisturbed")
    job = side.submit()
    first = DyingWorker(side.storage, after=2)
    claim = side.store.claim("first", lease_seconds=600)
    with pytest.raises(KeyboardInterrupt):
        side.dispatcher(LocalExecutor(first), beat_seconds=3600).run_job(claim)
    committed = {row.layer for row in side.store.layers(job.id) if row.state == "done"}
    assert len(committed) >= 2
    bury(side, claim)
    second = DyingWorker(side.storage, after=100)
    job = side.run_one(LocalExecutor(second))
    assert job.state is JobState.SUCCEEDED, job.detail
    assert job.lease_losses == 1
    assert not committed & set(second.stored), "a committed layer was done again"
    assert shards_of(pull(job, tmp_path / "resumed")) == shards_of(undisturbed)


def test_a_committed_layer_whose_object_is_gone_is_done_again(side, pull, tmp_path):
    job = side.submit()
    claim = side.store.claim("first", lease_seconds=600)
    with pytest.raises(KeyboardInterrupt):
        side.dispatcher(LocalExecutor(DyingWorker(side.storage, after=2)), beat_seconds=3600).run_job(claim)
    lost = next(row for row in side.store.layers(job.id) if row.state == "done" and row.layer >= 0)
    side.storage.delete(lost.key)
    bury(side, claim)
    again = DyingWorker(side.storage, after=100)
    job = side.run_one(LocalExecutor(again))
    assert job.state is JobState.SUCCEEDED, job.detail
    assert lost.layer in again.stored
    assert verify(pull(job, tmp_path / "artifact")).ok


class SlowWorker(LayerWorker):
    """Says when the first shard is being made, and waits until it may go on."""

    def __init__(self, storage: ObjectStore) -> None:
        super().__init__(storage, threads=1)
        self.busy, self.go_on = threading.Event(), threading.Event()

    def do(self, task: Task) -> Completion:
        if task.step.kind == "quantize":
            self.busy.set()
            assert self.go_on.wait(120)
        return super().do(task)


def run_in_thread(dispatcher) -> threading.Thread:
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
    return thread


def test_a_running_job_can_be_cancelled_and_leaves_no_scratch_files(side, tmp_path):
    job = side.submit()
    worker = SlowWorker(side.storage)
    dispatcher = side.dispatcher(LocalExecutor(worker))
    thread = run_in_thread(dispatcher)
    assert worker.busy.wait(60)
    side.store.cancel(job.id, tenant_id="default", actor="test")
    time.sleep(0.5)  # more than one beat, which brings the cancel to the dispatcher
    worker.go_on.set()
    while side.store.get(job.id).state is JobState.CANCELLING:
        time.sleep(0.05)
    dispatcher.stop()
    thread.join()
    assert side.store.get(job.id).state is JobState.CANCELLED
    assert not list((tmp_path / "work").glob("job_*"))


def test_a_running_job_fails_at_its_deadline_and_a_retry_goes_on(side, tmp_path):
    job = side.submit()
    worker = SlowWorker(side.storage)
    dispatcher = side.dispatcher(LocalExecutor(worker))
    thread = run_in_thread(dispatcher)
    assert worker.busy.wait(60)
    side.store.change(job.id, {"deadline_at": 1}, tenant_id="default", actor="test")
    time.sleep(0.5)  # more than one beat, which brings the deadline to the dispatcher
    worker.go_on.set()
    while side.store.get(job.id).state is JobState.RUNNING:
        time.sleep(0.05)
    dispatcher.stop()
    thread.join()
    ended = side.store.get(job.id)
    assert (ended.state, ended.reason) == (JobState.FAILED, "deadline")
    assert not list((tmp_path / "work").glob("job_*"))
    side.store.retry(job.id, tenant_id="default", actor="test")
    done = side.run_one()
    assert done.state is JobState.SUCCEEDED
    assert done.gpu_ms > 0


def test_a_stopped_dispatcher_gives_its_job_back_and_the_next_one_finishes_it(side):
    job = side.submit()
    worker = SlowWorker(side.storage)
    dispatcher = side.dispatcher(LocalExecutor(worker))
    thread = run_in_thread(dispatcher)
    assert worker.busy.wait(60)
    dispatcher.stop()
    worker.go_on.set()
    thread.join()
    released = side.store.get(job.id)
    assert released.state is JobState.QUEUED
    assert released.attempt == 0, "a graceful stop is no failed try"
    assert side.run_one().state is JobState.SUCCEEDED


def test_a_zombie_that_lost_its_lease_commits_nothing(side, tmp_path):
    job = side.submit()
    worker = SlowWorker(side.storage)
    claim = side.store.claim("zombie", lease_seconds=600)
    # It beats too late, like a process that was suspended.
    dispatcher = side.dispatcher(LocalExecutor(worker), beat_seconds=3600)
    zombie = threading.Thread(target=dispatcher.run_job, args=(claim,))
    zombie.start()
    assert worker.busy.wait(60)
    bury(side, claim)
    done = side.run_one()
    worker.go_on.set()
    zombie.join()
    assert done.state is JobState.SUCCEEDED
    # The embeddings' shard was stored while the zombie still had its lease.
    fences = {row.fence for row in side.store.layers(job.id) if row.layer >= 0}
    assert fences == {done.fence}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "model.safetensors").write_bytes(b"\0" * 64), "model.safetensors"),
        (lambda path: (path / "config.json").write_text('{"model_type": "gpt2"}'), "gpt2"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_a_model_that_cannot_be_used_fails_the_job_at_once_and_says_why(side, model_root, damage, words):
    broken = model_root / "broken"
    shutil.copytree(model_root / "tiny", broken)
    try:
        damage(broken)
        side.submit(model="broken")
        job = side.run_one()
    finally:
        shutil.rmtree(broken)
    assert job.state is JobState.FAILED
    assert job.reason == "bad_input"
    assert words in job.detail
    assert "Traceback" not in job.detail


def test_weights_that_are_not_finite_fail_the_job_and_name_the_tensor(side, model_root):
    from safetensors.torch import load_file, save_file

    broken = model_root / "nan"
    shutil.copytree(model_root / "tiny", broken)
    try:
        tensors = load_file(broken / "model.safetensors")
        tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        side.submit(model="nan")
        job = side.run_one()
    finally:
        shutil.rmtree(broken)
    assert job.state is JobState.FAILED
    assert job.reason == "bad_input"
    assert "model.layers.2.mlp.up_proj.weight" in job.detail
    done = {row.layer for row in side.store.layers(job.id) if row.state == "done"}
    assert done, "what was finished is kept"


def test_too_short_and_missing_calibration_text_fail_the_job_with_words(side):
    for name, words in (("short.txt", "tokens"), ("missing.txt", "missing.txt")):
        if name == "short.txt":
            (side.settings.text_roots[0] / name).write_text("too short", encoding="utf-8")
        source = TextSource(kind="file", name=name)
        side.submit(replace(side.recipe, calibration=replace(side.recipe.calibration, source=source)))
        job = side.run_one()
        assert (job.state, job.reason) == (JobState.FAILED, "bad_input")
        assert words in job.detail


def test_text_can_come_from_an_object_of_the_tenant_only(side, pull, tmp_path, model_root):
    text = (model_root / "text.txt").read_bytes()
    side.storage.put_bytes("texts/default/mine.txt", text)
    side.storage.put_bytes("texts/other/theirs.txt", text)

    def recipe_for(key: str):
        source = TextSource(kind="object", name=key)
        return replace(side.recipe, calibration=replace(side.recipe.calibration, source=source))

    side.submit(recipe_for("texts/default/mine.txt"))
    assert side.run_one().state is JobState.SUCCEEDED
    side.submit(recipe_for("texts/other/theirs.txt"))
    refused = side.run_one()
    assert (refused.state, refused.reason) == (JobState.FAILED, "bad_input")


def test_an_unreachable_object_store_is_retried_and_then_named(side):
    side.submit()
    with ObjectStore(
        endpoint="http://127.0.0.1:1",
        region="us-east-1",
        bucket="none",
        access_key="a",
        secret_key="b",
    ) as nowhere:
        executor = LocalExecutor(LayerWorker(nowhere, threads=1))
        dispatcher = side.dispatcher(executor)
        states = []
        for _ in range(3):
            claim = side.store.claim("test", lease_seconds=60)
            assert claim is not None
            dispatcher.run_job(claim)
            states.append(side.store.get(claim.job.id).state)
        executor.close()
    job = side.store.get(claim.job.id)
    assert states == [JobState.SCHEDULED, JobState.SCHEDULED, JobState.FAILED]
    assert job.reason == "retries_exhausted"
    assert "127.0.0.1:1" in job.detail


def test_a_text_that_changed_since_the_job_was_submitted_fails_it(side, model_root):
    (model_root / "moving.txt").write_text((model_root / "text.txt").read_text(), encoding="utf-8")
    source = TextSource(kind="file", name="moving.txt")
    recipe = replace(side.recipe, calibration=replace(side.recipe.calibration, source=source))
    side.submit(recipe, text_identity="1:1")
    job = side.run_one()
    assert (job.state, job.reason) == (JobState.FAILED, "bad_input")
    assert "changed" in job.detail


def test_a_jsonl_object_is_read_by_its_field(side, pull, tmp_path, model_root):
    import json

    text = (model_root / "text.txt").read_text()
    side.submit()
    expected = pull(side.run_one(), tmp_path / "plain")
    side.storage.put_bytes("texts/default/one.jsonl", (json.dumps({"body": text}) + "\n").encode())
    source = TextSource(kind="object", name="texts/default/one.jsonl", text_field="body")
    side.submit(replace(side.recipe, calibration=replace(side.recipe.calibration, source=source)))
    assert shards_of(pull(side.run_one(), tmp_path / "jsonl")) == shards_of(expected)


def test_the_dispatcher_needs_no_gpu_when_its_workers_have_one(side, pull, tmp_path):
    class WorkerWithDevice(LayerWorker):
        """Stands on another machine: what the dispatcher calls cuda is there for it."""

        def do(self, task: Task) -> Completion:
            assert task.run.device == "cuda"
            return super().do(replace(task, run=replace(task.run, device="cpu")))

    side.submit()
    claim = side.store.claim("test", lease_seconds=60)
    executor = LocalExecutor(WorkerWithDevice(side.storage, threads=1))
    side.dispatcher(executor, device="cuda").run_job(claim)
    job = side.store.get(claim.job.id)
    assert job.state is JobState.SUCCEEDED, job.detail


def test_a_try_that_made_progress_starts_the_count_of_tries_again(side):
    class FailingOnce(LayerWorker):
        failed = False

        def do(self, task: Task) -> Completion:
            if task.step.kind == "quantize" and task.step.layer == 2 and task.attempt <= 3 and not self.failed:
                self.failed = task.attempt == 3
                return Completion(task, error="storage is away", kind="transient")
            return super().do(task)

    job = side.submit()
    worker = FailingOnce(side.storage, threads=1)
    for _ in range(2):
        claim = side.store.claim("test", lease_seconds=60)
        assert claim is not None
        side.dispatcher(LocalExecutor(worker)).run_job(claim)
    assert side.store.get(job.id).state is JobState.SUCCEEDED
    retry = next(event for event in side.store.events(job.id) if event.type == "retry_scheduled")
    assert retry.data["detail"].endswith("storage is away")
