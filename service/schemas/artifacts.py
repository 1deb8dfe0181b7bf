"""Artifacts: what they are, their files, their tags, and how two of them differ."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from service.schemas.common import Moment
from service.schemas.evaluations import EvaluationView


class ArtifactFile(BaseModel):
    """One file of an artifact and where to get it."""

    name: str
    sha256: str
    size_bytes: int
    url: str
    """A link that works until expires_at, without the API key, with ranges."""


class ArtifactView(BaseModel):
    """The files of a finished artifact."""

    job_id: str
    fingerprint: str
    size_bytes: int
    expires_at: datetime
    """When the links stop working."""
    evaluation: dict[str, Any]
    """What was measured last; empty when nothing was."""
    files: list[ArtifactFile]
    """manifest.json is the last."""


class ArtifactSummary(BaseModel):
    """A finished artifact."""

    id: str
    job_id: str
    model_name: str
    recipe_name: str
    fingerprint: str
    """The same for equal models and recipes, as they were asked for; the manifest has one of what was read."""
    size_bytes: int
    summary: dict[str, Any]
    """Parameters, packed and unpacked bytes, bits per weight."""
    tags: list[str]
    evaluations: list[EvaluationView]
    """What was measured on it, newest first."""
    outdated: Literal["algorithm", "recipe"] | None
    """Why the same request would make another artifact today: a newer algorithm, or a preset that was changed."""
    created_at: datetime
    expires_at: datetime | None
    """When it may be deleted; null is never."""


class ArtifactPage(BaseModel):
    """A page of artifacts, newest first."""

    items: list[ArtifactSummary]
    next_cursor: str | None


class ArtifactChange(BaseModel):
    """What to change."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    expires_at: Moment | None
    """When it may be deleted; null is never."""


class FieldDifference(BaseModel):
    """A value that two artifacts do not share."""

    field: str
    """Its path, such as weight.clip_ratio."""
    a: Any
    b: Any


class FileComparison(BaseModel):
    """The files of two artifacts, by name and sha256."""

    same: int
    changed: list[str]
    only_a: list[str]
    only_b: list[str]


class ArtifactComparison(BaseModel):
    """How two artifacts differ."""

    a: ArtifactSummary
    b: ArtifactSummary
    recipe: list[FieldDifference]
    """Fields of the recipes that differ."""
    measures: list[FieldDifference]
    """Sizes, the time it took to make them, and what was measured on both with the same settings."""
    files: FileComparison
