"""A quantization that is killed for good, as a process."""

import signal
from pathlib import Path

import pytest
from support.killed import quantizing
from support.tiny_models import make_tiny_model

from duquant.config import CalibrationConfig, Recipe, TextSource, TransformConfig

pytestmark = pytest.mark.integration

RECIPE = Recipe(
    transform=TransformConfig(rotation="hadamard", permutation="zigzag", block_size=16),
    calibration=CalibrationConfig(source=TextSource(kind="random"), samples=2, seq_len=16, shards=2, search_tokens=16),
)


@pytest.mark.parametrize("phase", ["sweep layer 1", "quantize layer 2"])
def test_killed_run_leaves_no_artifact_and_the_next_one_succeeds(tmp_path: Path, phase: str) -> None:
    model, out = make_tiny_model(tmp_path / "model", num_hidden_layers=3), tmp_path / "out"
    with quantizing(model, out, RECIPE, pause_s=0.1) as (said, process):
        while phase not in said.recv():
            assert process.is_alive()
        process.kill()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    assert not out.exists()

    with quantizing(model, out, RECIPE) as (_, process):
        process.join(120)
        assert process.exitcode == 0
    assert (out / "manifest.json").exists()
