"""Turns a request to measure something into a job."""

from dataclasses import asdict, replace

from infra.errors import ArtifactNotFound
from infra.job_measures import measured_fingerprint
from infra.jobs import Job, NewJob
from infra.models import ModelRef
from service.auth import Caller
from service.context import Context
from service.errors import FieldProblem, ProblemError
from service.schemas.evaluations import EvaluationRequest, EvaluationSettings
from service.submit import MAX_ATTEMPTS, Identities, check_source, check_tasks

UNQUANTIZED = "unquantized"
"""The recipe's name of what is measured as it is."""


def requested_evaluation(service: Context, caller: Caller, request: EvaluationRequest) -> NewJob:
    """Build the job that a request asks for.

    Raises:
        ProblemError: there is no such artifact, or the text is refused.
        ModelForbidden: the model reference is not allowed.
        ModelNotFound: there is no such model.
    """
    identities = check_settings(service, caller, request, "")
    if request.artifact is not None:
        try:
            artifact = service.artifacts.get(request.artifact, caller.tenant_id)
        except ArtifactNotFound as error:
            raise ProblemError(
                "artifact-not-found", str(error), [FieldProblem(pointer="/artifact", detail=str(error))]
            ) from error
        job = of_artifact(service.jobs.get(artifact.job_id, caller.tenant_id), request, identities)
    else:
        assert request.model is not None
        ref = ModelRef(request.model.source, request.model.name, request.model.revision)
        job = of_model(ref, service.models.check(ref), request, identities, tenant_id=caller.tenant_id)
    return replace(job, priority=request.priority)


def check_settings(service: Context, caller: Caller, settings: EvaluationSettings, pointer: str) -> Identities:
    """Check the text and the task files of an evaluation; return what changes when their bytes do.

    Raises:
        ProblemError: one may not be used, or is not there; the problem points below `pointer`.
    """
    text = check_source(service, caller, settings.text, f"{pointer}/text") if settings.perplexity else None
    named = [(task.kind, task.name) for task in settings.tasks]
    return Identities(text, check_tasks(service, caller, named, f"{pointer}/tasks", field="/name"))


def of_artifact(made_by: Job, settings: EvaluationSettings, identities: Identities) -> NewJob:
    """Return the job that measures what a job made, or will have made by then.

    It depends on that job, whether that is done or not: so each of the two leads to the other.
    """
    new = _job(
        settings,
        identities,
        tenant_id=made_by.tenant_id,
        model=made_by.spec["model"],
        model_identity=made_by.spec["model_identity"],
        artifact_job_id=made_by.id,
    )
    return replace(new, model_name=made_by.model_name, recipe_name=made_by.recipe_name, depends_on=(made_by.id,))


def of_model(
    ref: ModelRef, model_identity: str, settings: EvaluationSettings, identities: Identities, *, tenant_id: str
) -> NewJob:
    """Return the job that measures an unquantized model."""
    new = _job(
        settings,
        identities,
        tenant_id=tenant_id,
        model=asdict(ref),
        model_identity=model_identity,
        artifact_job_id=None,
    )
    return replace(new, model_name=ref.name, recipe_name=UNQUANTIZED)


def _job(
    settings: EvaluationSettings,
    identities: Identities,
    *,
    tenant_id: str,
    model: dict[str, str | None],
    model_identity: str,
    artifact_job_id: str | None,
) -> NewJob:
    spec = {
        "kind": "evaluate",
        "model": model,
        "model_identity": model_identity,
        "artifact_job_id": artifact_job_id,
        "text_identity": identities.text,
        "task_identities": dict(identities.tasks),
        "evaluation": settings.measured(),
    }
    return NewJob(
        tenant_id=tenant_id,
        kind="evaluate",
        spec=spec,
        fingerprint=measured_fingerprint(spec, artifact_job_id),
        max_attempts=MAX_ATTEMPTS,
    )
