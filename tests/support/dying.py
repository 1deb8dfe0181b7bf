"""Jobs whose process dies at a step, and the bytes that they have to have all the same."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duquant.config import Recipe, TextSource
from duquant.pipeline import StepId, quantize_model
from infra.storage import ObjectStore
from workers.executors.local import LocalExecutor
from workers.layer_worker import LayerWorker
from workers.tasks import Completion, Task


def shards_of(directory: Path) -> dict[str, bytes]:
    """Return the shards of an artifact."""
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def made_here(recipe: Recipe, model_root: Path, out: Path) -> dict[str, bytes]:
    """Return the shards that the library makes of the tiny model, in this process."""
    source = TextSource(kind="file", name=str(model_root / "text.txt"))
    local = replace(recipe, calibration=replace(recipe.calibration, source=source))
    quantize_model(str(model_root / "tiny"), out, local, device="cpu", threads=1)
    return shards_of(out)


class DyingWorker(LayerWorker):
    """Dies like a killed process at one step; keeps what it did."""

    def __init__(self, storage: ObjectStore, at: StepId | None = None) -> None:
        super().__init__(storage, threads=1)
        self._at = at
        self.did: list[StepId] = []

    def do(self, task: Task) -> Completion:
        if task.step == self._at:
            raise KeyboardInterrupt
        self.did.append(task.step)
        return super().do(task)


def die(side: Any, at: StepId) -> DyingWorker:
    """Run a job until a step, then let the process end without a word, and the lease run out."""
    worker = DyingWorker(side.storage, at)
    claim = side.store.claim("first", lease_seconds=600)
    with pytest.raises(KeyboardInterrupt):
        side.dispatcher(LocalExecutor(worker), beat_seconds=3600).run_job(claim)
    side.store.heartbeat(claim, lease_seconds=0.1)
    while side.store.sweep() == 0:
        time.sleep(0.05)
    return worker
