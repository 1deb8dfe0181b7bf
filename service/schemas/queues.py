"""Queues, the dispatchers that serve them, and dead letters."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field


class QueueRequest(BaseModel):
    """What a queue is to be like."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    max_running: int | None = Field(default=None, ge=1, le=2**31 - 1, strict=True, examples=[4])
    """GPU slots that its jobs, of all projects, may take at once; null is no limit. One that runs none is paused."""


class QueueView(BaseModel):
    """A queue, this project's jobs in it, and how full it is."""

    name: str
    paused: bool
    """No job of it starts; what runs goes on."""
    max_running: int | None
    """GPU slots that its jobs may take at once; null is no limit."""
    waiting: int
    """This project's jobs whose turn may come any time."""
    running: int
    """This project's jobs that run."""
    busy: int
    """GPU slots that jobs of all projects take in it now: what max_running bounds."""
    oldest_wait_seconds: float | None
    """How long the first of them has waited."""


class QueueList(BaseModel):
    """All queues."""

    items: list[QueueView]


class WorkerView(BaseModel):
    """A dispatcher that has reported within the last minute."""

    name: str
    started_at: datetime
    seen_at: datetime
    executor: str | None
    """local or ray."""
    device: str | None
    slots: int | None
    """Layers that it works on at once."""
    running: int
    """Jobs that it holds."""


class WorkerList(BaseModel):
    """All dispatchers."""

    items: list[WorkerView]


class FailureView(BaseModel):
    """Jobs that failed for the same reason. `GET /v1/jobs?state=failed&reason=...` lists them."""

    kind: str
    reason: str
    count: int
    latest_at: datetime
    latest_job_id: str
    latest_detail: str


class FailureList(BaseModel):
    """Dead letters by kind and reason, the most frequent first."""

    items: list[FailureView]
