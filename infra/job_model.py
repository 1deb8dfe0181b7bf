"""What a job is: its states and the one table of allowed transitions, and the records that the job store hands out."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal, Self

from sqlalchemy import RowMapping


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
        """Whether a job in this state never changes again."""
        return not TRANSITIONS[self]


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.BLOCKED: frozenset({JobState.SCHEDULED, JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SCHEDULED: frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.SUCCEEDED, JobState.FAILED, JobState.SCHEDULED, JobState.QUEUED, JobState.CANCELLING}
    ),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}
"""Every edge that exists. A state without successors is terminal."""

ACTIVE = tuple(state for state in JobState if TRANSITIONS[state])
HELD = (JobState.RUNNING, JobState.CANCELLING)
"""States in which a worker holds a lease."""

FailureReason = Literal[
    "error", "bad_input", "retries_exhausted", "lease_losses_exhausted", "deadline", "dependency_failed", "quality_gate"
]
LayerState = Literal["pending", "running", "done", "failed"]


class EventType(StrEnum):
    """What `JobEvent.type` can be. Those that change the job's state carry `from` and `to` in their data."""

    ENQUEUED = "enqueued"
    PROMOTED = "promoted"
    CLAIMED = "claimed"
    CANCEL_REQUESTED = "cancel_requested"
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRY_SCHEDULED = "retry_scheduled"
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
    kind: Literal["quantize", "evaluate"]
    spec: Mapping[str, Any]
    fingerprint: str
    """Two jobs with the same one would give the same artifact."""
    priority: int = 100
    """Smaller runs sooner."""
    max_attempts: int = 3
    """Tries that may end in a transient error before the job fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    @classmethod
    def from_row(cls, row: RowMapping) -> Self:
        """Build the record from a database row; columns that it does not know are left out."""
        return cls(**{item.name: row[item.name] for item in fields(cls)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(_Record):
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
class LayerRow(_Record):
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
class JobEvent(_Record):
    """Something that happened to a job; ids rise in the order of commits within a job."""

    id: int
    job_id: str
    at: int
    type: str
    actor: str
    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker(_Record):
    """A dispatcher that has beaten lately."""

    owner: str
    started_at: int
    beat_at: int
    info: dict[str, Any]
