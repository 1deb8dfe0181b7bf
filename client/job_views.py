"""How jobs, their layers and their events are shown."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from client import calls
from client.connection import Session
from client.errors import ApiError, BadInputError, JobFailedError
from client.models import Event, Job
from client.output import (
    Format,
    counted,
    duration,
    number,
    print_json,
    print_pairs,
    print_text,
    print_yaml,
    size,
    visible,
)
from client.times import ago, at, moment, took

COLUMNS = ("job", "kind", "state", "model", "recipe", "progress", "created", "took", "GPU time", "reason")
LAYER_COLUMNS = ("layer", "state", "attempt", "time", "size", "output error", "node", "finished", "detail")
_USUAL = {"queue": "default", "priority": 100}
_WAITING = frozenset({"blocked", "scheduled", "queued"})


def row_of(job: Job) -> tuple[object, ...]:
    """Return a job's row of COLUMNS."""
    return (
        job.id,
        job.kind,
        job.state,
        job.model,
        job.recipe_name,
        f"{job.phase} {job.done}/{job.total}" if job.total else "",
        ago(job.raw["created_at"]),
        took(job.raw),
        _gpu(job),
        job.reason,
    )


def layer_row(layer: Mapping[str, Any]) -> tuple[object, ...]:
    """Return a layer's row of LAYER_COLUMNS."""
    return (
        "extra" if layer["layer"] < 0 else layer["layer"],
        layer["state"],
        layer["attempt"],
        None if layer["seconds"] is None else duration(layer["seconds"]),
        None if layer["size_bytes"] is None else size(layer["size_bytes"]),
        number(layer["metrics"].get("output_error")),
        layer["node"],
        ago(layer["finished_at"]),
        layer["detail"],
    )


def print_event(event: Event, output: Format) -> None:
    """Print an event at once: a line, a line of JSON, or a document of YAML."""
    match output:
        case Format.JSON:
            print_json(event.raw)
        case Format.YAML:
            print_text("---")
            print_yaml(event.raw)
        case Format.TABLE:
            # A worker says nothing new: it is the one that has the job.
            who = {"by": event.actor} if ":" in event.actor else {}
            given = {name: value for name, value in {**event.data, **who}.items() if value not in (None, {})}
            facts = " ".join(f"{name}={_fact(name, value)}" for name, value in given.items())
            when = f"{moment(event.at).astimezone(UTC):%Y-%m-%d %H:%M:%S}"
            print_text(visible(f"{event.id:>6}  {when}  {event.type:<14}  {facts}".rstrip()))


def _fact(name: str, value: object) -> object:
    """Write a fact without spaces: switches as in JSON, times to the second, what is taken away as none."""
    match value:
        case None:
            return "none"
        case bool():
            return json.dumps(value)
        case Mapping() if not value:
            return "none"
        case Mapping():
            return ",".join(f"{inner}:{_fact(inner, each)}" for inner, each in value.items())
        case int() | str() if name.endswith("_at"):
            return _time(value)
    return number(value)


def _time(value: int | str) -> str:
    try:
        # Older services send milliseconds.
        when = datetime.fromtimestamp(value / 1000, UTC) if isinstance(value, int) else moment(value)
        return f"{when.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (ValueError, OverflowError, OSError):
        return str(value)


def report_job(session: Session, job: Job, *, reused: bool | None = None) -> None:
    """Print a job."""
    session.show(
        job.raw if reused is None else {**job.raw, "reused": reused}, lambda: print_pairs(_pairs(session, job))
    )


def _pairs(session: Session, job: Job) -> dict[str, Any]:
    labels = sorted((job.raw.get("labels") or {}).items())
    return {
        "job": job.id,
        "kind": job.kind,
        "state": job.state,
        "reason": job.reason,
        "detail": job.detail,
        "held by": _held_by(session, job),
        "model": job.model or None,
        "recipe": job.recipe_name or None,
        "batch": job.raw.get("batch_id"),
        "labels": ", ".join(f"{name}={value}" for name, value in labels) or None,
        **{name: job.raw.get(name) for name, usual in _USUAL.items() if job.raw.get(name) != usual},
        "after": ", ".join(job.raw.get("depends_on") or ()) or None,
        "not before": _start(job),
        "deadline": at(job.raw.get("deadline_at")),
        "phase": f"{job.phase} {job.done}/{job.total}" if job.phase else None,
        "layers": f"{job.layers_done}/{job.layers_total}" if job.layers_total else None,
        "place in the queue": job.queue_position,
        "time left": None if job.eta_seconds is None else duration(job.eta_seconds),
        "evaluation": job.evaluation_job_id or ", ".join(job.raw.get("evaluation_job_ids") or ()) or None,
        "created": at(job.raw["created_at"]),
        "started": at(job.raw["started_at"]),
        "finished": at(job.raw["finished_at"]),
        "took": took(job.raw),
        "GPU time": _gpu(job),
        **_result(job),
        **({"artifact": "deleted"} if _is_deleted(session, job) else {}),
    }


def _start(job: Job) -> str | None:
    """Return when a job may start; none where that is at once."""
    start = job.raw.get("run_at")
    is_late = start is not None and moment(start) > moment(job.raw["created_at"]) + timedelta(seconds=1)
    return at(start) if is_late else None


def _held_by(session: Session, job: Job) -> str | None:
    """Say what keeps a job from starting. The job does not tell, so its queue and its project do."""
    if job.state not in _WAITING:
        return None
    try:
        queue = session.client.run(calls.get_queue(job.raw["queue"]))
        project = session.client.run(calls.quota())
    except ApiError:
        # A key that may see no queue has got its answer all the same.
        return None
    paused = [f"queue {queue['name']}"] if queue["paused"] else []
    paused += [f"project {project['tenant']}"] if project["paused"] else []
    held = [f"{' and '.join(paused)}, which {'is' if len(paused) == 1 else 'are'} paused"] if paused else []
    # What waits for a time or for another job is not kept by a bound.
    return "; ".join([*held, *(_full(queue, project) if job.state == "queued" else ())]) or None


def _full(queue: Mapping[str, Any], project: Mapping[str, Any]) -> list[str]:
    """Say which bounds are reached. An older service does not tell how many slots a queue takes for all projects."""
    bounds = (
        (f"queue {queue['name']}", queue.get("busy"), queue["max_running"]),
        (f"project {project['tenant']}", project["running"]["used"], project["running"]["limit"]),
    )
    return [
        f"{name}, which has {used} of {counted(limit, 'GPU slot')} taken"
        for name, used, limit in bounds
        if used is not None and limit is not None and used >= limit
    ]


def _is_deleted(session: Session, job: Job) -> bool:
    """Tell whether the artifact that a job has made is gone; the job itself keeps what it was."""
    if job.state != "succeeded" or not (job.result or {}).get("artifact"):
        return False
    try:
        session.client.run(calls.get_artifact(job.id))
    except ApiError as error:
        return error.status == 404
    return False


def check_job(job: Job) -> None:
    """Raise unless a job that has ended has succeeded.

    Raises:
        JobFailedError: it failed, or was cancelled.
        BadInputError: it ended in a way that this client does not know.
    """
    if job.state == "failed":
        raise JobFailedError(f"{job.id} failed ({job.reason}): {job.detail}")
    if job.state == "cancelled":
        raise JobFailedError(f"{job.id} was cancelled")
    if job.state != "succeeded":
        raise BadInputError(f"{job.id} ended as {job.state}, which this client does not know; upgrade it")


def _gpu(job: Job) -> str | None:
    return duration(job.raw["gpu_seconds"]) if job.raw.get("gpu_seconds") else None


def _result(job: Job) -> dict[str, str | None]:
    """Return what a job that succeeded has made or measured."""
    result = job.result or {}
    artifact, metrics = result.get("artifact"), result.get("metrics") or {}
    perplexity, windows = metrics.get("perplexity"), metrics.get("windows")
    checks = (result.get("quality_gate") or {}).get("checks", ())
    return {
        "artifact": artifact and f"{artifact['files']} files, {size(artifact['size_bytes'])}",
        "perplexity": None if perplexity is None else f"{perplexity:.4f}",
        "measured on": windows and f"{windows} windows of {metrics.get('seq_len')} tokens",
        "accuracy": ", ".join(
            f"{task} {scores['acc']:.4f}" for task, scores in (metrics.get("tasks") or {}).items() if "acc" in scores
        )
        or None,
        "measured": result.get("artifact_job_id"),
        "quality gate": ", ".join(f"{each['check']} {each['value']:.1%} ({each['limit']})" for each in checks) or None,
    }
