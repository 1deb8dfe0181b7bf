"""What recipes cost beside each other."""

from collections import Counter
from dataclasses import replace

import pytest

from duquant.config import DistillationConfig, Recipe
from duquant.pipeline import plan
from infra.history import PastJob
from service.estimates import layer_runs, relative_work

RECIPES = [
    Recipe(),
    Recipe(input_mode="quantized"),
    Recipe(input_mode="staged:2"),
    Recipe(input_mode="staged:3"),
    Recipe(refine_passes=1),
    Recipe(input_mode="staged:2", refine_passes=2),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.input_mode}+{recipe.refine_passes}")
@pytest.mark.parametrize("layers", [1, 2, 5, 7])
def test_layers_are_counted_as_the_plan_runs_them(recipe: Recipe, layers: int) -> None:
    passes = [recipe.stages(layers, index) for index in range(recipe.refine_passes + 1)]
    kinds = Counter(step.id.kind for step in plan(layers=layers, shards=1, passes=passes))
    forwards = kinds["sweep"] + kinds["observe"] + kinds["propagate"]
    assert layer_runs(recipe, layers) == (forwards, kinds["draft"] + kinds["quantize"])


def past_job(recipe: Recipe) -> PastJob:
    """Return a job of 10 layers: 20 s of quantizing and 10 s of forward passes."""
    return PastJob(
        recipe=recipe.to_dict(),
        model_name="tiny",
        seconds=60.0,
        gpu_seconds=30.0,
        size_bytes=1000,
        layers=10,
        layer_seconds=20.0,
        layer_bytes=800,
    )


@pytest.mark.parametrize(
    ("recipe", "gpu_seconds"),
    [
        (Recipe(), 30.0),
        (Recipe(seed=1), 30.0),
        # 10 + 9 layers run instead of 10.
        (Recipe(input_mode="quantized"), 20 + 19.0),
        # A first pass over 9 layers, and the whole chain again.
        (Recipe(refine_passes=1), 38 + 9 + 19.0),
        # As many tokens as the text has, five times.
        (Recipe(distillation=DistillationConfig(steps=32, batch=8, seq_len=256)), 20 + 10 + 50.0),
    ],
)
def test_work_grows_with_how_often_layers_run_and_are_quantized(recipe: Recipe, gpu_seconds: float) -> None:
    assert 30 * relative_work(past_job(Recipe()), recipe) == pytest.approx(gpu_seconds)


def test_a_chain_tells_what_independent_layers_take() -> None:
    chain = Recipe(input_mode="quantized")
    assert 30 * relative_work(past_job(chain), Recipe()) == pytest.approx(20 + 10 * 10 / 19)
    assert relative_work(past_job(chain), chain) == 1


def test_jobs_that_tell_nothing_are_taken_as_they_are() -> None:
    unreadable = replace(past_job(Recipe()), recipe={"from": "another version"})
    empty = replace(past_job(Recipe()), layers=0)
    free = replace(past_job(Recipe()), gpu_seconds=0.0, layer_seconds=0.0)
    for job in (unreadable, empty, free):
        assert relative_work(job, Recipe(refine_passes=1)) == 1
