"""Real processes that compete for one queue, and one that is killed while it holds a job."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine

from infra.jobs import JobState, JobStore

CLAIMER = """
import json, sys
from infra.database import make_engine
from infra.jobs import JobStore

engine = make_engine(sys.argv[1])
store = JobStore(engine)
sys.stdin.readline()
while (taken := store.claim(sys.argv[2], lease_seconds=60)) is not None:
    store.plan(taken, [0])
    store.start_layer(taken, 0, sys.argv[2])
    store.release(taken) if taken.fence == 1 and taken.job.priority == 1 else store.fail(taken, "error", "done")
    print(json.dumps([taken.job.id, taken.fence]))
engine.dispose()
"""

SLEEPER = """
import sys, time
from infra.database import make_engine
from infra.jobs import JobStore

taken = JobStore(make_engine(sys.argv[1])).claim("doomed", lease_seconds=float(sys.argv[2]))
print(taken.job.id, flush=True)
time.sleep(600)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_four_processes_share_a_queue_without_a_double_claim(desk, engine: Engine, database_url: str) -> None:
    store = JobStore(engine)
    jobs = [
        store.enqueue(desk.new_job(str(number), priority=number % 3), actor="tester")[0].id for number in range(120)
    ]
    processes = [start(CLAIMER, database_url, f"claimer-{number}") for number in range(4)]
    claims: list[tuple[str, int]] = []
    for process in processes:  # all wait for this line, so that they begin together
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        claims += [tuple(json.loads(line)) for line in output.splitlines()]
    released = {job for job, fence in claims if fence == 2}
    assert len(claims) == len(set(claims)) == len(jobs) + len(released)
    assert {job for job, _ in claims} == set(jobs)
    assert store.counts()[JobState.FAILED] == len(jobs)
    for job in jobs:
        fences = [event.data["fence"] for event in store.events(job) if event.type == "claimed"]
        assert fences == list(range(1, len(fences) + 1))


def test_a_killed_workers_job_goes_to_another_when_its_lease_is_over(desk, engine: Engine, database_url: str) -> None:
    store = JobStore(engine)
    store.enqueue(desk.new_job(), actor="tester")
    process = start(SLEEPER, database_url, "0.5")
    assert process.stdout is not None
    job_id = process.stdout.readline().strip()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    while store.sweep() == 0:  # the lease ends by the database's clock
        pass
    taken = store.claim("heir", lease_seconds=60)
    assert taken is not None
    assert (taken.job.id, taken.fence, taken.job.lease_losses) == (job_id, 2, 1)


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.integration)])
def test_processes_that_migrate_at_once_all_succeed(tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}" if kind == "sqlite" else request.getfixturevalue("postgres_url")
    environment = {**os.environ, "DUQUANT_DATABASE_URL": url, "DUQUANT_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-m", "infra.migrate"], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert json.loads(errors.splitlines()[-1])["event"] == "database_migrated"
