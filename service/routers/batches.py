"""/v1/batches: many models with many recipes in one request."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response

from infra.batch_search import BatchFilter
from infra.batches import Batch
from infra.errors import QueueNotFound
from service import idempotency
from service.api_route import ApiRoute
from service.auth import BatchWriter, Caller, Reader
from service.batch_views import batch_table, batch_view, batch_views
from service.bodies import BODY_PROBLEMS, JSON_BODY
from service.context import Context, Service
from service.errors import COMMON, FieldProblem, ProblemError, responses
from service.filters import batch_filter
from service.idempotency import Made, Once, OnceRequired
from service.openapi import shows, takes
from service.paging import Cursor, Limit, cut, read_cursor
from service.requantize import plan_requantization
from service.schemas.batches import (
    BatchPage,
    BatchRequest,
    BatchTable,
    BatchView,
    OutdatedArtifact,
    Requantized,
    RequantizeRequest,
)
from service.zoo import Plan, add_batch, plan_batch
from service.zoo_examples import BATCH, BATCH_REQUESTS, BATCH_TABLE, REQUANTIZED

router = APIRouter(prefix="/v1", tags=["batches"], route_class=ApiRoute)

BatchId = Annotated[str, Path(examples=["batch_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"])]

_ONE = (*COMMON, "batch-not-found")
_SUBMIT = (
    *COMMON,
    *BODY_PROBLEMS,
    *idempotency.PROBLEMS,
    "quota-exceeded",
    "text-forbidden",
    "text-not-found",
)


async def _asked(request: Request) -> dict[str, Any]:
    """Return the request as it was sent, to be shown with the batch."""
    asked: dict[str, Any] = await request.json()
    return asked


Asked = Annotated[dict[str, Any], Depends(_asked)]


@router.post(
    "/batches",
    operation_id="submitBatch",
    summary="Submit a batch",
    status_code=201,
    response_model=BatchView,
    dependencies=[JSON_BODY],
    responses={
        201: shows(BATCH, "The batch was made; Location names it", headers=idempotency.HEADERS),
        **responses(*_SUBMIT, "idempotency-key-required", "model-not-found"),
    },
    openapi_extra={"requestBody": {"content": {"application/json": {"examples": BATCH_REQUESTS}}}},
)
def submit_batch(
    service: Service, caller: BatchWriter, body: BatchRequest, asked: Asked, once: OnceRequired
) -> Response:
    """Queue a job for every model with every recipe.

    What is there already for the same model and recipe is reused, unless `force` is set. A model that cannot be used
    does not stop the rest: its rows of the table say why.
    """

    def make(plan: Plan) -> Made:
        view = _add(service, caller, body.name, asked, plan)
        return Made(view, location=f"/v1/batches/{view.id}")

    return once.answer(caller, lambda: plan_batch(service, caller, body), make)


@router.post(
    "/batches:requantize",
    operation_id="requantize",
    summary="Make outdated artifacts again",
    status_code=201,
    response_model=Requantized,
    dependencies=[JSON_BODY],
    responses={
        200: shows(
            {**REQUANTIZED, "batch": None},
            "Nothing was made: a dry run, or nothing is outdated",
            model=Requantized,
            headers=idempotency.HEADERS,
        ),
        201: shows(REQUANTIZED, "The batch was made; Location names it", headers=idempotency.HEADERS),
        **responses(*_SUBMIT, "idempotency-key-required"),
    },
    openapi_extra=takes(dry_run={"dry_run": True}),
)
def requantize(
    service: Service, caller: BatchWriter, body: RequantizeRequest, asked: Asked, once: OnceRequired
) -> Response:
    """Queue a batch that makes again what an older algorithm or an older version of a preset has made.

    The new artifacts stand beside the old ones, which keep their tags.
    """

    def make(found: tuple[list[OutdatedArtifact], Plan]) -> Made:
        items, plan = found
        if body.dry_run or not items:
            return Made(Requantized(items=items, batch=None), status=200)
        view = _add(service, caller, body.name, asked, plan)
        return Made(Requantized(items=items, batch=view), location=f"/v1/batches/{view.id}")

    return once.answer(caller, lambda: plan_requantization(service, caller, body), make)


def _add(service: Context, caller: Caller, name: str, asked: dict[str, Any], plan: Plan) -> BatchView:
    try:
        return batch_view(service, add_batch(service, caller, name, asked, plan))
    except QueueNotFound as error:
        detail = str(error)
        raise ProblemError("validation-failed", detail, [FieldProblem(pointer="/queue", detail=detail)]) from error


@router.get(
    "/batches",
    operation_id="listBatches",
    summary="List batches, newest first",
    responses={200: shows({"items": [BATCH], "next_cursor": None}), **responses(*COMMON)},
)
def list_batches(
    service: Service,
    caller: Reader,
    wanted: Annotated[BatchFilter, Depends(batch_filter)],
    limit: Limit = 50,
    cursor: Cursor = None,
) -> BatchPage:
    """List this project's batches by pages, each with how far it is."""
    found = service.batches.page(caller.tenant_id, wanted, limit=limit + 1, before=read_cursor(cursor, "batch_"))
    page, next_cursor = cut(found, limit)
    return BatchPage(items=batch_views(service, page), next_cursor=next_cursor)


@router.get(
    "/batches/{batch_id}",
    operation_id="getBatch",
    summary="Read a batch",
    responses={200: shows(BATCH), **responses(*_ONE)},
)
def get_batch(service: Service, caller: Reader, batch_id: BatchId) -> BatchView:
    """Read how far a batch is."""
    return batch_view(service, service.batches.get(batch_id, caller.tenant_id))


@router.get(
    "/batches/{batch_id}/table",
    operation_id="getBatchTable",
    summary="Compare what a batch has made",
    responses={200: shows(BATCH_TABLE), **responses(*_ONE)},
)
def get_batch_table(service: Service, caller: Reader, batch_id: BatchId) -> BatchTable:
    """Show every model with every recipe: its state, size, time and what was measured."""
    return batch_table(service, service.batches.get(batch_id, caller.tenant_id))


@router.post(
    "/batches/{batch_id}:cancel",
    operation_id="cancelBatch",
    summary="Cancel a batch",
    responses={200: shows(BATCH, "What has not ended is cancelled, or stops at its next beat"), **responses(*_ONE)},
)
def cancel_batch(service: Service, caller: BatchWriter, batch_id: BatchId) -> BatchView:
    """Cancel the jobs that the batch made and that have not ended.

    Jobs that it found there go on, and so do those that another batch counts on, until that is cancelled, too. A batch
    that has ended stays as it is.
    """
    return batch_view(service, service.batches.cancel(batch_id, tenant_id=caller.tenant_id, actor=caller.actor))


@router.post(
    "/batches/{batch_id}:retry-failed",
    operation_id="retryBatch",
    summary="Run the failed jobs of a batch again",
    response_model=BatchView,
    responses={
        200: shows(BATCH, "What failed or was cancelled is waiting again", headers=idempotency.HEADERS),
        **responses(*_ONE, *idempotency.PROBLEMS, "queue-not-found", "quota-exceeded"),
    },
)
def retry_batch(service: Service, caller: BatchWriter, batch_id: BatchId, once: Once) -> Response:
    """Queue again what failed or was cancelled. Each job goes on from the layers that it has finished.

    What was refused has no job that could run again: submit the batch again when what it lacks is there.
    """

    def retry() -> Batch:
        # Not in the transaction of the answer, which would hold up the rest: two requests at once may both do it, which
        # is harmless.
        return service.batches.retry_failed(batch_id, tenant_id=caller.tenant_id, actor=caller.actor)[0]

    def show(batch: Batch) -> Made:
        return Made(batch_view(service, batch), status=200, location=f"/v1/batches/{batch.id}")

    return once.answer(caller, retry, show, look_first=True)
