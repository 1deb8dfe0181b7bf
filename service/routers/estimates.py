"""/v1/estimates: what a job would take."""

from fastapi import APIRouter

from service.api_route import ApiRoute
from service.auth import Reader
from service.bodies import BODY_PROBLEMS, JSON_BODY
from service.context import Service
from service.errors import COMMON, responses
from service.estimates import estimate
from service.examples import JOB
from service.openapi import shows, takes
from service.schemas.estimates import EstimateRequest, EstimateView
from service.submit import work_of

router = APIRouter(prefix="/v1", tags=["jobs"], route_class=ApiRoute)

_ESTIMATE = {
    "reuses": None,
    "fingerprint": JOB["fingerprint"],
    "layers": 32,
    "time": {"seconds": 812.0, "gpu_seconds": 790.5, "basis": "same_work", "jobs": 3},
    "size": {"bytes": 3_900_000_000, "basis": "same_work", "jobs": 3},
}


@router.post(
    "/estimates",
    operation_id="estimateJob",
    summary="Estimate a job's time and size",
    dependencies=[JSON_BODY],
    responses={
        200: shows(_ESTIMATE),
        **responses(
            *COMMON,
            *BODY_PROBLEMS,
            "model-forbidden",
            "model-not-found",
            "text-forbidden",
            "text-not-found",
        ),
    },
    openapi_extra=takes(preset={"model": {"source": "local", "name": "llama/7b"}, "recipe": "duquant-fast"}),
)
def estimate_job(service: Service, caller: Reader, body: EstimateRequest) -> EstimateView:
    """Estimate a job from this project's past ones, and say what the estimate rests on. Nothing is queued."""
    work = work_of(service, caller, body.model, body.recipe, body.calibration)
    shape = service.shelf.measure(work.ref).shape
    time, size = estimate(service.history, caller.tenant_id, work.ref.name, work.recipe, shape)
    return EstimateView(
        reuses=service.search.same_work(caller.tenant_id, work.fingerprint),
        fingerprint=work.fingerprint,
        layers=None if shape is None else shape.layers,
        time=time,
        size=size,
    )
