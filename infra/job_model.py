"""What a job is: its states and the one table of allowed transitions, and the records that the job store hands out."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal, Self, TypeVar

from sqlalchemy import ColumnElement, RowMapping

from infra.schema import DEFAULT_QUEUE

MAX_LABELS = 20
"""Of one job."""


class JobState(StrEnum):
    """Where a job stands."""

    BLOCKED = "blocked"
    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether a job in this state has ended. Only a `retry` that somebody asks for can start it again."""
        return self in TERMINAL


_WAITING = frozenset({JobState.BLOCKED, JobState.SCHEDULED, JobState.QUEUED})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.BLOCKED: frozenset({JobState.SCHEDULED, JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SCHEDULED: frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.SCHEDULED, JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.SUCCEEDED, JobState.FAILED, JobState.SCHEDULED, JobState.QUEUED, JobState.CANCELLING}
    ),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    # A retry: the same job goes on from its finished layers.
    JobState.FAILED: _WAITING,
    JobState.CANCELLED: _WAITING,
}
"""Every edge that exists."""

TERMINAL = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)
ACTIVE = tuple(state for state in JobState if state not in TERMINAL)
WAITING = tuple(state for state in JobState if state in _WAITING)
"""States in which a job counts against its tenant's `max_queued`."""
HELD = (JobState.RUNNING, JobState.CANCELLING)
"""States in which a worker holds a lease."""

AGEING_MS = 60_000
"""How long a job has to wait to gain one point of priority over newer ones."""

_When = TypeVar("_When", int, ColumnElement[int])


def turn_at(run_at: _When, priority: int) -> _When:
    """Return a job's place in its tenant's queue; smaller comes sooner.

    Ageing needs no clock here: a job that may run a minute earlier stands one point of priority better for ever, so the
    order of two waiting jobs never changes and a stream of urgent ones cannot starve the rest.
    """
    return run_at + priority * AGEING_MS


FailureReason = Literal[
    "error", "bad_input", "retries_exhausted", "lease_losses_exhausted", "deadline", "dependency_failed", "quality_gate"
]
StopReason = Literal["cancel", "deadline"]
"""Why a beat asks the worker to stop."""
JobKind = Literal["quantize", "evaluate"]
LayerState = Literal["pending", "running", "done", "failed"]


class EventType(StrEnum):
    """What `JobEvent.type` can be. Those that change the job's state carry `from` and `to` in their data."""

    ENQUEUED = "enqueued"
    UNBLOCKED = "unblocked"
    PROMOTED = "promoted"
    CLAIMED = "claimed"
    CANCEL_REQUESTED = "cancel_requested"
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRY_SCHEDULED = "retry_scheduled"
    RETRIED = "retried"
    CHANGED = "changed"
    RELEASED = "released"
    LEASE_LOST = "lease_lost"
    PLANNED = "planned"
    PROGRESS = "progress"
    LAYER_STARTED = "layer_started"
    LAYER_DONE = "layer_done"
    LAYER_FAILED = "layer_failed"
    LAYER_REOPENED = "layer_reopened"


@dataclass(frozen=True, kw_only=True, slots=True)
class NewJob:
    """A job to enqueue."""

    tenant_id: str
    kind: JobKind
    spec: Mapping[str, Any]
    fingerprint: str
    """Two jobs with the same one would give the same artifact."""
    priority: int = 100
    """Smaller runs sooner, among the jobs of its tenant."""
    max_attempts: int = 3
    """Tries that may end in a transient error before the job fails."""
    queue: str = DEFAULT_QUEUE
    run_at: int | None = None
    """Not to be started before this time (ms since 1970); none means at once."""
    deadline_at: int | None = None
    """When a job that has not ended fails."""
    depends_on: Sequence[str] = ()
    """Jobs of the same tenant that must succeed first; if one does not, this job fails."""
    gpus: int = 1
    """GPU slots that it takes while it runs."""
    model_name: str = ""
    recipe_name: str = ""
    batch_id: str | None = None
    labels: Mapping[str, str] | None = None
    traceparent: str | None = None
    """W3C trace context of the request that made it."""


@functools.cache
def _names(record: type["Record"]) -> tuple[str, ...]:
    return tuple(item.name for item in fields(record))


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A row of the database, or a part of one."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any] | RowMapping) -> Self:
        """Build the record from a database row; columns that it does not know are left out."""
        return cls(**{name: row[name] for name in _names(cls)})  # type: ignore[arg-type]  # a class is hashable; mypy doubts Self


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(Record):
    """A job as it stood when it was read."""

    id: str
    tenant_id: str
    kind: str
    state: JobState
    reason: str | None
    """Why it failed, or why the last try did while it waits for the next."""
    detail: str | None
    spec: dict[str, Any]
    fingerprint: str
    priority: int
    created_at: int
    run_at: int
    started_at: int | None
    finished_at: int | None
    attempt: int
    """The running try, or the tries that ended in an error; one that ends with its lease is given back."""
    max_attempts: int
    lease_losses: int
    """Tries whose worker vanished, counted apart from errors: a job that kills its workers must stop some day."""
    max_lease_losses: int
    lease_owner: str | None
    lease_until: int | None
    fence: int
    """Rises with every claim."""
    queue: str
    batch_id: str | None
    deadline_at: int | None
    gpus: int
    gpu_ms: int
    """GPU time of the layers it has finished."""
    model_name: str
    recipe_name: str
    labels: dict[str, str] | None
    traceparent: str | None
    phase: str
    progress_done: int
    progress_total: int
    result: dict[str, Any] | None
    version: int
    """Rises with every change that a reader can see."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", JobState(self.state))


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The right to run a job for as long as its lease is beaten."""

    job: Job
    fence: int
    owner: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a job has measured so far, of an artifact or of an unquantized model."""

    fingerprint: str
    """Of what is measured and how (infra.fingerprints)."""
    artifact_job_id: str | None
    """The job that made what is measured; none for an unquantized model."""
    settings: Mapping[str, Any]
    """What was asked for."""
    metrics: Mapping[str, Any]
    """The numbers of the parts that are done."""
    parts: Mapping[str, Mapping[str, Any]]
    """How each part went: {name: {"state": "done", "failed" or "pending", "error": ...}}."""
    is_complete: bool
    report_key: str | None = None
    """Object with the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardRevision:
    """A new model card of an artifact: stored, and to be the artifact's from the moment that its numbers are rows."""

    artifact_id: str
    replaces: str
    """Key of the manifest that it was made from; another one means that somebody was faster."""
    manifest_key: str
    size_bytes: int
    """Of the whole artifact, without its manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRow(Record):
    """One layer of a job; layer -1 is the shard of the embeddings, the final norm and the head."""

    job_id: str
    layer: int
    state: LayerState = "pending"
    attempt: int = 0
    fence: int = 0
    key: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    node: str | None = None
    detail: str | None = None
    started_at: int | None = None
    finished_at: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEvent(Record):
    """Something that happened to a job; ids rise in the order of commits within a job."""

    id: int
    job_id: str
    at: int
    type: str
    actor: str
    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker(Record):
    """A dispatcher that has beaten lately."""

    owner: str
    started_at: int
    beat_at: int
    info: dict[str, Any]
