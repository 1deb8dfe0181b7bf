"""The bill, and what a project may have."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel


class UsageItem(BaseModel):
    """What was used of one kind."""

    key: str
    """A day (UTC), or the name of a model, recipe or device, or a job's id; empty for a job that is gone."""
    gpu_seconds: float
    jobs: int
    """How many jobs used it."""


class UsageView(BaseModel):
    """GPU time between two times, the most first."""

    since: datetime
    until: datetime
    by: Literal["day", "model", "recipe", "device", "job"]
    gpu_seconds: float
    """All of it, also what is not among the items because there are more than 1000."""
    items: list[UsageItem]


class QuotaItem(BaseModel):
    """One quota."""

    used: int
    limit: int | None
    """Null is no limit."""


class QuotaView(BaseModel):
    """What this project may have, and has."""

    tenant: str
    weight: float
    """Its share of the workers while others wait, too."""
    paused: bool
    """Whether its jobs wait whatever is free."""
    queued: QuotaItem
    """Waiting jobs."""
    running: QuotaItem
    """GPU slots that run at once."""
    bytes: QuotaItem
    """Artifacts that are not deleted, and texts."""
