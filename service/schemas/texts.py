"""Texts that projects upload."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from infra.texts import StoredText
from service.schemas.common import moment


class TextRef(BaseModel):
    """What a job names as its text."""

    kind: Literal["object"] = "object"
    name: str


class TextView(BaseModel):
    """A text that jobs can calibrate and measure on."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    name: str
    """For people."""
    source: TextRef
    """What a recipe's `calibration.source` or an evaluation's `text` is to be."""
    sha256: str
    size_bytes: int
    created_at: datetime


class TextUploaded(TextView):
    """A text that was sent."""

    reused: bool
    """Whether the same bytes were there already under this name."""


class TextPage(BaseModel):
    """A page of texts, newest first."""

    items: list[TextView]
    next_cursor: str | None


def text_view(text: StoredText) -> TextView:
    """Show a text."""
    return TextView(
        id=text.id,
        name=text.name,
        source=TextRef(name=text.key),
        sha256=text.sha256,
        size_bytes=text.size_bytes,
        created_at=moment(text.created_at),
    )
