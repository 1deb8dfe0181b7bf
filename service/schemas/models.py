"""Models: how a request names one."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ModelRequest(BaseModel):
    """The model to quantize. Local models are names below the server's model roots, never paths."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    source: Literal["demo", "local", "hub"]
    """demo: the model that comes with the demo; local: a folder below a model root; hub: a Hugging Face repository."""
    name: str = Field(min_length=1, max_length=300, examples=["smollm2-135m"])
    """smollm2-135m, the folder's name, or owner/repository."""
    revision: str | None = Field(default=None, max_length=100)
    """A full commit hash; needed for hub models and unused for the rest."""


class ModelView(BaseModel):
    """A model that a job may name."""

    source: Literal["demo", "local", "hub"]
    name: str
    architecture: str | None
    """The model_type of its config.json, such as llama."""
    layers: int | None
    """Decoder layers."""
    hidden_size: int | None
    size_bytes: int | None
    """Of its weights, as they are stored; these are null for models that are fetched when they are needed."""


class ModelList(BaseModel):
    """The models that this server has at hand."""

    items: list[ModelView]
    allows_hub: bool
    """Whether a job may name any repository of the Hugging Face hub, too."""
