"""Batches: models times recipes in one request."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from duquant.config import DEFAULT_PRESET, preset
from infra.schema import DEFAULT_QUEUE
from service.schemas.common import DEFAULT_PRIORITY, check_text
from service.schemas.evaluations import EvaluationSettings
from service.schemas.jobs import QueueName
from service.schemas.models import ModelRequest
from service.schemas.recipes import CalibrationOverrides, RecipeInput

TAG = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
TAG_PATTERN = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,98})?[A-Za-z0-9*._-]$"


class ModelPrefix(BaseModel):
    """All models that the server has from one source and whose names begin like this."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    source: Literal["demo", "local"]
    """Where they come from. Hub models are named one by one, each with its commit."""
    prefix: str = Field(max_length=300, examples=["llama/"])
    """How their names begin; empty takes all."""


class ModelTag(BaseModel):
    """The models that artifacts with a tag were made from."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    tag: str = Field(pattern=TAG_PATTERN, examples=["prod-*"])
    """A tag, or with * at its end the beginning of tags."""


def _kind(value: object) -> str:
    given = value if isinstance(value, dict) else value.__dict__ if isinstance(value, BaseModel) else {}
    # With a mark that errors lose again: it is no field of the request.
    return next((f"union:{name}" for name in ("tag", "prefix") if name in given), "union:name")


ModelSelector = Annotated[
    Annotated[ModelRequest, Tag("union:name")]
    | Annotated[ModelPrefix, Tag("union:prefix")]
    | Annotated[ModelTag, Tag("union:tag")],
    Discriminator(_kind),
]


class BatchEvaluation(EvaluationSettings):
    """How to measure what the batch makes."""

    baseline: bool = Field(default=False, strict=True)
    """Whether to measure each unquantized model, too."""


class _BatchOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str = Field(default="", max_length=200, examples=["zoo"])
    """A name for people."""
    evaluate: BatchEvaluation | None = None
    """Measure perplexity of every artifact; left out, nothing is measured."""
    priority: int = Field(default=DEFAULT_PRIORITY, ge=0, le=1000, strict=True)
    """Lower numbers start first."""
    queue: QueueName = DEFAULT_QUEUE
    """The queue that the jobs wait in."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unstorable(cls, value: object) -> object:
        check_text(value)
        return value


class BatchRequest(_BatchOptions):
    """The batch to submit: every model with every recipe."""

    models: list[ModelSelector] = Field(min_length=1, max_length=500)
    """Models by name, by the beginning of their names, or by the tags of their artifacts."""
    recipes: list[RecipeInput] = Field(default_factory=lambda: [preset(DEFAULT_PRESET)], min_length=1, max_length=100)
    """Names of presets, or whole recipes."""
    calibration: CalibrationOverrides | None = None
    """Changes to the calibration of every recipe."""
    force: bool = Field(default=False, strict=True)
    """Make every artifact again, also those that are there."""


class RequantizeRequest(_BatchOptions):
    """Which artifacts to make again: those that the same request would make otherwise today."""

    model: str | None = Field(default=None, min_length=1, max_length=400)
    """Only artifacts of the model with this name."""
    recipe: str | None = Field(default=None, min_length=1, max_length=200)
    """Only artifacts made with the recipe of this name."""
    tag: str | None = Field(default=None, pattern=TAG_PATTERN)
    """Only artifacts with this tag; with * at its end, the beginning of tags."""
    dry_run: bool = Field(default=False, strict=True)
    """Only say which artifacts that would be."""


class WorkCounts(BaseModel):
    """How many pieces of work of one kind are where."""

    total: int
    waiting: int
    """blocked, scheduled or queued."""
    running: int
    """running or cancelling."""
    succeeded: int
    failed: int
    """Also those that were refused from the start."""
    refused: int
    """Of the failed ones, those that were refused and have no job: a retry leaves them, and the table says why."""
    cancelled: int


class BatchView(BaseModel):
    """A batch and how far it is."""

    id: str
    name: str
    state: str
    """running, succeeded, partial (it has ended, and not all has succeeded), failed or cancelled; more may come."""
    jobs: WorkCounts
    """The quantizations."""
    reused: int
    """Quantizations that were there already."""
    evaluations: WorkCounts
    created_at: datetime
    cancelled_at: datetime | None
    finished_at: datetime | None
    """When it was noticed, some seconds later, that nothing of it waits or runs any more."""
    request: dict[str, Any]
    """What was asked for."""


class BatchPage(BaseModel):
    """A page of batches, newest first."""

    items: list[BatchView]
    next_cursor: str | None


class OutdatedArtifact(BaseModel):
    """An artifact that the same request would make otherwise today."""

    artifact_id: str
    model_name: str
    recipe_name: str
    reason: Literal["algorithm", "recipe"]
    """What has changed since: the algorithm, or the preset."""


class Requantized(BaseModel):
    """What is made again, and the batch that does it."""

    items: list[OutdatedArtifact]
    batch: BatchView | None
    """Null for a dry run, and when nothing is outdated."""


class BatchRow(BaseModel):
    """One model with one recipe."""

    model_name: str
    recipe_name: str
    """unquantized for the model as it is."""
    state: str
    """The state of its job, or refused."""
    reason: str | None
    detail: str | None
    job_id: str | None
    reused: bool
    artifact_id: str | None
    size_bytes: int | None
    """Of the artifact; for an unquantized model, of its parameters."""
    size_ratio: float | None
    """Of the size of the unquantized model in 16 bits."""
    seconds: float | None
    """Time that the quantization took, summed over the layers."""
    perplexity: float | None
    perplexity_ratio: float | None
    """Perplexity by that of the unquantized model, where the batch has measured it."""
    tokens_per_second: float | None
    """Speed of the evaluation, where it ran."""
    evaluation_state: str | None
    """The state of the evaluation's job; null when there is none."""
    evaluation_job_id: str | None
    evaluation_reason: str | None
    """Why the evaluation failed, as a word."""
    evaluation_detail: str | None
    """Why the evaluation failed, in a sentence."""


class BatchTable(BaseModel):
    """The batch as a table, in the order of the request."""

    rows: list[BatchRow]
