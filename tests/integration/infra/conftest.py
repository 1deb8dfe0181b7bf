"""A job store on each kind of database with a clock that moves only when told."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine

from infra.jobs import Claim, Job, JobStore, LayerRow, Measured, NewJob

LEASE = 60


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * 1000)


class Desk:
    """Shorthand for what most tests do first."""

    lease = LEASE

    def __init__(self, store: JobStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def new_job(self, fingerprint: str = "f", **changes: Any) -> NewJob:
        plain = NewJob(tenant_id="default", kind="quantize", spec={"model": "m"}, fingerprint=fingerprint)
        return replace(plain, **changes)

    def add(self, fingerprint: str = "f", **changes: Any) -> Job:
        job, created = self._store.enqueue(self.new_job(fingerprint, **changes), actor="tester")
        assert created
        return job

    def claim(self, owner: str = "worker") -> Claim:
        taken = self._store.claim(owner, lease_seconds=LEASE)
        assert taken is not None
        return taken

    def lose_lease(self) -> None:
        """Let the one running job's lease expire, and notice it."""
        self._clock.advance(LEASE + 1)
        assert self._store.sweep() == 1

    def event_types(self, job: Job) -> list[str]:
        return [event.type for event in self._store.events(job.id)]

    def finished_layer(self, row: LayerRow, sha256: str = "a" * 64) -> LayerRow:
        return replace(row, key="k", sha256=sha256, size_bytes=5, metrics={"mse": 0.25}, seconds=1.5)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(engine: Engine, clock: Clock) -> JobStore:
    return JobStore(engine, clock)


@pytest.fixture
def desk(store: JobStore, clock: Clock) -> Desk:
    return Desk(store, clock)


def _finished(taken: Claim) -> LayerRow:
    row = LayerRow(job_id=taken.job.id, layer=0, attempt=1, fence=taken.fence)
    return replace(row, key="k", sha256="a" * 64, size_bytes=5)


_MEASURED = Measured(
    fingerprint="f", artifact_job_id=None, settings={}, metrics={"perplexity": 9.0}, parts={}, is_complete=False
)

WORKER_WRITES: dict[str, Callable[[JobStore, Claim], object]] = {
    "heartbeat": lambda store, taken: store.heartbeat(taken, lease_seconds=LEASE),
    "plan": lambda store, taken: store.plan(taken, [0]),
    "start_layer": lambda store, taken: store.start_layer(taken, 0, "node"),
    "commit_layer": lambda store, taken: store.commit_layer(taken, _finished(taken)),
    "fail_layer": lambda store, taken: store.fail_layer(taken, 0, "no"),
    "reopen_layer": lambda store, taken: store.reopen_layer(taken, 0, "no"),
    "progress": lambda store, taken: store.progress(taken, phase="p", done=1, total=2),
    "record_measured": lambda store, taken: store.record_measured(taken, _MEASURED),
    "complete": lambda store, taken: store.complete(taken, {}),
    "fail": lambda store, taken: store.fail(taken, "error", "no"),
    "retry": lambda store, taken: store.fail(taken, "error", "no", retry_in_seconds=1),
    "finish_cancel": lambda store, taken: store.finish_cancel(taken),
    "release": lambda store, taken: store.release(taken),
}


@pytest.fixture(params=sorted(WORKER_WRITES))
def worker_write(request: pytest.FixtureRequest) -> Callable[[JobStore, Claim], object]:
    """Each of the writes that a worker makes under its claim."""
    return WORKER_WRITES[request.param]


@pytest.fixture
def worker_writes() -> dict[str, Callable[[JobStore, Claim], object]]:
    """All writes that a worker makes under its claim, by name."""
    return WORKER_WRITES


@pytest.fixture
def desk_job() -> NewJob:
    """A job to enqueue where a test brings its own store."""
    return NewJob(tenant_id="default", kind="quantize", spec={"model": "m"}, fingerprint="f")
