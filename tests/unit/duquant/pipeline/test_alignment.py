"""Alignment in a layer: only where it lowers the output error, in tensors of the same shapes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from duquant.artifact import verify
from duquant.calibration.statistics import SiteStatistics, StatisticsRecorder
from duquant.config import Recipe, TransformConfig
from duquant.inference import load
from duquant.models.families.llama import LLAMA
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.pipeline.candidates import candidate_error
from duquant.pipeline.folds import Folds
from duquant.pipeline.prepare import PreparedSite, prepare_site

SHARED = TransformConfig(rotation="hadamard", permutation="zigzag", block_size=16)
BALANCED = replace(SHARED, rotation="balanced", shared_rotation=False, rotation_dtype="float16")
CONFIGS = {"shared": SHARED, "balanced": BALANCED}


class Case:
    """A layer's tensors and statistics; `lean` is added to every token that enters it."""

    def __init__(self, path: Path, recipe: Recipe, lean: float) -> None:
        source, cpu = SourceCheckpoint(path), torch.device("cpu")
        skeleton = Skeleton(source, cpu)
        self.recipe = recipe
        self.tensors = skeleton.load(source, 0)
        recorder = StatisticsRecorder(LLAMA.sites, row_stride=1, moment_stride=1)
        generator = torch.Generator().manual_seed(1)
        hidden = source.config["hidden_size"]
        X = torch.randn(2, 64, hidden, generator=generator) + lean * torch.randn(hidden, generator=generator)
        with torch.no_grad(), skeleton.layer(0, self.tensors) as module, recorder.attached(module):
            skeleton.forward(module, X.bfloat16())
        self.statistics: dict[str, SiteStatistics] = recorder.finish()

    def prepared(self, site: str, transform: TransformConfig) -> PreparedSite:
        folds = Folds(columns={name: torch.ones_like(entry.absmax) for name, entry in self.statistics.items()})
        chosen = next(each for each in LLAMA.sites if each.name == site)
        recipe = replace(self.recipe, transform=transform)
        return prepare_site(chosen, self.tensors, self.statistics[site], folds, recipe, layer=0)

    def error(self, prepared: PreparedSite) -> float:
        return candidate_error(prepared.transformed, prepared.weights, self.recipe)


@pytest.mark.parametrize("transform", CONFIGS.values(), ids=list(CONFIGS))
def test_inputs_that_lean_one_way_are_aligned_and_lose_less(
    tiny_model: Callable[..., Path], recipe: Recipe, transform: TransformConfig
) -> None:
    case = Case(tiny_model(), recipe, lean=5.0)
    kinds: tuple[Literal["none", "always", "search"], ...] = ("none", "always", "search")
    plain, always, searched = (case.prepared("attn_in", replace(transform, alignment=kind)) for kind in kinds)
    assert [each.is_aligned for each in (plain, always, searched)] == [False, True, True]
    assert case.error(searched) == case.error(always) < 0.9 * case.error(plain)


@pytest.mark.parametrize("transform", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("lean", [0.0, 5.0])
def test_no_site_loses_more_than_without(
    tiny_model: Callable[..., Path], recipe: Recipe, transform: TransformConfig, lean: float
) -> None:
    case = Case(tiny_model(), recipe, lean)
    for site in LLAMA.sites:
        plain, searched = (case.prepared(site.name, replace(transform, alignment=kind)) for kind in ("none", "search"))
        assert case.error(searched) <= case.error(plain)
        if not searched.is_aligned:
            assert searched.transform.R2 is not None
            assert plain.transform.R2 is not None
            assert torch.equal(searched.transform.R2, plain.transform.R2)


@pytest.mark.parametrize("transform", CONFIGS.values(), ids=list(CONFIGS))
def test_artifact_is_intact_says_where_and_runs(
    tiny_artifact: Callable[..., Any], recipe: Recipe, transform: TransformConfig
) -> None:
    aligned, plain = (replace(recipe, transform=replace(transform, alignment=kind)) for kind in ("search", "none"))
    path = tiny_artifact(with_recipe=aligned).artifact
    assert verify(path).ok
    layers = json.loads((path / "report.json").read_text(encoding="utf-8"))["layers"].values()
    assert any(site["is_aligned"] for layer in layers for site in layer.values())
    assert "| alignment | the dominant direction onto the zero points" in (path / "README.md").read_text()
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        logits = [load(tiny_artifact(with_recipe=each).artifact)[0](ids).logits for each in (aligned, plain)]
    assert bool(torch.isfinite(logits[0]).all())
    # Another rounding of the same function: nearer to the other artifact than to any other model.
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 1
