"""Turns a request into a job: resolves the recipe, checks the model and the text, computes the fingerprint."""

import functools
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from duquant.config import ALGORITHM_VERSION, PRESETS, QualityGate, Recipe, TextSource, with_calibration
from duquant.errors import ConfigError
from infra.errors import ObjectNotFound, PathForbidden, PathNotFound
from infra.fingerprints import fingerprint_of, gate_settings
from infra.jobs import JobChanges, NewJob
from infra.models import ModelRef
from infra.paths import find_under
from infra.schema import DEFAULT_QUEUE
from infra.texts import file_identity, object_identity, require_hub_name, require_own_key
from service.auth import Caller
from service.context import Context
from service.errors import FieldProblem, ProblemError, config_problem
from service.schemas.common import DEFAULT_PRIORITY, milliseconds
from service.schemas.jobs import JobChange, JobRequest
from service.schemas.models import ModelRequest
from service.schemas.recipes import CalibrationOverrides

_SOURCE_POINTER = "/calibration/source"
_GATE_POINTER = "/recipe/quality_gate"
MAX_ATTEMPTS = 10
"""The pauses between them add up to 12 minutes on average: an outage of five minutes costs hardly any job."""


@dataclass(frozen=True)
class Identities:
    """What changes when the bytes of an evaluation's text do, and of its task files, by their names."""

    text: str | None
    tasks: Mapping[str, str]


@dataclass(frozen=True)
class Work:
    """A model and a recipe that were checked, and what tells this work from any other."""

    ref: ModelRef
    recipe: Recipe
    model_identity: str
    text_identity: str | None
    quality_gate: Mapping[str, Any] | None
    """What its quality gate measures: the settings, and what tells the texts from changed ones."""
    fingerprint: str


def work_of(
    service: Context,
    caller: Caller,
    model: ModelRequest,
    recipe: Recipe,
    calibration: CalibrationOverrides | None = None,
) -> Work:
    """Check the model and the text that a request names; return what is to be done.

    Raises:
        ProblemError: a calibration field or text is refused.
        ModelForbidden: the model reference is not allowed.
        ModelNotFound: there is no such model.
    """
    ref = ModelRef(source=model.source, name=model.name, revision=model.revision)
    model_identity = service.models.check(ref)
    recipe = _with_overrides(recipe, calibration)
    text_identity = check_source(service, caller, recipe.calibration.source, _SOURCE_POINTER)
    gate = None if recipe.quality_gate is None else _measured_by(service, caller, recipe.quality_gate)
    fingerprint = work_fingerprint(model_identity, recipe, text_identity, gate)
    return Work(ref, recipe, model_identity, text_identity, gate, fingerprint)


def _measured_by(service: Context, caller: Caller, gate: QualityGate) -> Mapping[str, Any]:
    """Check the texts of a quality gate; return what a job's spec says of it."""
    settings = gate_settings(gate)
    text = check_source(service, caller, gate.text, f"{_GATE_POINTER}/text") if "text" in settings else None
    named = [(task["kind"], task["name"]) for task in settings.get("tasks", ())]
    # A gate names its tasks by plain words: there is no field in them to point at.
    tasks = check_tasks(service, caller, named, f"{_GATE_POINTER}/tasks", field="")
    return {"evaluation": settings, "text_identity": text, "task_identities": tasks}


def work_fingerprint(
    model_identity: str,
    recipe: Recipe,
    text_identity: str | None,
    quality_gate: Mapping[str, Any] | None = None,
) -> str:
    """Return what tells this work from any other, with the algorithm as it is today.

    A quality gate counts, though it changes no byte: a job that may fail for it does not stand for one that may not.
    """
    identity = {
        "algorithm_version": ALGORITHM_VERSION,
        "model_identity": model_identity,
        "recipe": _known_preset(recipe.name).digest if _is_preset(recipe) else recipe.digest(),
    }
    if text_identity is not None:
        identity["text_identity"] = text_identity
    if recipe.quality_gate is not None and quality_gate is not None:
        gate = recipe.quality_gate
        identity["quality_gate"] = {
            "max_perplexity_increase": gate.max_perplexity_increase,
            "least_accuracies": gate.least_accuracies,
            **quality_gate,
        }
    return fingerprint_of(identity)


class _KnownPreset(NamedTuple):
    digest: str
    as_json: str
    """Text and not a dictionary, which whoever gets it could change."""


@functools.cache
def _known_preset(name: str) -> _KnownPreset:
    # Most requests name a preset, and working this out again would take a tenth of a submit.
    recipe = PRESETS[name][1]
    return _KnownPreset(recipe.digest(), json.dumps(recipe.to_dict()))


def _is_preset(recipe: Recipe) -> bool:
    return recipe.name in PRESETS and PRESETS[recipe.name][1] is recipe


def _plain(recipe: Recipe) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(_known_preset(recipe.name).as_json) if _is_preset(recipe) else recipe.to_dict()
    return plain


def new_job(service: Context, caller: Caller, request: JobRequest) -> NewJob:
    """Build the job that a request asks for.

    Raises:
        ProblemError: a calibration field, text or time is refused.
        ModelForbidden: the model reference is not allowed.
        ModelNotFound: there is no such model.
    """
    _require_future(request.deadline_at)
    if request.deadline_at is not None and request.run_at is not None and request.deadline_at <= request.run_at:
        detail = "deadline_at must come after run_at"
        raise ProblemError("validation-failed", detail, [FieldProblem(pointer="/deadline_at", detail=detail)])
    work = work_of(service, caller, request.model, request.recipe, request.calibration)
    return replace(
        quantize_job(caller.tenant_id, work),
        priority=request.priority,
        queue=request.queue,
        run_at=milliseconds(request.run_at),
        deadline_at=milliseconds(request.deadline_at),
        depends_on=request.depends_on,
        labels=request.labels,
    )


def quantize_job(tenant_id: str, work: Work) -> NewJob:
    """Return the plain job that does this work."""
    spec: dict[str, Any] = {
        "kind": "quantize",
        "model": {"source": work.ref.source, "name": work.ref.name, "revision": work.ref.revision},
        "model_identity": work.model_identity,
        "text_identity": work.text_identity,
        "recipe": _plain(work.recipe),
    }
    if work.quality_gate is not None:
        spec["quality_gate"] = dict(work.quality_gate)
    return NewJob(
        tenant_id=tenant_id,
        kind="quantize",
        spec=spec,
        fingerprint=work.fingerprint,
        model_name=work.ref.name,
        recipe_name=work.recipe.name,
        max_attempts=MAX_ATTEMPTS,
    )


def changes_of(request: JobChange) -> JobChanges:
    """Return what a request changes, as the job store takes it: null is what a job has that never said it."""
    changes: JobChanges = {}
    if "priority" in request.model_fields_set:
        changes["priority"] = DEFAULT_PRIORITY if request.priority is None else request.priority
    if "run_at" in request.model_fields_set:
        changes["run_at"] = 0 if request.run_at is None else milliseconds(request.run_at)
    if "deadline_at" in request.model_fields_set:
        _require_future(request.deadline_at)
        changes["deadline_at"] = milliseconds(request.deadline_at)
    if "queue" in request.model_fields_set:
        changes["queue"] = DEFAULT_QUEUE if request.queue is None else request.queue
    if "labels" in request.model_fields_set:
        changes["labels"] = request.labels or {}
    return changes


def _require_future(deadline_at: datetime | None) -> None:
    if deadline_at is not None and deadline_at.timestamp() <= time.time():
        detail = "deadline_at must lie in the future"
        raise ProblemError("validation-failed", detail, [FieldProblem(pointer="/deadline_at", detail=detail)])


def _with_overrides(recipe: Recipe, overrides: CalibrationOverrides | None) -> Recipe:
    if overrides is None:
        return recipe
    changes = {name: getattr(overrides, name) for name in overrides.model_fields_set}
    try:
        return with_calibration(recipe, **changes)
    except ConfigError as error:
        raise config_problem(error) from error


def check_source(service: Context, caller: Caller, source: TextSource, pointer: str) -> str | None:
    """Check that a text may be read; return what changes when its bytes do, for texts that can change.

    Raises:
        ProblemError: it may not, or is not there; the problem points at the source's name below `pointer`.
    """
    try:
        match source.kind:
            case "file":
                return file_identity(_text_file(service, source))
            case "object":
                return _text_object(service, caller, source)
            case "hub" if not service.settings.allow_hub:
                detail = "hub data sets are switched off on this server (DUQUANT_ALLOW_HUB)"
                raise ProblemError("text-forbidden", detail)
            case "hub":
                require_hub_name(source.name)
    except PathForbidden as error:
        detail = str(error)
        raise ProblemError(
            "text-forbidden", detail, [FieldProblem(pointer=f"{pointer}/name", detail=detail)]
        ) from error
    except ProblemError as problem:
        problem.errors.append(FieldProblem(pointer=f"{pointer}/name", detail=problem.detail))
        raise
    return None


def check_tasks(
    service: Context, caller: Caller, tasks: Iterable[tuple[str, str]], pointer: str, *, field: str
) -> Mapping[str, str]:
    """Check that tasks, by kind and name, may be asked; return what changes when the bytes of their files do, by name.

    Raises:
        ProblemError: one may not, or is not there; the problem points at its place below `pointer`, and `field` in it.
    """
    found = {}
    for index, (kind, name) in enumerate(tasks):
        identity = _check_task(service, caller, kind, name, f"{pointer}/{index}{field}")
        if identity is not None:
            found[name] = identity
    return found


def _check_task(service: Context, caller: Caller, kind: str, name: str, pointer: str) -> str | None:
    if kind == "hub":
        if not service.settings.allow_hub:
            detail = f"the questions of {name} are on the hub, which is switched off on this server (DUQUANT_ALLOW_HUB)"
            raise ProblemError("text-forbidden", detail, [FieldProblem(pointer=pointer, detail=detail)])
        return None
    try:
        return check_source(service, caller, TextSource(kind="object" if kind == "object" else "file", name=name), "")
    except ProblemError as problem:
        problem.errors[:] = [FieldProblem(pointer=pointer, detail=problem.detail)]
        raise


def _text_file(service: Context, source: TextSource) -> Path:
    if not service.settings.text_roots:
        raise ProblemError("text-forbidden", "no text files may be used on this server; it has no DUQUANT_TEXT_ROOTS")
    try:
        path = find_under(service.settings.text_roots, source.name)
    except PathForbidden as error:
        raise ProblemError("text-forbidden", f"text file {error}") from error
    except PathNotFound as error:
        detail = f"there is no text file {source.name!r} under the server's text roots"
        raise ProblemError("text-not-found", detail) from error
    if not path.is_file():
        raise ProblemError("text-not-found", f"{source.name!r} is no file")
    return path


def _text_object(service: Context, caller: Caller, source: TextSource) -> str:
    require_own_key(source.name, caller.tenant_id)
    try:
        info = service.storage.head(source.name)
    except ObjectNotFound as error:
        raise ProblemError("text-not-found", f"there is no object {source.name!r}") from error
    return object_identity(info)
