"""Jobs whose layers are calibrated on what quantized layers give: the same bytes whatever happens to them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.dying import DyingWorker, die, made_here, shards_of

from duquant.config import Recipe
from duquant.pipeline import StepId
from infra.jobs import JobState
from workers.executors.local import LocalExecutor

pytestmark = pytest.mark.integration

MODES = (("quantized", 0), ("staged:2", 1))


@pytest.fixture(scope="module")
def expected(model_root: Path, tmp_path_factory: pytest.TempPathFactory):
    """The shards that the library makes, in one process."""
    known: dict[str, dict[str, bytes]] = {}

    def make(recipe: Recipe) -> dict[str, bytes]:
        if recipe.digest() not in known:
            out = tmp_path_factory.mktemp("local") / "out"
            known[recipe.digest()] = made_here(recipe, model_root, out)
        return known[recipe.digest()]

    return make


@pytest.mark.parametrize(("mode", "passes"), MODES)
def test_a_job_gives_the_library_s_bytes_and_counts_all_passes(side, pull, tmp_path, expected, mode, passes):
    recipe = replace(side.recipe, input_mode=mode, refine_passes=passes)
    side.submit(recipe)
    job = side.run_one()
    assert job.state is JobState.SUCCEEDED, job.detail
    assert job.progress_done == job.progress_total == 4 + 3 * passes
    assert shards_of(pull(job, tmp_path / "served")) == expected(recipe)
    assert not list((tmp_path / "work").glob("job_*")), "scratch files stay behind"


@pytest.mark.parametrize("at", [StepId("observe", 2, 1), StepId("propagate", 2, 2), StepId("quantize", 2)])
def test_a_killed_chain_goes_on_with_what_is_missing(side, pull, tmp_path, expected, at):
    recipe = replace(side.recipe, input_mode="quantized")
    side.submit(recipe)
    first = die(side, at)
    again = DyingWorker(side.storage)
    job = side.run_one(LocalExecutor(again))
    assert job.state is JobState.SUCCEEDED, job.detail
    assert not set(first.did) & set(again.did), "a step was done twice"
    assert shards_of(pull(job, tmp_path / "resumed")) == expected(recipe)


@pytest.mark.parametrize(("mode", "passes"), MODES)
def test_a_chain_whose_work_directory_is_lost_runs_over_the_layers_that_are_stored(
    side, pull, tmp_path, expected, mode, passes
):
    recipe = replace(side.recipe, input_mode=mode, refine_passes=passes)
    side.submit(recipe)
    first = die(side, StepId("quantize", 3, pass_index=passes))
    shutil.rmtree(tmp_path / "work")
    again = DyingWorker(side.storage)
    job = side.run_one(LocalExecutor(again))
    assert job.state is JobState.SUCCEEDED, job.detail
    committed = {step.layer for step in first.did if step.kind == "quantize"}
    assert committed == {0, 1, 2}
    assert [step.layer for step in again.did if step.kind == "quantize"] == [3]
    # With a second pass, drafts have to be made again: they are nowhere else.
    assert any(step.kind == "draft" for step in again.did) == bool(passes)
    assert shards_of(pull(job, tmp_path / "resumed")) == expected(recipe)


def test_a_stored_layer_that_is_lost_is_made_again_from_the_chain_before_it(side, pull, tmp_path, expected):
    recipe = replace(side.recipe, input_mode="quantized")
    job = side.submit(recipe)
    die(side, StepId("quantize", 3))
    lost = next(row for row in side.store.layers(job.id) if row.layer == 1)
    side.storage.delete(lost.key)
    again = DyingWorker(side.storage)
    job = side.run_one(LocalExecutor(again))
    assert job.state is JobState.SUCCEEDED, job.detail
    assert sorted(step.layer for step in again.did if step.kind == "quantize") == [1, 3]
    assert shards_of(pull(job, tmp_path / "resumed")) == expected(recipe)
