"""Activation rounding and the search of its clip ratios."""

import pytest
import torch
from torch import Tensor

from duquant.config import ActivationConfig
from duquant.quantizers.activation import round_activations, search_clip
from duquant.quantizers.weight import CLIP_CANDIDATES

SEARCHED = ActivationConfig(clip="search")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_error(X: Tensor, W: Tensor, config: ActivationConfig, clip_ratio: Tensor) -> float:
    return float(((round_activations(X, config, clip_ratio) - X).double() @ W.double().T).square().sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_searched_ratios_are_no_worse_than_any_common_ratio(bits: int, symmetric: bool) -> None:
    X, W = normal(200, 64) + 0.5 * normal(200, 1, seed=1), normal(24, 64, seed=2)
    config = ActivationConfig(bits=bits, symmetric=symmetric, clip="search")
    found = search_clip(X, W.T @ W, config)
    best = min(output_error(X, W, config, torch.full((2,), ratio)) for ratio in CLIP_CANDIDATES)
    assert output_error(X, W, config, found) <= best * (1 + 1e-4)
    assert bool(((found > 0.4) & (found <= 1.0)).all())


def test_four_bits_of_a_normal_distribution_want_clipping_and_eight_hardly() -> None:
    X, W = normal(500, 128), normal(32, 128, seed=1)
    four = search_clip(X, W.T @ W, SEARCHED)
    eight = search_clip(X, W.T @ W, ActivationConfig(bits=8, clip="search"))
    assert float(four.max()) < 0.95
    assert float(eight.min()) > float(four.max())


def test_the_ends_may_differ() -> None:
    """One value far below the rest in each token: cutting it off costs more than it gives at the low end only."""
    X = normal(300, 64).abs()
    X[:, 0] = -8.0
    W = torch.zeros(8, 64)
    W[:, 0] = 1.0
    found = search_clip(X, W.T @ W + 0.01 * torch.eye(64), SEARCHED)
    assert float(found[0]) > float(found[1])


def test_outputs_decide_not_inputs() -> None:
    """The same inputs under two weights: what a weight does not read may be cut."""
    X = normal(300, 32)
    X[:, 0] *= 6
    ratios = []
    for read in (0, 1):
        W = torch.zeros(4, 32)
        W[:, read] = 1.0
        ratios.append(float(search_clip(X, W.T @ W, SEARCHED).mean()))
    assert ratios[0] > ratios[1]


def test_sixteen_bits_change_nothing() -> None:
    config, X = ActivationConfig(bits=16, clip="search"), normal(5, 8)
    assert round_activations(X, config, torch.ones(2)) is X
    assert search_clip(X, torch.eye(8), config).tolist() == [1.0, 1.0]


def test_a_single_token_and_zeros() -> None:
    assert bool(torch.isfinite(search_clip(normal(1, 16), torch.eye(16), SEARCHED)).all())
    assert search_clip(torch.zeros(3, 16), torch.eye(16), SEARCHED).tolist() == [1.0, 1.0]
