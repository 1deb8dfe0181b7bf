"""The job store: the only bridge between the service, which enqueues and watches, and the workers, which claim and run.

One implementation for SQLite and PostgreSQL. Every method is one transaction. Every transition is one guarded UPDATE
and one event in that transaction, and every write of a worker carries the fence of its claim: a worker that lost its
lease, however long it slept, can change nothing.
"""

from infra.job_changes import JobRequests
from infra.job_enqueue import JobEnqueue
from infra.job_layers import JobLayers
from infra.job_model import (
    ACTIVE,
    TERMINAL,
    TRANSITIONS,
    WAITING,
    CardRevision,
    Claim,
    EventType,
    FailureReason,
    Job,
    JobEvent,
    JobKind,
    JobState,
    LayerRow,
    LayerState,
    Measured,
    NewJob,
    StopReason,
    Worker,
)
from infra.job_reads import FailureGroup, JobReads
from infra.job_rows import JobChanges
from infra.job_sweep import JobSweep

__all__ = [
    "ACTIVE",
    "TERMINAL",
    "TRANSITIONS",
    "WAITING",
    "CardRevision",
    "Claim",
    "EventType",
    "FailureGroup",
    "FailureReason",
    "Job",
    "JobChanges",
    "JobEvent",
    "JobKind",
    "JobState",
    "JobStore",
    "LayerRow",
    "LayerState",
    "Measured",
    "NewJob",
    "StopReason",
    "Worker",
]


class JobStore(JobEnqueue, JobRequests, JobSweep, JobLayers, JobReads):
    """Jobs, their layers, their events and the dispatchers that run them."""
