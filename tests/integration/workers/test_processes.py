"""The dispatcher as a process: killed in the middle of a job, started again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.small_disk import SmallDisk, needs_mount
from support.tiny_models import make_tiny_model

from infra.jobs import JobState

pytestmark = pytest.mark.integration

LAYERS = 10


@contextmanager
def dispatcher_process(
    side, s3, log: Path, *, inside: Sequence[str] = (), **changes: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python -m workers` on the side's database and storage; kill it at the end if it still runs."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DUQUANT_")}
    environment = {
        **inherited,
        "DUQUANT_HOME": str(side.settings.home),
        "DUQUANT_DATABASE_URL": side.settings.database_url,
        "DUQUANT_S3_ENDPOINT": s3.endpoint,
        "DUQUANT_S3_BUCKET": side.settings.s3_bucket,
        "DUQUANT_S3_ACCESS_KEY": s3.access_key,
        "DUQUANT_S3_SECRET_KEY": s3.secret_key,
        "DUQUANT_KEY_PEPPER": "unused-here",
        "DUQUANT_MODEL_ROOTS": str(side.settings.model_roots[0]),
        "DUQUANT_TEXT_ROOTS": str(side.settings.text_roots[0]),
        "DUQUANT_THREADS_PER_SLOT": "1",
        "DUQUANT_DEVICE": "cpu",
        "DUQUANT_POLL_SECONDS": "0.1",
        "DUQUANT_LEASE_SECONDS": "3",
        "DUQUANT_BEAT_SECONDS": "0.5",
        **changes,
    }
    with log.open("ab") as stream:
        process = subprocess.Popen([*inside, sys.executable, "-m", "workers"], env=environment, stderr=stream)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_for(what, *, timeout_s: float = 180) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def shards_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def test_kill_9_in_the_middle_of_a_job_costs_no_finished_layer_and_no_bit(side, s3, pull, tmp_path, model_root):
    if not (model_root / "deeper").exists():
        make_tiny_model(model_root / "deeper", num_hidden_layers=LAYERS)
    recipe = replace(side.recipe, transform=replace(side.recipe.transform, greedy_steps=128))
    side.submit(recipe, model="deeper")
    undisturbed = side.run_one()
    assert undisturbed.state is JobState.SUCCEEDED, undisturbed.detail

    job = side.submit(recipe, model="deeper")

    def done() -> dict[int, tuple[int, str]]:
        return {row.layer: (row.fence, row.key) for row in side.store.layers(job.id) if row.state == "done"}

    log = tmp_path / "workers.log"
    with dispatcher_process(side, s3, log) as process:
        wait_for(lambda: len(done()) >= 4)
        process.send_signal(signal.SIGKILL)
        process.wait()
    committed = done()
    assert len(committed) < LAYERS + 1, "the kill came too late to prove anything"
    with dispatcher_process(side, s3, log):
        wait_for(lambda: side.store.get(job.id).state.is_terminal)
    job = side.store.get(job.id)
    assert job.state is JobState.SUCCEEDED, job.detail
    assert job.lease_losses == 1
    assert {layer: entry for layer, entry in done().items() if layer in committed} == committed
    assert shards_of(pull(job, tmp_path / "resumed")) == shards_of(pull(undisturbed, tmp_path / "undisturbed"))


def test_sigterm_gives_the_job_back_and_ends_with_status_0(side, s3, tmp_path, model_root):
    if not (model_root / "deeper").exists():
        make_tiny_model(model_root / "deeper", num_hidden_layers=LAYERS)
    job = side.submit(model="deeper")
    with dispatcher_process(side, s3, tmp_path / "workers.log") as process:
        wait_for(lambda: any(row.state == "done" for row in side.store.layers(job.id)))
        process.terminate()
        assert process.wait(60) == 0
    after = side.store.get(job.id)
    assert after.state in (JobState.QUEUED, JobState.SUCCEEDED)
    assert not side.store.live_workers(3600)


@needs_mount
@pytest.mark.parametrize("is_freed", [True, False])
def test_a_full_disk_is_the_jobs_reason_and_costs_no_finished_layer(side, s3, tmp_path, model_root, is_freed):
    if not (model_root / "deeper").exists():
        make_tiny_model(model_root / "deeper", num_hidden_layers=LAYERS)
    job = side.submit(replace(side.recipe, transform=replace(side.recipe.transform, greedy_steps=128)), model="deeper")

    def done() -> dict[int, tuple[int, str]]:
        return {row.layer: (row.fence, row.key) for row in side.store.layers(job.id) if row.state == "done"}

    def failures() -> list[str]:
        return [event.data["detail"] for event in side.store.events(job.id) if event.type == "retry_scheduled"]

    disk = SmallDisk(tmp_path, "4m")
    changes = {"DUQUANT_WORK_DIR": str(disk.path), "DUQUANT_RETRY_SECONDS": "1"}
    try:
        with dispatcher_process(side, s3, tmp_path / "workers.log", inside=disk.inside(), **changes):
            wait_for(lambda: len(done()) >= 2)
            disk.fill()
            wait_for(failures)
            committed = done()
            if is_freed:
                disk.free()
            wait_for(lambda: side.store.get(job.id).state.is_terminal)
    finally:
        disk.fill()
        disk.free()
    ended = side.store.get(job.id)
    assert all("the disk is full" in detail for detail in failures())
    assert {layer: entry for layer, entry in done().items() if layer in committed} == committed
    if is_freed:
        assert ended.state is JobState.SUCCEEDED, ended.detail
    else:
        assert (ended.state, ended.reason) == (JobState.FAILED, "retries_exhausted")
        assert "the disk is full" in ended.detail
        for _, key in committed.values():
            side.storage.head(key)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"DUQUANT_DATABASE_URL": "postgresql://nobody:secret-word@127.0.0.1:1/none"}, 5, "127.0.0.1"),
        ({"DUQUANT_SLOTS": "none"}, 2, "DUQUANT_SLOTS"),
        ({"DUQUANT_DEVICE": "cuda:9", "DUQUANT_EXECUTOR": "ray", "DUQUANT_RAY_ADDRESS": "127.0.0.1:1"}, 5, "executor"),
    ],
)
def test_a_dispatcher_that_cannot_start_says_so_in_a_line(side, s3, tmp_path, changes, status, words):
    log = tmp_path / "workers.log"
    with dispatcher_process(side, s3, log, **changes) as process:
        assert process.wait(120) == status
    said = log.read_text()
    assert words in said
    assert "Traceback" not in said
    assert "secret-word" not in said
