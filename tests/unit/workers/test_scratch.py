from dataclasses import replace
from pathlib import Path

import pytest

from infra.jobs import Claim, Job, JobState
from workers.scratch import Scratch

JOB = Job(
    id="job_1", tenant_id="default", kind="quantize", state=JobState.RUNNING, reason=None, detail=None, spec={},
    fingerprint="f", priority=1, created_at=0, run_at=0, started_at=0, finished_at=None, attempt=1, max_attempts=3,
    lease_losses=0, max_lease_losses=3, lease_owner="a", lease_until=1, fence=1, phase="", progress_done=0,
    progress_total=0, result=None, version=1, queue="default", batch_id=None, deadline_at=None, gpus=1, gpu_ms=0,
    model_name="m", recipe_name="r", labels=None, traceparent=None,
)  # fmt: skip


def claim(fence: int) -> Claim:
    return Claim(job=replace(JOB, fence=fence), fence=fence, owner="a")


def test_a_new_claim_inherits_the_files_and_shuts_the_old_one_out(tmp_path: Path):
    scratch = Scratch(tmp_path)
    old = scratch.take(claim(1))
    (old / "boundary").write_text("kept")
    new = scratch.take(claim(2))
    assert (new / "boundary").read_text() == "kept"
    with pytest.raises(FileNotFoundError):
        (old / "late").write_text("a zombie's")


def test_taking_twice_with_one_fence_gives_the_same_directory(tmp_path: Path):
    scratch = Scratch(tmp_path)
    assert scratch.take(claim(3)) == scratch.take(claim(3))


def test_cleaning_spares_active_jobs(tmp_path: Path):
    scratch = Scratch(tmp_path)
    kept = scratch.take(claim(1))
    gone = tmp_path / "job_2.7"
    gone.mkdir()
    scratch.clean({"job_1"})
    assert kept.exists()
    assert not gone.exists()
    scratch.drop("job_1")
    assert not kept.exists()
