"""Jobs and their layers."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from duquant.config import DEFAULT_PRESET, preset
from infra.job_model import MAX_LABELS
from infra.schema import DEFAULT_QUEUE
from service.schemas.common import DEFAULT_PRIORITY, Moment, check_text
from service.schemas.evaluations import EvaluationSettings
from service.schemas.models import ModelRequest
from service.schemas.recipes import CalibrationOverrides, RecipeInput

QUEUE_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
QueueName = Annotated[str, Field(pattern=QUEUE_NAME, examples=["default"])]
JobIdText = Annotated[str, Field(pattern=r"^job_[0-9a-z]{1,60}$", examples=["job_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"])]
Labels = Annotated[
    dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,63}$")], Annotated[str, Field(min_length=1, max_length=200)]],
    # pydantic describes the keys that match, and forgets to say that there are no others.
    Field(json_schema_extra={"additionalProperties": False}),
]


class JobRequest(BaseModel):
    """The job to submit."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: ModelRequest
    """The model to quantize."""
    recipe: RecipeInput = Field(default_factory=lambda: preset(DEFAULT_PRESET))
    """A preset's name, or a whole recipe."""
    calibration: CalibrationOverrides | None = None
    """Changes to the recipe's calibration."""
    priority: int = Field(default=DEFAULT_PRIORITY, ge=0, le=1000, strict=True)
    """Lower numbers start first."""
    force: bool = Field(default=False, strict=True)
    """Make the artifact again even if there is one for this model and recipe."""
    queue: QueueName = DEFAULT_QUEUE
    """The queue that it waits in."""
    run_at: Moment | None = None
    """When it may start; left out, at once."""
    deadline_at: Moment | None = None
    """When it fails if it has not ended."""
    depends_on: list[JobIdText] = Field(default=[], max_length=100)
    """Jobs that must succeed first. If one does not, this job fails."""
    evaluate: EvaluationSettings | None = None
    """Measure the artifact when it is made, in a job of its own; left out, nothing is measured."""
    labels: Labels = Field(default={}, max_length=MAX_LABELS, examples=[{"team": "search"}])
    """Words of your own, to find jobs by."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unstorable(cls, value: object) -> object:
        check_text(value)
        return value


class JobChange(BaseModel):
    """What to change: what is left out stays, and null is the same as never having said it (RFC 7396)."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    priority: int | None = Field(default=None, ge=0, le=1000, strict=True)
    """Lower numbers start first; null is the usual 100."""
    run_at: Moment | None = None
    """When it may start; null is at once."""
    deadline_at: Moment | None = None
    """When it fails if it has not ended; null takes the deadline away."""
    queue: QueueName | None = None
    """The queue that it waits in from now on; null is `default`."""
    labels: Annotated[Labels, Field(max_length=MAX_LABELS)] | None = Field(default=None, examples=[{"team": "search"}])
    """All of its labels from now on: those that are left out here are gone. Null is none."""

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
    model: ModelRequest | None
    """Null for the evaluation of an artifact."""
    recipe_name: str
    queue: str
    priority: int
    batch_id: str | None
    """The batch that it was made for and ends with; null as soon as somebody has asked for the same work by itself."""
    labels: dict[str, str]
    created_at: datetime
    run_at: datetime
    """It does not start before."""
    deadline_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    max_attempts: int
    lease_losses: int
    gpu_seconds: float
    """GPU time so far, as it is billed; on a machine without one, the time of the processor."""
    progress: Progress
    fingerprint: str
    """The same for equal models and recipes, as they were asked for; the manifest has one of what was read."""


class JobDetail(JobSummary):
    """A job."""

    recipe: dict[str, Any] | None
    depends_on: list[str]
    artifact_job_id: str | None
    """The job whose artifact it measures; null for other jobs."""
    evaluation_job_ids: list[str]
    """The jobs that measure its artifact, newest first."""
    layers: LayerCounts
    queue_position: int | None
    """1 is next; 1000 is 1000 or farther; null when it is not waiting."""
    eta_seconds: float | None
    """Estimated time left; null while there is nothing to estimate from."""
    result: dict[str, Any] | None
    version: int


class JobSubmitted(JobDetail):
    """A job, and whether it was there before."""

    evaluation_job_id: str | None = None
    """The job that measures the artifact, where the request asked for it."""
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
