"""What a job's spec names, checked once more where the work is done: the model, the text and the task files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duquant.config import TextSource
from duquant.evaluation.plan import EvaluationPlan
from infra.errors import InfraError, ModelForbidden, ModelNotFound, ObjectNotFound, TransientError
from infra.jobs import Job
from infra.models import ModelCatalog, ModelRef
from infra.paths import find_under
from infra.storage import ObjectStore
from infra.texts import file_identity, object_identity, require_hub_name, require_own_key
from workers.endings import JobFailed
from workers.settings import WorkerSettings


def model_reference(job: Job, settings: WorkerSettings) -> str:
    """Return the model of a job as duquant.models.references reads it.

    Raises:
        JobFailed: it is not allowed here, is gone, or has changed since the job was submitted.
    """
    reference = ModelRef(**job.spec["model"])
    catalog = ModelCatalog.from_settings(settings)
    try:
        identity = catalog.check(reference)
    except (ModelForbidden, ModelNotFound) as err:
        raise JobFailed("bad_input", str(err)) from err
    if identity != job.spec["model_identity"]:
        detail = f"model {reference.name} has changed since the job was submitted; submit it again"
        raise JobFailed("bad_input", detail)
    match reference.source:
        case "local":
            return str(catalog.local_path(reference))
        case "hub":
            return f"hub:{reference.name}@{reference.revision}"
        case _:
            return f"demo:{reference.name}"


@dataclass(frozen=True)
class TextInput:
    """Where a text is: in an object, in a file, or (neither) where its source says."""

    key: str | None = None
    file: Path | None = None


def find_text(job: Job, source: TextSource, settings: WorkerSettings, storage: ObjectStore) -> TextInput:
    """Return where the calibration text of a job is.

    Raises:
        JobFailed: it is not allowed here, is gone, or has changed since the job was submitted.
        TransientError: the object store does not answer.
    """
    return _find(job, source, settings, storage, "calibration text", job.spec, "text_identity")


def local_plan(
    job: Job,
    measurement: Mapping[str, Any],
    settings: WorkerSettings,
    storage: ObjectStore,
    work_dir: Path,
) -> dict[str, Any]:
    """Return what a job measures as an EvaluationPlan whose texts and task files are files on this machine.

    Objects are brought into the work directory, which the workers read, too.

    Args:
        job: Whose it is.
        measurement: The part of its spec that says what is measured (infra.job_measures.measurement_of).
        settings: What may be read here.
        storage: Where text objects are.
        work_dir: Of the job.

    Raises:
        JobFailed: a text is not allowed here, is gone, or has changed since the job was submitted.
        DuQuantError: the plan makes no sense.
        TransientError: the object store does not answer.
    """
    wanted = measurement["evaluation"]
    plan: dict[str, Any] = {"perplexity": None, "tasks": [], "speed": wanted.get("speed")}
    if "text" in wanted:
        source = TextSource(**wanted["text"])
        found = _find(job, source, settings, storage, "evaluation text", measurement, "text_identity")
        file = _fetched(found, storage, work_dir, "evaluation-text")
        text = wanted["text"] if file is None else {**wanted["text"], "kind": "file", "name": str(file)}
        plan["perplexity"] = {"text": text, "seq_len": wanted["seq_len"], "windows": wanted["windows"]}
    identities = measurement.get("task_identities") or {}
    for task in wanted.get("tasks", ()):
        if task["kind"] == "hub":
            plan["tasks"].append(task)
            continue
        name = task["name"]
        source = TextSource(kind=task["kind"], name=name)
        found = _find(job, source, settings, storage, "task file", identities, name)
        file = _fetched(found, storage, work_dir, Path(name).stem)
        plan["tasks"].append({**task, "kind": "file", "name": str(file)})
    return EvaluationPlan.from_dict(plan).to_dict()


def _fetched(found: TextInput, storage: ObjectStore, work_dir: Path, name: str) -> Path | None:
    if found.key is None:
        return found.file
    # The suffix tells JSONL from plain text.
    file = work_dir / "texts" / f"{name}{Path(found.key).suffix}"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        storage.get_file(found.key, file)
    return file


def _find(
    job: Job,
    source: TextSource,
    settings: WorkerSettings,
    storage: ObjectStore,
    what: str,
    identities: Mapping[str, Any],
    name: str,
) -> TextInput:
    """Return where a text is, if it is still what `identities` says it was; `what` it is called in errors."""
    try:
        found, identity = _locate(job, source, settings, storage)
    except ObjectNotFound as err:
        raise JobFailed("bad_input", f"there is no text object {source.name}") from err
    except TransientError:
        raise
    except InfraError as err:
        raise JobFailed("bad_input", f"{what}: {err}") from err
    if identity != identities.get(name, identity):
        detail = f"the {what} has changed since the job was submitted; submit it again"
        raise JobFailed("bad_input", detail)
    return found


def _locate(
    job: Job, source: TextSource, settings: WorkerSettings, storage: ObjectStore
) -> tuple[TextInput, str | None]:
    if source.kind == "file":
        path = find_under(settings.text_roots, source.name)
        return TextInput(file=path), file_identity(path)
    if source.kind == "object":
        require_own_key(source.name, job.tenant_id)
        return TextInput(key=source.name), object_identity(storage.head(source.name))
    if source.kind == "hub":
        if not settings.allow_hub:
            raise JobFailed("bad_input", "data sets from the hub are switched off")
        require_hub_name(source.name)
    return TextInput(), None
