"""Finds the artifacts that the same request would make otherwise today, and plans to make them again."""

from dataclasses import replace
from typing import Literal

from duquant.config import PRESETS, Recipe
from duquant.errors import ConfigError
from infra.artifacts import ArtifactFilter
from infra.batches import NewItem
from infra.errors import ModelForbidden, ModelNotFound
from infra.jobs import Job
from service.auth import Caller
from service.context import Context
from service.errors import FieldProblem, ProblemError
from service.schemas.batches import OutdatedArtifact, RequantizeRequest
from service.schemas.models import ModelRequest
from service.submit import quantize_job, work_fingerprint, work_of
from service.zoo import MOST_ITEMS, Plan, all_artifacts, check_evaluation


def plan_requantization(
    service: Context, caller: Caller, request: RequantizeRequest
) -> tuple[list[OutdatedArtifact], Plan]:
    """Find the artifacts that the same request would make otherwise today, and plan to make them again.

    Raises:
        ProblemError: there are too many, or the text of the evaluation is refused.
    """
    wanted = ArtifactFilter(model_name=request.model, recipe_name=request.recipe, tag=request.tag)
    identities = check_evaluation(service, caller, request.evaluate)
    found, items = [], []
    planned = set()
    for artifact in all_artifacts(service, caller, wanted):
        job = service.jobs.get(artifact.job_id, caller.tenant_id)
        reason = outdated(job)
        if reason is None:
            continue
        found.append(
            OutdatedArtifact(
                artifact_id=artifact.id,
                model_name=artifact.model_name,
                recipe_name=artifact.recipe_name,
                reason=reason,
            )
        )
        item = _again(service, caller, request, job)
        # Two old versions of one artifact have one new one.
        work = item.job.fingerprint if item.job is not None else artifact.id
        if work not in planned:
            planned.add(work)
            items.append(item)
        # At once: there may be any number more.
        if len(items) > MOST_ITEMS:
            detail = f"more than {MOST_ITEMS} artifacts are outdated; narrow them by model, recipe or tag"
            raise ProblemError("validation-failed", detail, [FieldProblem(pointer="", detail=detail)])
    return found, Plan(items, request.evaluate, identities, request.queue)


def _again(service: Context, caller: Caller, request: RequantizeRequest, job: Job) -> NewItem:
    """Return the item that makes what a job made, as it would be made today."""
    try:
        recipe = current_recipe(Recipe.from_dict(job.spec["recipe"]))
        work = work_of(service, caller, ModelRequest(**job.spec["model"]), recipe)
    except (ConfigError, ModelForbidden, ModelNotFound, ProblemError) as error:
        detail = error.detail if isinstance(error, ProblemError) else str(error)
        return NewItem(model_name=job.model_name, recipe_name=job.recipe_name, detail=detail)
    new = replace(quantize_job(caller.tenant_id, work), priority=request.priority, queue=request.queue)
    return NewItem(model_name=job.model_name, recipe_name=job.recipe_name, job=new)


def current_recipe(recipe: Recipe) -> Recipe:
    """Return the preset of the recipe's name as it is today, with the recipe's calibration and gate; or the recipe."""
    if recipe.name not in PRESETS:
        return recipe
    return replace(PRESETS[recipe.name][1], calibration=recipe.calibration, quality_gate=recipe.quality_gate)


def outdated(job: Job) -> Literal["algorithm", "recipe"] | None:
    """Return why the request of a finished job would make another artifact today, if it would.

    Calibration is the request's own and not compared with the preset's.
    """
    try:
        recipe = Recipe.from_dict(job.spec["recipe"])
    except ConfigError:
        # It has a field that there is no more.
        return "recipe"
    if current_recipe(recipe).digest() != recipe.digest():
        return "recipe"
    spec = job.spec
    today = work_fingerprint(spec["model_identity"], recipe, spec.get("text_identity"), spec.get("quality_gate"))
    return None if today == job.fingerprint else "algorithm"
