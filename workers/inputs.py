"""What a job's spec names, checked once more where the work is done: the model and the text."""

from dataclasses import dataclass
from pathlib import Path

from duquant.config import TextSource
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


def find_text(
    job: Job, source: TextSource, settings: WorkerSettings, storage: ObjectStore, *, what: str = "calibration text"
) -> TextInput:
    """Return where the text of a job is; `what` it is called in errors.

    Raises:
        JobFailed: it is not allowed here, is gone, or has changed since the job was submitted.
        TransientError: the object store does not answer.
    """
    try:
        found, identity = _locate(job, source, settings, storage)
    except ObjectNotFound as err:
        raise JobFailed("bad_input", f"there is no text object {source.name}") from err
    except TransientError:
        raise
    except InfraError as err:
        raise JobFailed("bad_input", f"{what}: {err}") from err
    if identity != job.spec.get("text_identity", identity):
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
