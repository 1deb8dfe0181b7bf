"""What probes and operators read."""

from typing import Literal

from pydantic import BaseModel


class Check(BaseModel):
    """Whether one part works."""

    ok: bool
    detail: str


class Readiness(BaseModel):
    """Whether the service can do its work, part by part."""

    ready: bool
    checks: dict[str, Check]


class Health(BaseModel):
    """The process is up."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """What is running."""

    version: str
    algorithm_version: int
    python: str
