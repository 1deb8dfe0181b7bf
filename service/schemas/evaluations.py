"""Evaluations: what to measure, and what was measured."""

from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, model_validator

from duquant.config import TextSource
from infra.artifacts import Evaluation
from service.schemas.common import DEFAULT_PRIORITY, check_text, moment
from service.schemas.models import ModelRequest

ArtifactName = Annotated[
    str, Field(pattern=r"^(art|job)_[0-9a-z]{1,60}$", examples=["art_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"])
]
"""The id of an artifact, or of the job that made it."""


def _check_source(source: TextSource) -> TextSource:
    if source.kind in ("random", "self"):
        raise ValueError(f"a {source.kind} source has no text to measure on")
    return source


class EvaluationSettings(BaseModel):
    """How to measure perplexity: on consecutive windows from the start of a text."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    text: Annotated[TextSource, AfterValidator(_check_source)] = Field(
        default_factory=lambda: TextSource(part="evaluation")
    )
    """The text; left out, the held-out half of the built-in one."""
    seq_len: StrictInt = Field(default=2048, ge=8, le=131072)
    """Tokens in a window."""
    windows: StrictInt | None = Field(default=16, ge=1, le=1_000_000)
    """Windows to measure on; null takes the whole text."""


class EvaluationRequest(EvaluationSettings):
    """The evaluation to submit: of an artifact or of an unquantized model."""

    artifact: ArtifactName | None = None
    """The artifact to measure, by its id or its job's."""
    model: ModelRequest | None = None
    """The unquantized model to measure."""
    priority: int = Field(default=DEFAULT_PRIORITY, ge=0, le=1000, strict=True)
    """Lower numbers start first."""
    force: bool = Field(default=False, strict=True)
    """Measure again even if this was measured already."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unstorable(cls, value: object) -> object:
        check_text(value)
        return value

    @model_validator(mode="after")
    def _require_one(self) -> Self:
        if (self.artifact is None) == (self.model is None):
            raise ValueError("give either artifact or model")
        return self


class EvaluationView(BaseModel):
    """What was measured."""

    id: str
    job_id: str
    artifact_id: str | None
    """Null for an unquantized model."""
    model_name: str
    metrics: dict[str, Any]
    """perplexity, tokens, windows, seq_len, seconds, tokens_per_second, model_bytes and device; more may come."""
    created_at: datetime


class EvaluationPage(BaseModel):
    """A page of evaluations, newest first."""

    items: list[EvaluationView]
    next_cursor: str | None


def evaluation_view(evaluation: Evaluation) -> EvaluationView:
    """Show an evaluation."""
    return EvaluationView(
        id=evaluation.id,
        job_id=evaluation.job_id,
        artifact_id=evaluation.artifact_id,
        model_name=evaluation.model_name,
        metrics=evaluation.metrics,
        created_at=moment(evaluation.created_at),
    )
