"""What the API sends, as typed records. Fields that a newer server adds are kept in `raw`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from client.errors import BadInputError

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it stood when it was read."""

    id: str
    kind: str
    state: str
    reason: str | None
    detail: str | None
    model: str
    recipe_name: str
    phase: str | None
    done: int
    total: int
    layers_done: int
    layers_total: int
    eta_seconds: float | None
    queue_position: int | None
    result: Mapping[str, Any] | None
    reused: bool
    raw: Mapping[str, Any]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read the API's JSON."""
        progress, layers, model = raw["progress"], raw.get("layers") or {}, raw["model"]
        return cls(
            id=raw["id"],
            kind=raw.get("kind", "quantize"),
            state=raw["state"],
            reason=raw.get("reason"),
            detail=raw.get("detail"),
            model=f"{model['source']}:{model['name']}",
            recipe_name=raw["recipe_name"],
            phase=progress["phase"],
            done=progress["done"],
            total=progress["total"],
            layers_done=layers.get("done", 0),
            layers_total=layers.get("total", 0),
            eta_seconds=raw.get("eta_seconds"),
            queue_position=raw.get("queue_position"),
            result=raw.get("result"),
            reused=raw.get("reused", False),
            raw=raw,
        )

    @property
    def has_ended(self) -> bool:
        """Whether the job will never change again."""
        return self.state in TERMINAL


@dataclass(frozen=True, kw_only=True)
class JobPage:
    """A page of jobs, newest first."""

    items: tuple[Job, ...]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job."""

    id: int
    at: str
    type: str
    actor: str
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ArtifactFile:
    """One file of an artifact."""

    name: str
    sha256: str
    size_bytes: int
    url: str


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A finished artifact."""

    job_id: str
    fingerprint: str
    size_bytes: int
    files: tuple[ArtifactFile, ...]
    evaluation: Mapping[str, Any]
    raw: Mapping[str, Any]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read the API's JSON."""
        names = ("name", "sha256", "size_bytes", "url")
        return cls(
            job_id=raw["job_id"],
            fingerprint=raw["fingerprint"],
            size_bytes=raw["size_bytes"],
            files=tuple(ArtifactFile(**{name: item[name] for name in names}) for item in raw["files"]),
            evaluation=raw.get("evaluation", {}),
            raw=raw,
        )


def parse_model(text: str) -> dict[str, str | None]:
    """Read a model reference: `demo:NAME`, `local:NAME` or `hub:OWNER/NAME@COMMIT`.

    >>> parse_model("hub:org/model@0123")
    {'source': 'hub', 'name': 'org/model', 'revision': '0123'}

    Raises:
        BadInputError: it is none of these.
    """
    source, colon, name = text.partition(":")
    if not colon or source not in ("demo", "local", "hub") or not name:
        raise BadInputError(f"{text!r} is no model; write demo:NAME, local:NAME or hub:OWNER/NAME@COMMIT")
    revision = None
    if source == "hub":
        name, _, commit = name.partition("@")
        revision = commit or None
    return {"source": source, "name": name, "revision": revision}
