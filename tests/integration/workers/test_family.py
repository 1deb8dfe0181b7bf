"""Recipes with a step or with tensors of their own, as jobs: the bytes that the library makes in one process."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from duquant.config import LearningConfig, Recipe, TextSource, preset
from duquant.pipeline import StepId, quantize_model
from infra.jobs import JobState
from workers.executors.local import LocalExecutor
from workers.layer_worker import LayerWorker

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
    }


def shards_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def made_here(recipe: Recipe, model_root: Path, out: Path) -> dict[str, bytes]:
    source = TextSource(kind="file", name=str(model_root / "text.txt"))
    local = replace(recipe, calibration=replace(recipe.calibration, source=source))
    quantize_model(str(model_root / "tiny"), out, local, device="cpu", threads=1)
    return shards_of(out)


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
    worker = LayerWorker(side.storage, threads=1)
    do = worker.do

    def dies_at_the_second_layer(task):
        if task.step == StepId("quantize", 1):
            raise KeyboardInterrupt
        return do(task)

    monkeypatch.setattr(worker, "do", dies_at_the_second_layer)
    claim = side.store.claim("first", lease_seconds=600)
    with pytest.raises(KeyboardInterrupt):
        side.dispatcher(LocalExecutor(worker), beat_seconds=3600).run_job(claim)
    side.store.heartbeat(claim, lease_seconds=0.1)
    while side.store.sweep() == 0:
        time.sleep(0.05)
    monkeypatch.setattr(
        "duquant.pipeline.rotations.learn_rotations", lambda *_: pytest.fail("the rotations were learned again")
    )
    job = side.run_one()
    assert job.state is JobState.SUCCEEDED, job.detail
    assert shards_of(pull(job, tmp_path / "job")) == expected
