"""Calls about work: jobs, batches and evaluations."""

from collections.abc import Mapping, Sequence
from typing import Any

from client.calls.requests import Call, Request, Stream, get, given, items, of_kinds, post, same, segment
from client.errors import BadInputError
from client.models import Batch, Evaluation, Event, Job, JobPage, Page, Requantized, parse_model

Model = str | Mapping[str, Any]
"""demo:NAME, local:NAME or hub:OWNER/NAME@COMMIT, or the API's own object."""
Recipe = str | Mapping[str, Any]
"""A preset's name, or an object of recipe fields."""
Settings = Mapping[str, Any]
"""text, seq_len, windows, perplexity, tasks and speed of an evaluation; what is left out has the service's default."""


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
    optional = given(recipe=recipe, calibration=calibration, evaluate=evaluate, priority=priority, **options)
    return post("/v1/jobs", Job.from_json, {"model": model_body(model), "force": force, **optional})


def get_job(job_id: str, *, hold_s: int = 0) -> Call[Job]:
    """Read a job; with `hold_s` when it has ended, or after so many seconds."""
    headers = {"Prefer": f"wait={hold_s}"} if hold_s else {}
    return Call(method="GET", path=f"/v1/jobs/{segment(job_id)}", read=Job.from_json, headers=headers)


def list_jobs(**filters: Any) -> Call[JobPage]:
    """Read a page of jobs; filters as in the API: state, kind, model, recipe, queue, batch, reason, label, ..."""
    return get("/v1/jobs", JobPage.from_json, **filters)


def change_job(job_id: str, *, version: int | None = None, **changes: Any) -> Call[Job]:
    """Change a job's priority, run_at, queue, deadline_at or labels; null is what it is when nobody says it.

    Labels replace all that the job has. They can be changed when it has ended, too.
    With `version`, as a job has it in `raw`, only if nobody has changed it since: another version is a 412.
    """
    headers = {} if version is None else {"If-Match": f'"{version}"'}
    path = f"/v1/jobs/{segment(job_id)}"
    return Call(method="PATCH", path=path, read=Job.from_json, body=changes, headers=headers)


def cancel_job(job_id: str) -> Call[Job]:
    """Cancel a job."""
    return post(f"/v1/jobs/{segment(job_id)}:cancel", Job.from_json)


def retry_job(job_id: str) -> Call[Job]:
    """Run a failed or cancelled job again."""
    return post(f"/v1/jobs/{segment(job_id)}:retry", Job.from_json)


def estimate_job(
    model: Model, recipe: Recipe | None = None, *, calibration: Mapping[str, Any] | None = None
) -> Call[Any]:
    """Ask what a job would take."""
    body = {"model": model_body(model), **given(recipe=recipe, calibration=calibration)}
    return post("/v1/estimates", same, body)


def list_layers(job_id: str) -> Call[Any]:
    """Read a job's layers."""
    return get(f"/v1/jobs/{segment(job_id)}/layers", items)


def follow_job(job_id: str, *, after: int = 0) -> Stream[Event]:
    """Follow a job's events, from the one after `after`, until it has ended."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(after)} if after else {})
    return Stream(method="GET", path=f"/v1/jobs/{segment(job_id)}/events", read=Event.from_json, headers=headers)


def submit_batch(
    models: Sequence[Model], recipes: Sequence[Recipe] | None = None, *, key: str | None = None, **options: Any
) -> Call[Batch]:
    """Submit every model with every recipe; options: name, calibration, evaluate, priority, queue, force.

    `key` is the Idempotency-Key, for a caller who wants to send it again himself.
    """
    body = {"models": [model_body(model) for model in models], **given(recipes=recipes, **options)}
    return post("/v1/batches", Batch.from_json, body, key=key)


def requantize(**options: Any) -> Call[Requantized]:
    """Make outdated artifacts again; options: name, model, recipe, tag, evaluate, priority, queue, dry_run."""
    return post("/v1/batches:requantize", Requantized.from_json, given(**options))


def _batch(name: str) -> str:
    return segment(name, "batch id", "batch_0199a1b2...")


def get_batch(batch_id: str) -> Call[Batch]:
    """Read how far a batch is."""
    return get(f"/v1/batches/{_batch(batch_id)}", Batch.from_json)


def list_batches(**filters: Any) -> Call[Page[Batch]]:
    """Read a page of batches; filters as in the API: state, name, model, recipe, created_from, created_until."""
    return get("/v1/batches", Page.of(Batch.from_json), **filters)


def batch_table(batch_id: str) -> Call[Any]:
    """Read the comparison table of a batch: its rows."""
    return get(f"/v1/batches/{_batch(batch_id)}/table", lambda answer: answer["rows"])


def cancel_batch(batch_id: str) -> Call[Batch]:
    """Cancel what a batch has made and that has not ended."""
    return post(f"/v1/batches/{_batch(batch_id)}:cancel", Batch.from_json)


def retry_batch(batch_id: str) -> Call[Batch]:
    """Run again what failed or was cancelled."""
    return post(f"/v1/batches/{_batch(batch_id)}:retry-failed", Batch.from_json)


def submit_evaluation(
    artifact: str | None = None, *, model: Model | None = None, force: bool = False, **settings: Any
) -> Call[Job]:
    """Measure an artifact or a model; settings: text, seq_len, windows, perplexity, tasks, speed, priority."""
    if (artifact is None) == (model is None):
        raise BadInputError("give either an artifact or a model to measure")
    what = {"artifact": artifact} if model is None else {"model": model_body(model)}
    return post("/v1/evaluations", Job.from_json, {**what, "force": force, **settings})


def get_evaluation(name: str) -> Call[Evaluation]:
    """Read what was measured, by the evaluation's id or its job's."""
    return get(f"/v1/evaluations/{of_kinds(name, 'evaluation', 'eval_')}", Evaluation.from_json)


def evaluation_report(name: str) -> Request:
    """Ask for the report on an evaluation, by the evaluation's id or its job's; the answer leads on to a link."""
    return Request(method="GET", path=f"/v1/evaluations/{of_kinds(name, 'evaluation', 'eval_')}/report")


def list_evaluations(**filters: Any) -> Call[Page[Evaluation]]:
    """Read a page of evaluations; filters as in the API: artifact, model."""
    return get("/v1/evaluations", Page.of(Evaluation.from_json), **filters)
