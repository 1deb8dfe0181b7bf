"""Evaluations: what to measure, and what was measured."""

from dataclasses import asdict
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, model_validator

from duquant.config import TextSource
from duquant.errors import ConfigError
from duquant.evaluation.plan import SpeedConfig, TaskConfig
from infra.artifacts import Evaluation
from infra.fingerprints import evaluation_settings
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


class EvaluationTask(BaseModel):
    """One zero-shot or few-shot task."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    kind: Literal["hub", "file", "object"] = "hub"
    """hub: a task that comes with lm-eval, whose questions are on the Hugging Face hub; file: a task file below the
    server's text roots; object: the source name of an uploaded text, a JSONL file."""
    name: str = Field(min_length=1, max_length=1000, examples=["piqa"])
    """The task's name; or a task file: YAML in lm-eval's format, or JSONL with the fields of PIQA."""
    num_fewshot: StrictInt | None = None
    """Solved examples before each question; null is what the task says, 0 in most."""
    limit: StrictInt | None = None
    """Only so many questions, from the start; null takes all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "object" and not self.name.endswith(".jsonl"):
            raise ConfigError(f"{self.name!r} is no task; an uploaded one is a JSONL text", field="name")
        kind: Literal["hub", "file"] = "hub" if self.kind == "hub" else "file"
        try:
            TaskConfig(kind=kind, name=self.name, num_fewshot=self.num_fewshot, limit=self.limit)
        except ConfigError as error:
            raise ConfigError(str(error), field=str(error.facts["field"]).removeprefix("task.")) from error
        return self


class EvaluationSettings(BaseModel):
    """What to measure: perplexity on consecutive windows from the start of a text, tasks, speed."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    text: Annotated[TextSource, AfterValidator(_check_source)] = Field(
        default_factory=lambda: TextSource(part="evaluation")
    )
    """The text; left out, the held-out half of the built-in one."""
    seq_len: StrictInt = Field(default=2048, ge=8, le=131072)
    """Tokens in a window."""
    windows: StrictInt | None = Field(default=16, ge=1, le=1_000_000)
    """Windows to measure on; null takes the whole text."""
    perplexity: bool = Field(default=True, strict=True)
    """Whether to measure perplexity."""
    tasks: list[EvaluationTask] = Field(default=[], max_length=64)
    """Tasks to measure accuracy on, through lm-eval."""
    speed: SpeedConfig | None = None
    """The kernel benchmark, on the machine that the evaluation runs on; left out, speed is not measured."""

    @model_validator(mode="after")
    def _require_something(self) -> Self:
        if not (self.perplexity or self.tasks or self.speed):
            raise ConfigError("this measures nothing: give perplexity, tasks or speed", field="perplexity")
        # Scores are listed by these names.
        names = [PurePosixPath(task.name).stem if task.kind != "hub" else task.name for task in self.tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two tasks are called {twice!r}", field="tasks")
        return self

    def measured(self) -> dict[str, Any]:
        """Return what is measured, as it stands in the spec of a job."""
        speed = None
        if self.speed is not None:
            speed = {**asdict(self.speed), "decode_batches": list(self.speed.decode_batches)}
        return evaluation_settings(
            self.text,
            seq_len=self.seq_len,
            windows=self.windows,
            perplexity=self.perplexity,
            tasks=[task.model_dump() for task in self.tasks],
            speed=speed,
        )


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


class EvaluationPart(BaseModel):
    """How one part of an evaluation went."""

    state: Literal["done", "failed", "pending"]
    """pending: not measured yet, or never, when the job has ended."""
    error: str | None = None
    """Why it failed."""


class EvaluationView(BaseModel):
    """What was measured."""

    id: str
    job_id: str
    """The job that measured: an evaluate job, or a quantize job with a quality gate."""
    artifact_id: str | None
    """Null for an unquantized model, and for what a job made that failed its quality gate."""
    artifact_job_id: str | None
    """The job that made what was measured; null for an unquantized model."""
    model_name: str
    is_complete: bool
    """Whether every part was measured. A job that failed or still runs has an evaluation of what it measured so far."""
    settings: dict[str, Any] | None
    """What was asked for."""
    metrics: dict[str, Any]
    """perplexity, tokens, windows, seq_len, tokens_per_second; tasks: scores by task; speed: the kernel benchmark;
    seconds, model_bytes and device; more may come."""
    parts: dict[str, EvaluationPart]
    """perplexity, each task as `task NAME`, and speed: those that were asked for."""
    has_report: bool
    """Whether there is a report to read, with tables and plots."""
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
        artifact_job_id=evaluation.artifact_job_id,
        model_name=evaluation.model_name,
        is_complete=evaluation.is_complete,
        settings=evaluation.settings,
        metrics=evaluation.metrics,
        parts={
            name: EvaluationPart(state=part["state"], error=part.get("error"))
            for name, part in (evaluation.parts or {}).items()
        },
        has_report=evaluation.report_key is not None,
        created_at=moment(evaluation.created_at),
    )
