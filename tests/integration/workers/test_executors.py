"""The same job on the local executor, on one Ray worker and on two: the same bytes."""

import os
import signal
from dataclasses import replace

import pytest

from infra.jobs import JobState
from workers.executors.on_ray import RayExecutor

pytestmark = pytest.mark.integration


@pytest.fixture
def ray_environment(s3, object_store, monkeypatch):
    """What a Ray worker process reads its storage settings from."""
    monkeypatch.setenv("DUQUANT_S3_ENDPOINT", s3.endpoint)
    monkeypatch.setenv("DUQUANT_S3_BUCKET", object_store.bucket)
    monkeypatch.setenv("DUQUANT_S3_ACCESS_KEY", s3.access_key)
    monkeypatch.setenv("DUQUANT_S3_SECRET_KEY", s3.secret_key)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # ray.init replaces the handler and does not put it back.
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def shards_of(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_local_one_ray_worker_and_two_give_equal_shards_of_layers_and_chains_and_a_killed_worker_is_replaced(
    side, pull, tmp_path, ray_environment
):
    side.submit()
    made = side.run_one()
    expected = shards_of(pull(made, tmp_path / "local"))
    chains = replace(side.recipe, input_mode="staged:2", refine_passes=1)
    side.submit(chains)
    expected_of_chains = shards_of(pull(side.run_one(), tmp_path / "local-chains"))
    side.submit_evaluation(made)
    here = side.run_one()
    for slots in (1, 2):
        executor = RayExecutor(slots=slots, threads_per_slot=1, gpus_per_slot=0.0, address=None)
        try:
            side.submit()
            job = side.run_one(executor)
            assert job.state is JobState.SUCCEEDED, job.detail
            assert shards_of(pull(job, tmp_path / f"ray-{slots}")) == expected
            side.submit(chains)
            job_of_chains = side.run_one(executor)
            assert job_of_chains.state is JobState.SUCCEEDED, job_of_chains.detail
            assert shards_of(pull(job_of_chains, tmp_path / f"ray-{slots}-chains")) == expected_of_chains
            if slots == 1:
                side.submit_evaluation(job)
                measured = side.run_one(executor)
                assert measured.state is JobState.SUCCEEDED, measured.detail
                assert measured.result["metrics"]["perplexity"] == here.result["metrics"]["perplexity"]
            if slots == 2:
                side.submit()
                _kill_an_actor(executor)
                job = side.run_one(executor)
                assert job.state is JobState.SUCCEEDED, job.detail
                assert shards_of(pull(job, tmp_path / "ray-killed")) == expected
        finally:
            executor.close()


def _kill_an_actor(executor: RayExecutor) -> None:
    """Kill -9 the process of one actor, as the kernel does when memory runs out."""
    import ray

    pid = ray.get(executor._actors[0].__ray_call__.remote(lambda _self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
