"""Estimates from what past jobs took. Each says what it rests on; without any ground there is no number."""

from collections.abc import Sequence
from statistics import median

from duquant.config import Recipe
from duquant.errors import ConfigError
from infra.history import History, PastJob
from infra.model_shelf import ModelShape
from service.schemas.estimates import SizeEstimate, TimeEstimate


def estimate(
    history: History, tenant_id: str, model_name: str, recipe: Recipe, shape: ModelShape | None
) -> tuple[TimeEstimate, SizeEstimate]:
    """Estimate how long a job runs and how large its artifact becomes, from the tenant's own past jobs."""
    of_model = history.quantizations(tenant_id, model_name=model_name)
    same = _with_recipe(of_model, recipe)
    size = _size(same, of_model, recipe, shape)
    if same:
        return _time(same, "same_work"), size
    others = _with_recipe(history.quantizations(tenant_id, recipe_name=recipe.name), recipe)
    if shape is not None and (scaled := _scaled(others, recipe, shape)) is not None:
        return scaled, size
    if of_model:
        return _time(of_model, "same_model", [relative_work(job, recipe) for job in of_model]), size
    return TimeEstimate(seconds=None, gpu_seconds=None, basis="none", jobs=0), size


def _time(past: Sequence[PastJob], basis: str, factors: Sequence[float] | None = None) -> TimeEstimate:
    scaled = list(zip(past, factors or [1.0] * len(past), strict=True))
    return TimeEstimate.model_validate(
        {
            "seconds": round(median(job.seconds * factor for job, factor in scaled), 1),
            "gpu_seconds": round(median(job.gpu_seconds * factor for job, factor in scaled), 1),
            "basis": basis,
            "jobs": len(past),
        }
    )


_RUNS_OF_A_STEP = 5
"""A step of distillation runs a token forwards unquantized, forwards, forwards again, and twice as long backwards."""


def relative_work(job: PastJob, recipe: Recipe) -> float:
    """Return the work of a recipe over that of a past job: chains and further passes run the layers more often.

    What quantizing a layer costs is taken as equal. A chain's layers also wait for each other, which no past job tells.
    """
    past = _recipe(job)
    if past is None or not job.layers:
        return 1.0
    (forwards, quantized), (past_forwards, past_quantized) = (
        layer_runs(recipe, job.layers),
        layer_runs(past, job.layers),
    )
    quantizing = job.layer_seconds * past_quantized / job.layers
    running = max(job.gpu_seconds - quantizing, 0.0)
    if quantizing + running <= 0:
        return 1.0
    work = quantizing * quantized / past_quantized + running * forwards / past_forwards
    return work / (quantizing + running)


def layer_runs(recipe: Recipe, layers: int) -> tuple[int, int]:
    """Return how many layers are run over the calibration text, and how many are quantized, all passes together."""
    forwards = quantized = 0
    for index in range(recipe.refine_passes + 1):
        stages = recipe.stages(layers, index)
        if stages:
            made = sum(len(stage) for stage in stages)
            # Unquantized as far as the last chain's start; behind each start unquantized for the statistics, and
            # quantized for the inputs of the next.
            forwards += stages[-1].start + 1 + 2 * (made - len(stages))
            quantized += made
    if recipe.distills:
        learned_on = recipe.distillation.steps * recipe.distillation.batch * recipe.distillation.seq_len
        text = recipe.calibration.samples * recipe.calibration.seq_len
        forwards += round(layers * _RUNS_OF_A_STEP * learned_on / text)
    return forwards, quantized


def _scaled(past: Sequence[PastJob], recipe: Recipe, shape: ModelShape) -> TimeEstimate | None:
    """Scale other models' times by the size of the layers: what a layer costs grows with its weights."""
    usable = [job for job in past if job.layer_bytes > 0 and job.seconds > 0]
    if not usable:
        return None
    layer_bytes = shape.linear_params * recipe.weight.bits / 8
    return TimeEstimate(
        seconds=round(median(job.seconds / job.layer_bytes for job in usable) * layer_bytes, 1),
        gpu_seconds=round(median(job.gpu_seconds / job.layer_bytes for job in usable) * layer_bytes, 1),
        basis="same_recipe",
        jobs=len(usable),
    )


def _size(
    same: Sequence[PastJob], of_model: Sequence[PastJob], recipe: Recipe, shape: ModelShape | None
) -> SizeEstimate:
    if same:
        return SizeEstimate(bytes=round(median(job.size_bytes for job in same)), basis="same_work", jobs=len(same))
    as_many_bits = [job for job in of_model if _bits(job) == recipe.weight.bits]
    if as_many_bits:
        size = round(median(job.size_bytes for job in as_many_bits))
        return SizeEstimate(bytes=size, basis="same_model", jobs=len(as_many_bits))
    if shape is not None:
        return SizeEstimate(bytes=shape.quantized_bytes(recipe.weight.bits), basis="shape", jobs=0)
    return SizeEstimate(bytes=None, basis="none", jobs=0)


def _bits(job: PastJob) -> int | None:
    past = _recipe(job)
    return None if past is None else past.weight.bits


def _with_recipe(past: Sequence[PastJob], recipe: Recipe) -> Sequence[PastJob]:
    digest = recipe.digest()
    return [job for job in past if (made_with := _recipe(job)) is not None and made_with.digest() == digest]


def _recipe(job: PastJob) -> Recipe | None:
    try:
        return Recipe.from_dict(job.recipe)
    except ConfigError:  # written by a version whose recipes had other fields
        return None
