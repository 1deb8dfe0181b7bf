"""Turns a request for many artifacts into a batch: finds the models, makes the jobs, measures what they make."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from duquant.config import Recipe
from infra.artifacts import Artifact, ArtifactFilter
from infra.batch_endings import note_if_finished
from infra.batches import Batch, NewItem
from infra.errors import ModelForbidden, ModelNotFound
from infra.jobs import Job, NewJob
from infra.models import ModelRef
from service import evaluate
from service.auth import Caller
from service.context import Context
from service.errors import FieldProblem, ProblemError
from service.schemas.batches import BatchEvaluation, BatchRequest, ModelPrefix, ModelSelector, ModelTag
from service.schemas.models import ModelRequest
from service.submit import Identities, quantize_job, work_of

MOST_ITEMS = 500
"""Models times recipes in one batch: they become jobs in one transaction."""
_PAGE = 200


@dataclass(frozen=True)
class Plan:
    """What a batch will do, checked as far as it can be without the database."""

    items: Sequence[NewItem]
    evaluation: BatchEvaluation | None
    identities: Identities | None
    queue: str
    force: bool = False


def plan_batch(service: Context, caller: Caller, request: BatchRequest) -> Plan:
    """Check a request. A model that cannot be used becomes an item without a job: the rest goes on.

    Raises:
        ProblemError: a selector finds nothing, there are too many items, or a text is refused.
    """
    recipes = list(dict.fromkeys(request.recipes))
    models: dict[ModelRef, None] = {}
    for ref in _models(service, caller, request):
        models[ref] = None
        # At once: what is left of the selectors may find any number more.
        if len(models) * len(recipes) > MOST_ITEMS:
            detail = f"the models times {len(recipes)} recipes are more than {MOST_ITEMS} in one batch"
            raise ProblemError("validation-failed", detail, [FieldProblem(pointer="/models", detail=detail)])
    identities = check_evaluation(service, caller, request.evaluate)
    items = [_item(service, caller, request, ref, recipe) for ref in models for recipe in recipes]
    return Plan(items, request.evaluate, identities, request.queue, force=request.force)


def check_evaluation(service: Context, caller: Caller, settings: BatchEvaluation | None) -> Identities | None:
    """Check the texts of a batch's evaluations, if it has any; return what changes when their bytes do.

    Raises:
        ProblemError: the text may not be used, or is not there.
    """
    return None if settings is None else evaluate.check_settings(service, caller, settings, "/evaluate")


def _item(service: Context, caller: Caller, request: BatchRequest, ref: ModelRef, recipe: Recipe) -> NewItem:
    model = ModelRequest(source=ref.source, name=ref.name, revision=ref.revision)
    try:
        work = work_of(service, caller, model, recipe, request.calibration)
    except (ModelForbidden, ModelNotFound) as error:
        return NewItem(model_name=ref.name, recipe_name=recipe.name, detail=str(error))
    job = replace(quantize_job(caller.tenant_id, work), priority=request.priority, queue=request.queue)
    return NewItem(model_name=job.model_name, recipe_name=job.recipe_name, job=job)


def _models(service: Context, caller: Caller, request: BatchRequest) -> Iterator[ModelRef]:
    shelf: list[ModelRef] | None = None
    found: Iterable[ModelRef]
    for index, selector in _once(request.models):
        match selector:
            case ModelPrefix():
                # A walk over the model folders serves all selectors of the request.
                shelf = [model.ref for model in service.shelf.list()] if shelf is None else shelf
                found = [ref for ref in shelf if ref.source == selector.source and ref.name.startswith(selector.prefix)]
            case ModelTag():
                found = _tagged(service, caller, selector.tag)
            case _:
                found = [ModelRef(selector.source, selector.name, selector.revision)]
        refs = iter(found)
        first = next(refs, None)
        if first is None:
            detail = _nothing(selector)
            raise ProblemError("model-not-found", detail, [FieldProblem(pointer=f"/models/{index}", detail=detail)])
        yield from chain([first], refs)


def _nothing(selector: ModelSelector) -> str:
    """Say what a selector has looked for in vain."""
    match selector:
        case ModelPrefix():
            return f"no {selector.source} model of this server has a name that begins with {selector.prefix!r}"
        case ModelTag() if selector.tag.endswith("*"):
            return f"no artifact of this project has a tag that begins with {selector.tag.removesuffix('*')!r}"
        case ModelTag():
            return f"no artifact of this project has a tag {selector.tag!r}"
    raise AssertionError(selector)  # one that is named stands for itself


def _once(selectors: Sequence[ModelSelector]) -> Iterator[tuple[int, ModelSelector]]:
    """Yield selectors with their places, those that say the same only the first time."""
    seen = set()
    for index, selector in enumerate(selectors):
        if (words := selector.model_dump_json()) not in seen:
            seen.add(words)
            yield index, selector


def _tagged(service: Context, caller: Caller, tag: str) -> Iterator[ModelRef]:
    found = all_artifacts(service, caller, ArtifactFilter(tag=tag))
    while some := list(islice(found, _PAGE)):
        for job in service.artifacts.makers(some).values():
            yield ModelRef(**job.spec["model"])


def all_artifacts(service: Context, caller: Caller, wanted: ArtifactFilter) -> Iterator[Artifact]:
    """Yield every artifact that the filter lets through, newest first."""
    before = None
    while True:
        page = service.artifacts.page(caller.tenant_id, wanted, limit=_PAGE, before=before)
        yield from page
        if len(page) < _PAGE:
            return
        before = (page[-1].created_at, page[-1].id)


def add_batch(service: Context, caller: Caller, name: str, spec: Mapping[str, Any], plan: Plan) -> Batch:
    """Make the batch and its jobs. To be called inside a transaction, so that it is all or nothing.

    Raises:
        QueueNotFound: no such queue.
        QuotaExceeded: the tenant has as much as it may have.
    """
    batch = service.batches.add(caller.tenant_id, name, spec)
    made = service.batches.add_items(batch, plan.items, force=plan.force, actor=caller.actor)
    if plan.evaluation is not None and plan.identities is not None:
        jobs = [job for job in made if job is not None]
        measuring = [
            NewItem(model_name=new.model_name, recipe_name=new.recipe_name, job=new)
            for new in _evaluations(jobs, plan.evaluation, plan.identities, plan.queue)
        ]
        made = [*made, *service.batches.add_items(batch, measuring, actor=caller.actor)]
    if all(job is None or job.state.is_terminal for job in made):
        # All of it is there, or refused: nobody has to wait until somebody notices.
        note_if_finished(service.engine, batch.id)
        return service.batches.get(batch.id, caller.tenant_id)
    return batch


def _evaluations(
    made: Sequence[Job], settings: BatchEvaluation, identities: Identities, queue: str
) -> Iterator[NewJob]:
    """Yield the evaluations of what the jobs make, and of their models.

    They wait in the batch's queue: that of a job which was there already may be gone.
    """
    seen = set()
    for job in made:
        identity = job.spec["model_identity"]
        options: dict[str, Any] = {"priority": job.priority, "queue": queue}
        if settings.baseline and identity not in seen:
            seen.add(identity)
            ref = ModelRef(**job.spec["model"])
            new = evaluate.of_model(ref, identity, settings, identities, tenant_id=job.tenant_id)
            yield replace(new, **options)
        yield replace(evaluate.of_artifact(job, settings, identities), **options)
