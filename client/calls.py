"""Every call of the API as a value: what to send, and how to read the answer. The clients only carry them out.

Building a call does no I/O, so the same calls serve the blocking client and the asynchronous one.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from client.errors import BadInputError
from client.models import Artifact, ArtifactInfo, Batch, Evaluation, Event, Job, JobPage, Page, Requantized, parse_model

T = TypeVar("T")
Model = str | Mapping[str, Any]
"""demo:NAME, local:NAME or hub:OWNER/NAME@COMMIT, or the API's own object."""
Recipe = str | Mapping[str, Any]
"""A preset's name, or an object of recipe fields."""
Settings = Mapping[str, Any]
"""text, seq_len, windows, perplexity, tasks and speed of an evaluation; what is left out has the service's default."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is sent."""

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    file: Path | None = None
    """What is sent in the place of a body of JSON."""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Call(Request, Generic[T]):
    """A request that is answered with JSON."""

    read: Callable[[Any], T]
    """Turns the answer's JSON into a record."""
    statuses: frozenset[int] = frozenset()
    """Statuses that are no errors here, besides those from 200 to 299."""


@dataclass(frozen=True, kw_only=True)
class Stream(Request, Generic[T]):
    """A request that is answered with server-sent events."""

    read: Callable[[Any], T]
    """Turns the data of one event into a record."""


def _get(path: str, read: Callable[[Any], T], **params: Any) -> Call[T]:
    given = {name: value for name, value in params.items() if value is not None}
    return Call(method="GET", path=path, read=read, params=given)


def _post(path: str, read: Callable[[Any], T], body: Any = None, *, key: str | None = None) -> Call[T]:
    # One key for all tries of this call: sent again after a broken connection it is still done once.
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    return Call(method="POST", path=path, read=read, body=body, headers=headers)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def segment(name: str, what: str = "job id", example: str = "job_0199a1b2...") -> str:
    """Return an id that is to become a part of a path.

    Raises:
        BadInputError: it would change the path.
    """
    if not name or not name.replace("_", "").isalnum() or not name.isascii():
        raise BadInputError(f"{name!r} is no {what}; one looks like {example}")
    return name


def _artifact(name: str) -> str:
    return _of_kinds(name, "artifact", "art_")


def _of_kinds(name: str, what: str, prefix: str) -> str:
    """Return the id of such a thing, or of the job that has made it."""
    segment(name, f"{what} id", f"{prefix}0199a1b2...")
    if not name.startswith((prefix, "job_")):
        raise BadInputError(f"{name!r} is no {what}; give its id ({prefix}...) or that of its job (job_...)")
    return name


def _tag(name: str) -> str:
    if not name.isascii() or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise BadInputError(f"{name!r} is no tag; it has letters, digits, dots, dashes and underscores")
    return name


def model_body(model: Model) -> dict[str, Any]:
    """Return the API's form of a model."""
    return parse_model(model) if isinstance(model, str) else dict(model)


def submit_job(
    model: Model,
    recipe: Recipe | None = None,
    *,
    calibration: Mapping[str, Any] | None = None,
    evaluate: Settings | None = None,
    priority: int | None = None,
    force: bool = False,
    **options: Any,
) -> Call[Job]:
    """Submit a job; `options` are further fields: queue, run_at, deadline_at, depends_on, labels."""
    optional = _given(recipe=recipe, calibration=calibration, evaluate=evaluate, priority=priority, **options)
    return _post("/v1/jobs", Job.from_json, {"model": model_body(model), "force": force, **optional})


def get_job(job_id: str, *, hold_s: int = 0) -> Call[Job]:
    """Read a job; with `hold_s` when it has ended, or after so many seconds."""
    headers = {"Prefer": f"wait={hold_s}"} if hold_s else {}
    return Call(method="GET", path=f"/v1/jobs/{segment(job_id)}", read=Job.from_json, headers=headers)


def list_jobs(**filters: Any) -> Call[JobPage]:
    """Read a page of jobs; filters as in the API: state, kind, model, recipe, queue, batch, reason, label, ..."""
    return _get("/v1/jobs", JobPage.from_json, **filters)


def change_job(job_id: str, *, version: int | None = None, **changes: Any) -> Call[Job]:
    """Change a job's priority, run_at or deadline_at; null is what it is when nobody says it.

    With `version`, as a job has it in `raw`, only if nobody has changed it since: another version is a 412.
    """
    headers = {} if version is None else {"If-Match": f'"{version}"'}
    path = f"/v1/jobs/{segment(job_id)}"
    return Call(method="PATCH", path=path, read=Job.from_json, body=changes, headers=headers)


def cancel_job(job_id: str) -> Call[Job]:
    """Cancel a job."""
    return _post(f"/v1/jobs/{segment(job_id)}:cancel", Job.from_json)


def retry_job(job_id: str) -> Call[Job]:
    """Run a failed or cancelled job again."""
    return _post(f"/v1/jobs/{segment(job_id)}:retry", Job.from_json)


def estimate_job(
    model: Model, recipe: Recipe | None = None, *, calibration: Mapping[str, Any] | None = None
) -> Call[Any]:
    """Ask what a job would take."""
    body = {"model": model_body(model), **_given(recipe=recipe, calibration=calibration)}
    return _post("/v1/estimates", _same, body)


def list_layers(job_id: str) -> Call[Any]:
    """Read a job's layers."""
    return _get(f"/v1/jobs/{segment(job_id)}/layers", _items)


def follow_job(job_id: str, *, after: int = 0) -> Stream[Event]:
    """Follow a job's events, from the one after `after`, until it has ended."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(after)} if after else {})
    return Stream(method="GET", path=f"/v1/jobs/{segment(job_id)}/events", read=Event.from_json, headers=headers)


def artifact_files(name: str) -> Call[Artifact]:
    """Read an artifact's files, by its id or its job's, with fresh links."""
    if name.startswith("art_"):
        return _get(f"/v1/artifacts/{_artifact(name)}/files", Artifact.from_json)
    return _get(f"/v1/jobs/{_artifact(name)}/artifact", Artifact.from_json)


def get_artifact(name: str) -> Call[ArtifactInfo]:
    """Read an artifact."""
    return _get(f"/v1/artifacts/{_artifact(name)}", ArtifactInfo.from_json)


def list_artifacts(**filters: Any) -> Call[Page[ArtifactInfo]]:
    """Read a page of artifacts; filters as in the API: model, recipe, tag, created_from, created_until."""
    return _get("/v1/artifacts", Page.of(ArtifactInfo.from_json), **filters)


def compare_artifacts(a: str, b: str) -> Call[Any]:
    """Read how two artifacts differ."""
    return _get(f"/v1/artifacts/{_artifact(a)}/comparison", _same, **{"with": _artifact(b)})


def tag_artifact(name: str, tag: str) -> Call[ArtifactInfo]:
    """Give an artifact a tag."""
    path = f"/v1/artifacts/{_artifact(name)}/tags/{_tag(tag)}"
    return Call(method="PUT", path=path, read=ArtifactInfo.from_json)


def untag_artifact(name: str, tag: str) -> Call[ArtifactInfo]:
    """Take a tag away."""
    path = f"/v1/artifacts/{_artifact(name)}/tags/{_tag(tag)}"
    return Call(method="DELETE", path=path, read=ArtifactInfo.from_json)


def keep_artifact(name: str, until: str | None) -> Call[ArtifactInfo]:
    """Say when an artifact may be deleted (RFC 3339); none is never."""
    path = f"/v1/artifacts/{_artifact(name)}"
    return Call(method="PATCH", path=path, read=ArtifactInfo.from_json, body={"expires_at": until})


def delete_artifact(name: str, *, force: bool = False) -> Call[None]:
    """Delete an artifact; one with tags only with `force`."""
    path = f"/v1/artifacts/{_artifact(name)}"
    return Call(method="DELETE", path=path, read=lambda _: None, params={"force": str(force).lower()})


def submit_evaluation(
    artifact: str | None = None, *, model: Model | None = None, force: bool = False, **settings: Any
) -> Call[Job]:
    """Measure an artifact or a model; settings: text, seq_len, windows, perplexity, tasks, speed, priority."""
    if (artifact is None) == (model is None):
        raise BadInputError("give either an artifact or a model to measure")
    what = {"artifact": artifact} if model is None else {"model": model_body(model)}
    return _post("/v1/evaluations", Job.from_json, {**what, "force": force, **settings})


def get_evaluation(name: str) -> Call[Evaluation]:
    """Read what was measured, by the evaluation's id or its job's."""
    return _get(f"/v1/evaluations/{_of_kinds(name, 'evaluation', 'eval_')}", Evaluation.from_json)


def evaluation_report(name: str) -> Request:
    """Ask for the report on an evaluation, by the evaluation's id or its job's; the answer leads on to a link."""
    return Request(method="GET", path=f"/v1/evaluations/{_of_kinds(name, 'evaluation', 'eval_')}/report")


def list_evaluations(**filters: Any) -> Call[Page[Evaluation]]:
    """Read a page of evaluations; filters as in the API: artifact, model."""
    return _get("/v1/evaluations", Page.of(Evaluation.from_json), **filters)


def submit_batch(
    models: Sequence[Model], recipes: Sequence[Recipe] | None = None, *, key: str | None = None, **options: Any
) -> Call[Batch]:
    """Submit every model with every recipe; options: name, calibration, evaluate, priority, queue, force.

    `key` is the Idempotency-Key, for a caller who wants to send it again himself.
    """
    body = {"models": [model_body(model) for model in models], **_given(recipes=recipes, **options)}
    return _post("/v1/batches", Batch.from_json, body, key=key)


def requantize(**options: Any) -> Call[Requantized]:
    """Make outdated artifacts again; options: name, model, recipe, tag, evaluate, priority, queue, dry_run."""
    return _post("/v1/batches:requantize", Requantized.from_json, _given(**options))


def _batch(name: str) -> str:
    return segment(name, "batch id", "batch_0199a1b2...")


def get_batch(batch_id: str) -> Call[Batch]:
    """Read how far a batch is."""
    return _get(f"/v1/batches/{_batch(batch_id)}", Batch.from_json)


def list_batches(**filters: Any) -> Call[Page[Batch]]:
    """Read a page of batches."""
    return _get("/v1/batches", Page.of(Batch.from_json), **filters)


def batch_table(batch_id: str) -> Call[Any]:
    """Read the comparison table of a batch: its rows."""
    return _get(f"/v1/batches/{_batch(batch_id)}/table", lambda answer: answer["rows"])


def cancel_batch(batch_id: str) -> Call[Batch]:
    """Cancel what a batch has made and that has not ended."""
    return _post(f"/v1/batches/{_batch(batch_id)}:cancel", Batch.from_json)


def retry_batch(batch_id: str) -> Call[Batch]:
    """Run again what failed or was cancelled."""
    return _post(f"/v1/batches/{_batch(batch_id)}:retry-failed", Batch.from_json)


def upload_text(path: Path, name: str | None = None) -> Call[Any]:
    """Upload a text to calibrate or measure on; the answer's `source` is what jobs name it by."""
    kind = "application/x-ndjson" if path.suffix in (".jsonl", ".ndjson") else "text/plain"
    headers = {"Content-Type": kind}
    return Call(
        method="POST", path="/v1/texts", read=_same, params={"name": name or path.name}, file=path, headers=headers
    )


def list_texts(**filters: Any) -> Call[Any]:
    """Read a page of texts, newest first."""
    return _get("/v1/texts", _same, **filters)


def get_text(text_id: str) -> Call[Any]:
    """Read what is known of a text."""
    return _get(f"/v1/texts/{_text(text_id)}", _same)


def delete_text(text_id: str) -> Call[None]:
    """Delete a text."""
    return Call(method="DELETE", path=f"/v1/texts/{_text(text_id)}", read=_same)


def _text(text_id: str) -> str:
    return segment(text_id, "text id", "text_0199a1b2...")


def list_recipes() -> Call[Any]:
    """Read the presets."""
    return _get("/v1/recipes", _items)


def list_models() -> Call[Any]:
    """Read the models that the service has."""
    return _get("/v1/models", _items)


def list_queues() -> Call[Any]:
    """Read the queues."""
    return _get("/v1/queues", _items)


def get_queue(name: str) -> Call[Any]:
    """Read a queue."""
    return _get(_queue(name), _same)


def create_queue(name: str, *, max_running: int | None = None) -> Call[Any]:
    """Make a queue of which so many GPU slots may run at once; none is no limit. One that is there is a 412."""
    headers = {"If-None-Match": "*"}
    return Call(method="PUT", path=_queue(name), read=_same, body={"max_running": max_running}, headers=headers)


def change_queue(name: str, *, max_running: int | None) -> Call[Any]:
    """Change how many GPU slots of a queue may run at once; none is no limit. One that is not there is a 412."""
    headers = {"If-Match": "*"}
    return Call(method="PUT", path=_queue(name), read=_same, body={"max_running": max_running}, headers=headers)


def delete_queue(name: str) -> Call[None]:
    """Delete a queue in which nothing waits or runs."""
    return Call(method="DELETE", path=_queue(name), read=_same)


def pause_queue(name: str, *, paused: bool = True) -> Call[Any]:
    """Pause a queue, or let it go on."""
    return _post(f"{_queue(name)}:{'pause' if paused else 'resume'}", _same)


def _queue(name: str) -> str:
    return f"/v1/queues/{segment(name.replace('-', '_'), 'queue', 'default') and name}"


def list_workers() -> Call[Any]:
    """Read the dispatchers."""
    return _get("/v1/workers", _items)


def list_failures() -> Call[Any]:
    """Read the failed jobs by reason."""
    return _get("/v1/failures", _items)


def usage(**filters: Any) -> Call[Any]:
    """Read what was used; filters as in the API: since, until, by."""
    return _get("/v1/usage", _same, **filters)


def quota() -> Call[Any]:
    """Read what may be used."""
    return _get("/v1/quota", _same)


def create_key(
    name: str, scopes: Sequence[str], *, expires_at: str | None = None, project: str | None = None
) -> Call[Any]:
    """Make an API key, of another project if one is named; the answer's `token` is shown this once."""
    path = "/v1/keys" if project is None else f"/v1/tenants/{_project(project)}/keys"
    return _post(path, _same, {"name": name, "scopes": list(scopes), "expires_at": expires_at})


def list_keys(*, limit: int | None = None, cursor: str | None = None) -> Call[Any]:
    """Read a page of API keys, newest first."""
    return _get("/v1/keys", _same, limit=limit, cursor=cursor)


def get_key(key_id: str) -> Call[Any]:
    """Read an API key, without its token."""
    return _get(f"/v1/keys/{_key(key_id)}", _same)


def rotate_key(key_id: str, *, overlap_seconds: int | None = None) -> Call[Any]:
    """Replace an API key; the old one works on for the overlap."""
    return _post(f"/v1/keys/{_key(key_id)}:rotate", _same, _given(overlap_seconds=overlap_seconds))


def revoke_key(key_id: str) -> Call[Any]:
    """Refuse an API key from now on."""
    return _post(f"/v1/keys/{_key(key_id)}:revoke", _same)


def list_audit(*, limit: int | None = None, cursor: str | None = None) -> Call[Page[Any]]:
    """Read a page of the audit log, newest first: who changed what."""
    return _get("/v1/audit", Page.of(_same), limit=limit, cursor=cursor)


def list_projects(*, limit: int | None = None, cursor: str | None = None) -> Call[Any]:
    """Read a page of projects, newest first."""
    return _get("/v1/tenants", _same, limit=limit, cursor=cursor)


def get_project(project_id: str) -> Call[Any]:
    """Read a project."""
    return _get(f"/v1/tenants/{_project(project_id)}", _same)


def create_project(project_id: str, name: str, **limits: Any) -> Call[Any]:
    """Make a project; limits: weight, max_queued, max_running, max_bytes, paused."""
    return _post("/v1/tenants", _same, {"id": project_id, "name": name, **limits})


def change_project(project_id: str, **changes: Any) -> Call[Any]:
    """Change a project's name, weight, max_queued, max_running, max_bytes or paused; null is no limit."""
    return Call(method="PATCH", path=f"/v1/tenants/{_project(project_id)}", read=_same, body=changes)


def create_webhook(url: str, events: Sequence[str] = ()) -> Call[Any]:
    """Have a URL told about jobs; the answer's `secret` is shown this once."""
    return _post("/v1/webhooks", _same, {"url": url, "events": list(events)})


def list_webhooks(*, limit: int | None = None, cursor: str | None = None) -> Call[Any]:
    """Read a page of webhooks, newest first."""
    return _get("/v1/webhooks", _same, limit=limit, cursor=cursor)


def get_webhook(webhook_id: str) -> Call[Any]:
    """Read a webhook, without its secret."""
    return _get(f"/v1/webhooks/{_webhook(webhook_id)}", _same)


def change_webhook(webhook_id: str, **changes: Any) -> Call[Any]:
    """Change a webhook's url, events or enabled."""
    return Call(method="PATCH", path=f"/v1/webhooks/{_webhook(webhook_id)}", read=_same, body=changes)


def delete_webhook(webhook_id: str) -> Call[None]:
    """Delete a webhook with the log of its deliveries."""
    return Call(method="DELETE", path=f"/v1/webhooks/{_webhook(webhook_id)}", read=_same)


def rotate_webhook(webhook_id: str) -> Call[Any]:
    """Give a webhook a new secret; the answer's `secret` is shown this once."""
    return _post(f"/v1/webhooks/{_webhook(webhook_id)}:rotate-secret", _same)


def test_webhook(webhook_id: str) -> Call[Any]:
    """Send a test message."""
    return _post(f"/v1/webhooks/{_webhook(webhook_id)}:test", _same)


def list_deliveries(webhook_id: str, *, limit: int | None = None, cursor: str | None = None) -> Call[Any]:
    """Read a page of what was sent to a webhook, newest first."""
    return _get(f"/v1/webhooks/{_webhook(webhook_id)}/deliveries", _same, limit=limit, cursor=cursor)


def redeliver(webhook_id: str, delivery_id: str) -> Call[Any]:
    """Send a message again."""
    message = segment(delivery_id, "delivery id", "msg_0199a1b2...")
    return _post(f"/v1/webhooks/{_webhook(webhook_id)}/deliveries/{message}:redeliver", _same)


def health() -> Call[Any]:
    """Ask whether the service's process is up; needs no key that is valid."""
    return _get("/healthz", _same)


def readiness() -> Call[Any]:
    """Ask whether the service can do its work, part by part: also the answer when it cannot has `checks`."""
    return Call(method="GET", path="/readyz", read=_same, statuses=frozenset({503}))


def version() -> Call[Any]:
    """Read which versions the service runs."""
    return _get("/version", _same)


def _webhook(webhook_id: str) -> str:
    return segment(webhook_id, "webhook id", "wh_0199a1b2...")


def _project(project_id: str) -> str:
    return segment(project_id.replace("-", "_"), "project", "zoo") and project_id


def _key(key_id: str) -> str:
    return segment(key_id, "key id", "key_0199a1b2...")


def _same(answer: Any) -> Any:
    return answer


def _items(answer: Any) -> Any:
    return answer["items"]
