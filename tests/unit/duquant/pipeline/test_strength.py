"""The search of the smoothing strength: never worse than none, nor than any strength it tries."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duquant.calibration.statistics import SiteStatistics, StatisticsRecorder
from duquant.config import Recipe, TransformConfig
from duquant.models.families.llama import LLAMA
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.pipeline.folds import STRENGTHS, LayerShape, smooth
from duquant.pipeline.strength import smoothing_error

SEARCHES = {
    "plain": TransformConfig(smooth_strength="search"),
    "awq": TransformConfig(smooth_strength="search", smooth_statistic="mean"),
    "hadamard": TransformConfig(smooth_strength="search", smooth_statistic="rms", rotation="hadamard", block_size=16),
    "greedy": TransformConfig(smooth_strength="search", rotation="greedy", permutation="zigzag", block_size=16),
}


class Case:
    """One layer of a tiny model with outlier channels."""

    def __init__(self, path: Path) -> None:
        source, cpu = SourceCheckpoint(path), torch.device("cpu")
        skeleton = Skeleton(source, cpu)
        self.tensors = skeleton.load(source, 0)
        self.shape = LayerShape(kv_heads=skeleton.kv_heads, head_dim=skeleton.head_dim)
        recorder = StatisticsRecorder(LLAMA.sites, row_stride=1, mean_squares=True)
        X = torch.randn(2, 24, source.config["hidden_size"], generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.no_grad(), skeleton.layer(0, self.tensors) as module, recorder.attached(module):
            skeleton.forward(module, X)
        self.statistics: dict[str, SiteStatistics] = recorder.finish()

    def error(self, recipe: Recipe, site: str, transform: TransformConfig) -> float:
        """Smooth as `transform` says; return the site's error as the search of `recipe` measures it."""
        state = dict(self.tensors)
        error_of = smoothing_error(state, self.statistics, recipe, layer=0)
        folds = smooth(state, self.statistics, LLAMA.sites, self.shape, transform, error_of)
        chosen = next(each for each in LLAMA.sites if each.name == site)
        return error_of(chosen, folds.columns[site], folds)


@pytest.fixture
def case(tiny_model: Callable[..., Path]) -> Case:
    return Case(tiny_model())


@pytest.mark.parametrize("transform", SEARCHES.values(), ids=list(SEARCHES))
@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
def test_found_strength_is_the_best_of_all_that_are_tried(
    case: Case, recipe: Recipe, site: str, transform: TransformConfig
) -> None:
    """At the sites that fold first: the others' weights depend on what was found here."""
    recipe = replace(recipe, transform=transform)
    fixed = replace(transform, smooth_strength="fixed")
    errors = [case.error(recipe, site, replace(fixed, smooth_alpha=alpha)) for alpha in (None, *STRENGTHS)]
    assert case.error(recipe, site, transform) == min(errors)
    assert len(set(errors)) > 5


def test_smoothing_that_helps_nowhere_is_left_out(case: Case, recipe: Recipe) -> None:
    """Alike channels on both sides, and a scale would only unbalance them."""
    state = dict(case.tensors)
    folds = smooth(
        state,
        case.statistics,
        LLAMA.sites,
        case.shape,
        SEARCHES["plain"],
        lambda _s, columns, _f: float((columns - 1).abs().sum()),
    )
    assert all(bool((columns == 1).all()) for columns in folds.columns.values())
    assert all(torch.equal(state[name].float(), tensor.float()) for name, tensor in case.tensors.items())
