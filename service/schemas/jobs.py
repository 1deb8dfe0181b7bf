"""Jobs and their layers."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from duquant.config import DEFAULT_PRESET, preset
from service.schemas.common import check_text
from service.schemas.models import ModelRequest
from service.schemas.recipes import CalibrationOverrides, RecipeInput


class JobRequest(BaseModel):
    """The job to submit."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: ModelRequest
    """The model to quantize."""
    recipe: RecipeInput = Field(default_factory=lambda: preset(DEFAULT_PRESET))
    """A preset's name, or a whole recipe."""
    calibration: CalibrationOverrides | None = None
    """Changes to the recipe's calibration."""
    priority: int = Field(default=100, ge=0, le=1000, strict=True)
    """Lower numbers start first."""
    force: bool = Field(default=False, strict=True)
    """Make the artifact again even if there is one for this model and recipe."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unstorable(cls, value: object) -> object:
        check_text(value)
        return value


class Progress(BaseModel):
    """How far the present phase is."""

    phase: str | None
    done: int
    total: int


class LayerCounts(BaseModel):
    """How many of the job's layers are in each state. The embeddings and the head count as one."""

    total: int
    pending: int
    running: int
    done: int
    failed: int


class JobSummary(BaseModel):
    """A job, as lists show it."""

    id: str
    kind: str
    state: str
    """blocked, scheduled, queued, running, cancelling, succeeded, failed or cancelled; more may come."""
    reason: str | None
    """Why it failed, as a word."""
    detail: str | None
    """Why it failed, in a sentence."""
    model: ModelRequest
    recipe_name: str
    priority: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    max_attempts: int
    lease_losses: int
    progress: Progress
    fingerprint: str
    """The same for equal models and recipes."""


class JobDetail(JobSummary):
    """A job."""

    recipe: dict[str, Any]
    layers: LayerCounts
    queue_position: int | None
    """1 is next; null when it is not waiting."""
    eta_seconds: float | None
    """Estimated time left; null while there is nothing to estimate from."""
    result: dict[str, Any] | None
    version: int


class JobSubmitted(JobDetail):
    """A job, and whether it was there before."""

    reused: bool
    """True when an active or finished job for the same model and recipe was returned and nothing new was started."""


class JobPage(BaseModel):
    """A page of jobs, newest first."""

    items: list[JobSummary]
    next_cursor: str | None
    """Give it back as `cursor` for the next page; null on the last."""


class LayerView(BaseModel):
    """One layer of a job."""

    layer: int
    """Index of the decoder layer; -1 is the shard with embeddings, final norm and head."""
    state: str
    attempt: int
    seconds: float | None
    size_bytes: int | None
    sha256: str | None
    metrics: dict[str, Any]
    node: str | None
    detail: str | None
    """What went wrong, when its last attempt failed."""
    started_at: datetime | None
    finished_at: datetime | None


class LayerList(BaseModel):
    """The layers of a job, in order."""

    items: list[LayerView]
