"""What the API sends, as typed records. Fields that a newer server adds are kept in `raw`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from client.errors import BadInputError

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """A page of a list, newest first."""

    items: tuple[T, ...]
    next_cursor: str | None
    raw: Mapping[str, Any]

    @classmethod
    def of(cls, read: Callable[[Any], T]) -> "Callable[[Any], Page[T]]":
        """Return what reads a page of such items."""
        return lambda raw: cls(items=tuple(map(read, raw["items"])), next_cursor=raw["next_cursor"], raw=raw)


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
    evaluation_job_id: str | None
    raw: Mapping[str, Any]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read the API's JSON."""
        progress, layers, model = raw["progress"], raw.get("layers") or {}, raw.get("model")
        return cls(
            id=raw["id"],
            kind=raw.get("kind", "quantize"),
            state=raw["state"],
            reason=raw.get("reason"),
            detail=raw.get("detail"),
            model=f"{model['source']}:{model['name']}" if model else "",
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
            evaluation_job_id=raw.get("evaluation_job_id"),
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

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read the API's JSON."""
        return cls(items=tuple(Job.from_json(item) for item in raw["items"]), next_cursor=raw["next_cursor"])


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job."""

    id: int
    at: str
    type: str
    actor: str
    data: Mapping[str, Any]
    raw: Mapping[str, Any]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read the API's JSON."""
        return cls(**{name: raw[name] for name in ("id", "at", "type", "actor", "data")}, raw=raw)


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


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured on an artifact, or on an unquantized model."""

    id: str
    job_id: str
    artifact_id: str | None
    model_name: str
    perplexity: float | None
    metrics: Mapping[str, Any]
    raw: Mapping[str, Any]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read the API's JSON."""
        return cls(
            id=raw["id"],
            job_id=raw["job_id"],
            artifact_id=raw["artifact_id"],
            model_name=raw["model_name"],
            perplexity=raw["metrics"].get("perplexity"),
            metrics=raw["metrics"],
            raw=raw,
        )


@dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """What an artifact is."""

    id: str
    job_id: str
    model_name: str
    recipe_name: str
    size_bytes: int
    tags: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    """Newest first."""
    outdated: str | None
    expires_at: str | None
    raw: Mapping[str, Any]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read the API's JSON."""
        names = ("id", "job_id", "model_name", "recipe_name", "size_bytes", "outdated", "expires_at")
        return cls(
            **{name: raw[name] for name in names},
            tags=tuple(raw["tags"]),
            evaluations=tuple(Evaluation.from_json(each) for each in raw["evaluations"]),
            raw=raw,
        )


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many pieces of work are where."""

    total: int
    waiting: int
    running: int
    succeeded: int
    failed: int
    cancelled: int

    @property
    def ended(self) -> int:
        """How many will not change by themselves."""
        return self.succeeded + self.failed + self.cancelled


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch as it stood when it was read."""

    id: str
    name: str
    state: str
    jobs: Counts
    reused: int
    evaluations: Counts
    raw: Mapping[str, Any]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read the API's JSON."""
        names = ("total", "waiting", "running", "succeeded", "failed", "cancelled")
        return cls(
            id=raw["id"],
            name=raw["name"],
            state=raw["state"],
            jobs=Counts(**{name: raw["jobs"][name] for name in names}),
            reused=raw["reused"],
            evaluations=Counts(**{name: raw["evaluations"][name] for name in names}),
            raw=raw,
        )

    @property
    def has_ended(self) -> bool:
        """Whether nothing waits or runs any more."""
        return not any(each.waiting or each.running for each in (self.jobs, self.evaluations))


@dataclass(frozen=True, kw_only=True)
class Requantized:
    """Which artifacts are outdated, and the batch that makes them again."""

    items: tuple[Mapping[str, Any], ...]
    batch: Batch | None
    raw: Mapping[str, Any]

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read the API's JSON."""
        batch = None if raw["batch"] is None else Batch.from_json(raw["batch"])
        return cls(items=tuple(raw["items"]), batch=batch, raw=raw)


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
