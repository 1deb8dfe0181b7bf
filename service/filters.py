"""What lists can be narrowed by, as query parameters."""

from typing import Annotated

from fastapi import Query
from pydantic import StringConstraints

from infra.batch_progress import BatchState
from infra.batch_search import BatchFilter
from infra.job_search import JobFilter
from infra.jobs import JobKind, JobState
from service.errors import FieldProblem, ProblemError
from service.schemas.common import Moment, milliseconds

LABEL = r"^[A-Za-z0-9_.-]{1,63}=[^\x00]{1,200}$"
Name = Annotated[str | None, Query(min_length=1, max_length=400)]
BatchStates = Annotated[list[BatchState], Query(max_length=5, description="Only batches in one of these states")]
CreatedFrom = Annotated[Moment | None, Query(description="Only what was made at this time or later")]
CreatedUntil = Annotated[Moment | None, Query(description="Only what was made before this time")]


async def job_filter(
    state: Annotated[list[JobState], Query(max_length=8, description="Only jobs in one of these states")] = [],  # noqa: B006  FastAPI copies it
    kind: Annotated[JobKind | None, Query(description="Only jobs of this kind")] = None,
    model: Annotated[Name, Query(description="Only jobs of the model with this name")] = None,
    recipe: Annotated[Name, Query(description="Only jobs with the recipe of this name")] = None,
    queue: Annotated[Name, Query(description="Only jobs of this queue")] = None,
    batch: Annotated[Name, Query(description="Only jobs of the batch with this id")] = None,
    reason: Annotated[Name, Query(description="Only jobs that failed for this reason")] = None,
    label: Annotated[
        list[Annotated[str, StringConstraints(pattern=LABEL)]],
        Query(max_length=5, description="Only jobs with this label, as name=value; all of them, when several"),
    ] = [],  # noqa: B006  as above
    created_from: CreatedFrom = None,
    created_until: CreatedUntil = None,
) -> JobFilter:
    """Read the filter of a list of jobs."""
    names = {"model": model, "recipe": recipe, "queue": queue, "batch": batch, "reason": reason}
    for name, value in names.items():
        require_text(name, value)
    return JobFilter(
        states=state,
        kind=kind,
        model_name=model,
        recipe_name=recipe,
        queue=queue,
        batch_id=batch,
        reason=reason,
        labels=dict(each.split("=", 1) for each in label),
        created_from=milliseconds(created_from),
        created_until=milliseconds(created_until),
    )


async def batch_filter(
    state: BatchStates = [],  # noqa: B006  as above
    name: Annotated[Name, Query(description="Only batches with this name")] = None,
    model: Annotated[Name, Query(description="Only batches with work on the model of this name")] = None,
    recipe: Annotated[
        Name, Query(description="Only batches with work with the recipe of this name; with `model`, on that model")
    ] = None,
    created_from: CreatedFrom = None,
    created_until: CreatedUntil = None,
) -> BatchFilter:
    """Read the filter of a list of batches."""
    for each, value in {"name": name, "model": model, "recipe": recipe}.items():
        require_text(each, value)
    return BatchFilter(
        states=state,
        name=name,
        model_name=model,
        recipe_name=recipe,
        created_from=milliseconds(created_from),
        created_until=milliseconds(created_until),
    )


def require_text(name: str, value: str | None) -> None:
    """Refuse a query parameter that no database could compare with.

    Raises:
        ProblemError: it holds a NUL character.
    """
    if value is not None and "\0" in value:
        detail = f"{name} must not hold NUL characters"
        raise ProblemError(
            "validation-failed", detail, [FieldProblem(location="query", pointer=f"/{name}", detail=detail)]
        )
