"""Models: how a request names one."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


def refuse_text(value: object) -> object:
    """Refuse the way that people write a model on the command line, and say how it is written here.

    Raises:
        ValueError: the value is text.
    """
    if isinstance(value, str):
        raise ValueError(f"send an object, not text: {json.dumps(_object_of(value))}")
    return value


def _object_of(text: str) -> dict[str, Any]:
    """Return the object that a text means, or an example of one.

    >>> _object_of("hub:org/model@0123")
    {'source': 'hub', 'name': 'org/model', 'revision': '0123'}
    >>> _object_of("local:llama*"), _object_of("tag:prod")
    ({'source': 'local', 'prefix': 'llama'}, {'tag': 'prod'})
    """
    source, _, name = text[:400].partition(":")
    match source:
        case "tag" if name:
            return {"tag": name}
        case "demo" | "local" if name:
            return {"source": source, **({"prefix": name[:-1]} if name.endswith("*") else {"name": name})}
        case "hub" if name:
            name, _, revision = name.partition("@")
            return {"source": source, "name": name, "revision": revision or "a full commit hash"}
    return {"source": "demo", "name": "smollm2-135m"}


class ModelRequest(BaseModel):
    """The model to quantize. Local models are names below the server's model roots, never paths."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    source: Literal["demo", "local", "hub"]
    """demo: the model that comes with the demo; local: a folder below a model root; hub: a Hugging Face repository."""
    name: str = Field(min_length=1, max_length=300, examples=["smollm2-135m"])
    """smollm2-135m, the folder's name, or owner/repository."""
    revision: str | None = Field(default=None, max_length=100)
    """A full commit hash; needed for hub models and unused for the rest."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_text(cls, value: object) -> object:
        return refuse_text(value)


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
