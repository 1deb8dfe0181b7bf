"""Recipes with a step or with tensors of their own, as jobs: the bytes that the library makes in one process."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.dying import DyingWorker, die, made_here, shards_of

from duquant.config import DistillationConfig, LearningConfig, Recipe, preset
from duquant.pipeline import StepId
from infra.jobs import JobState
from workers.executors.local import LocalExecutor
from workers.job_run import JobRun

pytestmark = pytest.mark.integration


@pytest.fixture
def recipes(side) -> dict[str, Recipe]:
    """The presets, with budgets and sizes for a tiny model."""
    calibration = side.recipe.calibration
    spinquant, atom = preset("spinquant"), preset("atom")
    return {
        "spinquant": replace(
            spinquant, calibration=calibration, learning=LearningConfig(samples=2, seq_len=16, epochs=1)
        ),
        "atom": replace(
            atom,
            calibration=calibration,
            weight=replace(atom.weight, group_size=16),
            activation=replace(atom.activation, group_size=16),
            outlier_channels=16,
        ),
        "distilled": replace(
            side.recipe, name="distilled", distillation=DistillationConfig(steps=2, batch=2, seq_len=16)
        ),
    }


def test_outliers_make_the_bytes_of_the_library(side, pull, recipes, model_root: Path, tmp_path: Path) -> None:
    side.submit(recipes["atom"])
    job = side.run_one()
    assert job.state is JobState.SUCCEEDED, job.detail
    assert shards_of(pull(job, tmp_path / "job")) == made_here(recipes["atom"], model_root, tmp_path / "here")


def test_a_killed_job_does_not_learn_its_rotations_again(
    side, pull, recipes, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = made_here(recipes["spinquant"], model_root, tmp_path / "here")
    side.submit(recipes["spinquant"])
    die(side, StepId("quantize", 1))
    monkeypatch.setattr(
        "duquant.pipeline.rotations.learn_rotations", lambda *_: pytest.fail("the rotations were learned again")
    )
    job = side.run_one()
    assert job.state is JobState.SUCCEEDED, job.detail
    assert shards_of(pull(job, tmp_path / "job")) == expected


def test_layers_of_lost_rotations_are_quantized_again(side, pull, recipes, model_root: Path, tmp_path: Path) -> None:
    side.submit(recipes["spinquant"])
    first = die(side, StepId("quantize", 1))
    assert StepId("quantize", 0) in first.did
    (rotations,) = (tmp_path / "work").glob("**/rotations.safetensors")
    rotations.unlink()
    again = DyingWorker(side.storage)
    job = side.run_one(LocalExecutor(again))
    assert job.state is JobState.SUCCEEDED, job.detail
    assert {StepId("rotate"), StepId("quantize", 0), StepId("extra")} <= set(again.did)
    expected = made_here(recipes["spinquant"], model_root, tmp_path / "here")
    assert shards_of(pull(job, tmp_path / "job")) == expected


def test_a_killed_job_does_not_distill_again(
    side, pull, recipes, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = made_here(recipes["distilled"], model_root, tmp_path / "here")
    job = side.submit(recipes["distilled"])
    die(side, StepId("distill"))
    assert side.store.get(job.id).phase == "distill"
    first = die(side, StepId("quantize", 1))
    assert StepId("distill") in first.did
    monkeypatch.setattr("duquant.pipeline.run.distill", lambda *_: pytest.fail("the network learned again"))
    job = side.run_one()
    assert job.state is JobState.SUCCEEDED, job.detail
    assert shards_of(pull(job, tmp_path / "job")) == expected


def test_layers_of_a_lost_distillation_are_made_again(side, pull, recipes, model_root: Path, tmp_path: Path) -> None:
    side.submit(recipes["distilled"])
    first = die(side, StepId("quantize", 1))
    assert StepId("quantize", 0) in first.did
    (distilled,) = (tmp_path / "work").glob("**/distilled")
    shutil.rmtree(distilled)
    again = DyingWorker(side.storage)
    job = side.run_one(LocalExecutor(again))
    assert job.state is JobState.SUCCEEDED, job.detail
    assert {StepId("distill"), StepId("quantize", 0), StepId("extra")} <= set(again.did)
    expected = made_here(recipes["distilled"], model_root, tmp_path / "here")
    assert shards_of(pull(job, tmp_path / "job")) == expected


@pytest.mark.parametrize("name", ["distilled", "spinquant"])
def test_a_job_whose_layers_are_all_finished_is_published_without_its_work_directory(
    side, pull, recipes, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    side.submit(recipes[name])

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JobRun, "_publish", end)
        die(side, StepId("quantize", 99))
    (scratch,) = (tmp_path / "work").glob("job_*")
    shutil.rmtree(scratch)
    again = DyingWorker(side.storage)
    job = side.run_one(LocalExecutor(again))
    assert job.state is JobState.SUCCEEDED, job.detail
    assert again.did == []
    assert shards_of(pull(job, tmp_path / "job")) == made_here(recipes[name], model_root, tmp_path / "here")
