"""Artifacts and their files."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel


class ArtifactFile(BaseModel):
    """One file of an artifact and where to get it."""

    name: str
    sha256: str
    size_bytes: int
    url: str
    """A link that works until expires_at, without the API key, with ranges."""


class ArtifactView(BaseModel):
    """A finished artifact."""

    job_id: str
    fingerprint: str
    size_bytes: int
    expires_at: datetime
    evaluation: dict[str, Any]
    files: list[ArtifactFile]
    """manifest.json is the last."""
