"""quantize_model: the whole run in one process, one step after the other."""

import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from duquant.artifact.layout import MANIFEST
from duquant.artifact.writer import write_manifest
from duquant.config import Recipe
from duquant.errors import ConfigError, UnsupportedModelError
from duquant.models.devices import resolve_device
from duquant.models.references import resolve_model
from duquant.pipeline.outcome import ShardOutcome
from duquant.pipeline.run import ModelRun


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    phase: str
    done: int
    """Finished layers; those of all passes, for recipes with more than one."""
    total: int
    message: str = ""


@dataclass(frozen=True)
class QuantizeSummary:
    """What a finished run reports."""

    artifact: Path
    seconds: float
    layers: int
    size_bytes: int
    peak_rss_bytes: int
    fingerprint: str


def quantize_model(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    device: str = "auto",
    threads: int | None = None,
    allow_hub: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> QuantizeSummary:
    """Quantize a model into the new directory `out`.

    The artifact is built beside `out` and renamed into place, so `out` is whole or absent. The seconds do not include
    converting a demo model.

    Raises:
        ConfigError: `out` exists and is not empty.
        DuQuantError: whatever is wrong with the model, the text or the recipe.
        OSError: the disk is full or not writable.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty directory; choose another or remove it", field="out")
    report = on_progress or (lambda _progress: None)
    if threads:
        torch.set_num_threads(threads)
    if recipe.calibration.source.kind == "hub" and not allow_hub:
        raise UnsupportedModelError("data sets from the hub are switched off; pass --allow-hub or set allow_hub")
    report(Progress("resolve", 0, 0, model))
    model_path = resolve_model(model, allow_hub=allow_hub)
    started = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        staged = scratch / "artifact"
        staged.mkdir()
        run = ModelRun(model_path, recipe, scratch / "work", device=resolve_device(device))
        outcomes = _run_steps(run, staged, report)
        manifest = run.finish(staged, outcomes, name=model)
        write_manifest(staged, manifest)
        if out.exists():
            out.rmdir()
        staged.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = sum(entry.size_bytes for entry in manifest.files) + (out / MANIFEST).stat().st_size
    return QuantizeSummary(
        artifact=out,
        seconds=time.perf_counter() - started,
        layers=run.source.layers,
        size_bytes=size,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        fingerprint=manifest.fingerprint,
    )


def _run_steps(run: ModelRun, out: Path, report: Callable[[Progress], None]) -> list[ShardOutcome]:
    """Run all steps in plan order."""
    total = run.quantizations
    outcomes: list[ShardOutcome] = []
    done = 0
    for step in run.steps():
        kind, layer = step.id.kind, step.id.layer
        phase = "prepare" if layer < 0 else "layers"
        report(Progress("distill" if kind == "distill" else phase, done, total, f"{kind} layer {layer}"))
        outcome = run.do(step.id, out)
        if outcome is not None:
            outcomes.append(outcome)
        if kind == "quantize":
            run.forget(layer)
        done += kind in ("draft", "quantize")
    report(Progress("finish", done, total))
    return outcomes
