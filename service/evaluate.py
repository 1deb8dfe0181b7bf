"""Turns a request to measure something into a job."""

from dataclasses import asdict, replace

from duquant.config import ALGORITHM_VERSION
from infra.errors import ArtifactNotFound
from infra.jobs import Job, JobState, NewJob
from infra.models import ModelRef
from service.auth import Caller
from service.context import Context
from service.errors import FieldProblem, ProblemError
from service.schemas.evaluations import EvaluationRequest, EvaluationSettings
from service.submit import MAX_ATTEMPTS, check_source, fingerprint_of

UNQUANTIZED = "unquantized"
"""The recipe's name of what is measured as it is."""


def requested_evaluation(service: Context, caller: Caller, request: EvaluationRequest) -> NewJob:
    """Build the job that a request asks for.

    Raises:
        ProblemError: there is no such artifact, or the text is refused.
        ModelForbidden: the model reference is not allowed.
        ModelNotFound: there is no such model.
    """
    text_identity = check_settings(service, caller, request, "")
    if request.artifact is not None:
        try:
            artifact = service.artifacts.get(request.artifact, caller.tenant_id)
        except ArtifactNotFound as error:
            raise ProblemError(
                "artifact-not-found", str(error), [FieldProblem(pointer="/artifact", detail=str(error))]
            ) from error
        job = of_artifact(service.jobs.get(artifact.job_id, caller.tenant_id), request, text_identity)
    else:
        assert request.model is not None
        ref = ModelRef(request.model.source, request.model.name, request.model.revision)
        job = of_model(ref, service.models.check(ref), request, text_identity, tenant_id=caller.tenant_id)
    return replace(job, priority=request.priority)


def check_settings(service: Context, caller: Caller, settings: EvaluationSettings, pointer: str) -> str | None:
    """Check the text of an evaluation; return what changes when its bytes do.

    Raises:
        ProblemError: it may not be used, or is not there; the problem points below `pointer`.
    """
    return check_source(service, caller, settings.text, f"{pointer}/text")


def of_artifact(made_by: Job, settings: EvaluationSettings, text_identity: str | None) -> NewJob:
    """Return the job that measures what a job made, or will have made by then."""
    new = _job(
        settings,
        text_identity,
        tenant_id=made_by.tenant_id,
        model=made_by.spec["model"],
        model_identity=made_by.spec["model_identity"],
        artifact_job_id=made_by.id,
    )
    waits_for = () if made_by.state is JobState.SUCCEEDED else (made_by.id,)
    return replace(new, model_name=made_by.model_name, recipe_name=made_by.recipe_name, depends_on=waits_for)


def of_model(
    ref: ModelRef, model_identity: str, settings: EvaluationSettings, text_identity: str | None, *, tenant_id: str
) -> NewJob:
    """Return the job that measures an unquantized model."""
    new = _job(
        settings,
        text_identity,
        tenant_id=tenant_id,
        model=asdict(ref),
        model_identity=model_identity,
        artifact_job_id=None,
    )
    return replace(new, model_name=ref.name, recipe_name=UNQUANTIZED)


def _job(
    settings: EvaluationSettings,
    text_identity: str | None,
    *,
    tenant_id: str,
    model: dict[str, str | None],
    model_identity: str,
    artifact_job_id: str | None,
) -> NewJob:
    measured = {"text": asdict(settings.text), "seq_len": settings.seq_len, "windows": settings.windows}
    identity = {
        "kind": "evaluate",
        "algorithm_version": ALGORITHM_VERSION,
        "model_identity": model_identity,
        "artifact_job_id": artifact_job_id,
        "text_identity": text_identity,
        **measured,
    }
    spec = {
        "kind": "evaluate",
        "model": model,
        "model_identity": model_identity,
        "artifact_job_id": artifact_job_id,
        "text_identity": text_identity,
        "evaluation": measured,
    }
    return NewJob(
        tenant_id=tenant_id,
        kind="evaluate",
        spec=spec,
        fingerprint=fingerprint_of(identity),
        max_attempts=MAX_ATTEMPTS,
    )
