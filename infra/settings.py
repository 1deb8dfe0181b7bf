"""Settings that every process shares, from DUQUANT_* variables. Each process has one subclass and reads it once."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from infra.errors import SettingsError

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


def _split_paths(value: object) -> object:
    """Take a search path (`/a:/b`) or a JSON list."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [part for part in value.split(os.pathsep) if part]


Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split_paths)]


def _split_words(value: object) -> object:
    """Take words between commas or a JSON list."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [part.strip() for part in value.split(",") if part.strip()]


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_words)]


class DatabaseSettings(BaseSettings):
    """What a process needs to reach the database; the whole settings of `python -m infra.migrate`."""

    model_config = SettingsConfigDict(
        env_prefix="DUQUANT_", extra="ignore", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )

    home: Path = Field(default_factory=lambda: Path.home() / ".local" / "share" / "duquant")
    """Where the embedded database, objects, models and scratch files live."""
    database_url: str = Field(default="", repr=False)
    """SQLAlchemy URL; empty means a SQLite file in `home`."""
    log_level: LogLevel = "INFO"
    """Least severe level that is logged."""
    log_format: Literal["json", "console"] = "json"
    """json: one object a line; console: for a person's eyes."""

    @model_validator(mode="before")
    @classmethod
    def _fill_database_url(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("database_url"):
            default: Any = cls.model_fields["home"].get_default(call_default_factory=True)
            values = {**values, "database_url": f"sqlite:///{Path(values.get('home') or default) / 'duquant.db'}"}
        return values

    @classmethod
    def load(cls) -> Self:
        """Read the environment.

        Raises:
            SettingsError: naming each variable that is missing or malformed, never its value.
        """
        try:
            return cls()
        except ValidationError as error:
            problems = "; ".join(
                f"DUQUANT_{'_'.join(str(part) for part in item['loc']).upper()}: {item['msg']}"
                for item in error.errors(include_input=False, include_url=False)
            )
            raise SettingsError(f"bad settings: {problems}") from None


class StorageSettings(DatabaseSettings):
    """How to reach the object store; with `home`, the whole settings of `python -m infra.embedded`."""

    s3_endpoint: str | None = None
    """URL of the S3 server; none means AWS."""
    s3_region: str = "us-east-1"
    """Region that requests are signed for."""
    s3_bucket: str = "duquant"
    """The one bucket that holds every artifact."""
    s3_access_key: SecretStr
    """S3 access key id."""
    s3_secret_key: SecretStr
    """S3 secret key."""


class InfraSettings(StorageSettings):
    """What the service and the workers share."""

    key_pepper: SecretStr
    """Secret that API keys are hashed with; changing it revokes every key."""
    model_roots: Paths = ()
    """Folders that local models may come from; none means no local models."""
    text_roots: Paths = ()
    """Folders that calibration and evaluation text files may come from."""
    allow_hub: bool = False
    """Whether models may be fetched from the Hugging Face hub."""
    otel_endpoint: str | None = None
    """OpenTelemetry collector that traces go to (OTLP over HTTP), such as http://collector:4318; null is no tracing."""
